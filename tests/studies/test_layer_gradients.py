"""The study end to end at smoke scale, and the design that its docstring promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchstone.lab.progress import Quiet
from torchstone.lab.runnable import Runnable
from torchstone.report.result import Result
from torchstone.report.write import load
from torchstone.studies._layer_gradients import examples
from torchstone.studies.layer_gradients import FAST, MATCHED, SLOW, LayerGradients


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layer-gradients")
    Runnable(LayerGradients()).run("smoke", seeds=1, out=out, on="inline", progress=Quiet())
    return out


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return load(folder)


def test_arms_share_one_recipe_and_one_run_per_seed(folder: Path) -> None:
    study = LayerGradients()
    arms = study.check(study.scales["toy"])
    assert len({str(arm.settings["recipe"]) for arm in arms}) == 1
    assert {arm.name for arm in arms if arm.settings["trained"]} == {FAST, SLOW, MATCHED}
    assert [path.name for path in (folder / "trained").iterdir() if path.is_dir()] == ["seed-0"]


def test_every_cell_and_claim_is_there(result: Result) -> None:
    assert [cell.error for cell in result.cells if cell.status != "done"] == []
    assert len(result.cells) == 6 and [v.claim for v in result.verdicts] == [
        claim.id for claim in LayerGradients.claims
    ]
    by_arm = {cell.arm: cell.metrics for cell in result.cells}
    assert by_arm[MATCHED]["tokens"] == by_arm[FAST]["tokens"] < by_arm[SLOW]["tokens"]
    assert {v.n for v in result.verdicts if v.unit_of_n == "items"} == {12}
    untrained = next(v for v in result.verdicts if v.claim == "untrained-raw")
    assert untrained.status == "holds"  # what averaging alone does, whatever the model


def test_tables_name_every_condition(result: Result) -> None:
    main, ratios = result.tables[:2]
    assert [row[0] for row in main.rows][:2] == [FAST, f"{FAST}, irrelevant"] and len(main.rows) == 12
    assert ratios.rows[0][1] == pytest.approx(
        next(c.metrics["nuclear"] for c in result.cells if c.arm == SLOW)
        / next(c.metrics["nuclear"] for c in result.cells if c.arm == FAST),
        rel=1e-2,
    )
    assert {line.name for line in result.figures[0].lines} == {FAST, SLOW, MATCHED}
    assert " → " in result.paper[0].ours


def test_conditions_differ_as_they_are_meant_to() -> None:
    study = LayerGradients()
    data = study.recipe(study.scales["toy"]).data.build(None)
    fast, slow, matched = (examples(data, 8, response, 0, seed=0) for response in (FAST, SLOW, MATCHED))
    for a, b, c in zip(fast, slow, matched, strict=True):
        assert a.id == b.id == c.id and a.start == b.start == 8
        assert (
            len(c.scored) == len(a.scored) < len(b.scored) and c.tokens == b.tokens and set(c.scored) <= set(b.scored)
        )
        assert a.tokens[-1] == b.tokens[-1] and len(a.scored) == len(a.tokens) - a.start
    foreign = examples(data, 8, SLOW, 1, seed=0)
    assert [e.tokens[e.start :] for e in foreign] == [e.tokens[e.start :] for e in slow[1:] + slow[:1]]
    assert [e.tokens[: e.start] for e in foreign] == [e.tokens[: e.start] for e in slow]
    assert examples(data, 8, MATCHED, 0, seed=1) != matched
