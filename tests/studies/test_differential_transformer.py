"""The study end to end at smoke scale, and the design that its docstring promises."""

from __future__ import annotations

from torchstone.lab.progress import Quiet
from torchstone.lab.runnable import Runnable
from torchstone.recipe.load import load_recipe
from torchstone.report.write import load
from torchstone.studies.differential_transformer import DifferentialTransformer


def test_arms_are_matched_and_differ_by_their_intervention_only():
    study = DifferentialTransformer()
    arms = {arm.name: arm for arm in study.check(study.scales["toy"])}
    records = {name: study.arm_record(arm) for name, arm in arms.items()}
    assert set(arms) >= {
        "softmax",
        "few-heads",
        "few-heads-norm",
        "diff-v1",
        "diff-v1-no-norm",
        "diff-v2",
        "more-heads",
    }
    for name, record in records.items():
        if not name.startswith("text."):
            assert abs(record.parameters / records["softmax"].parameters - 1) <= 0.005
    paths = {name: {change.path for change in record.intervention} for name, record in records.items()}
    assert paths["softmax"] == set()
    assert paths["diff-v1"] == {"model.block.mixer.kind"}
    assert paths["diff-v2"] == {
        "model.block.mixer.kind", "model.block.mixer.version", "model.block.feedforward.hidden",
    }  # fmt: skip
    assert paths["text.diff-v1"] == {"model.block.mixer.kind"}
    v1 = load_recipe(arms["diff-v1"].settings["recipe"])
    model = v1.model.skeleton(v1.data.vocabulary(), v1.data.sequence_length())
    assert model.blocks[0].mixer.head_dim == 8


def test_smoke(tmp_path):
    finished = Runnable(DifferentialTransformer()).run("smoke", seeds=1, out=tmp_path, on="inline", progress=Quiet())
    assert [cell.error for cell in finished.result.cells if cell.status != "done"] == []
    assert {verdict.status for verdict in finished.verdicts} == {"inconclusive"}
    again = load(tmp_path)
    recall = next(cell for cell in again.cells if cell.arm == "diff-v1")
    assert 0 < recall.metrics["noise_mass"] <= 1
    text = next(cell for cell in again.cells if cell.arm == "text.diff-v1")
    assert text.metrics["ar_hit_loss"] > 0
    assert {line.name for figure in again.figures for line in figure.lines} >= {"diff-v1", "diff-v2"}
