"""The study end to end at smoke scale, its matched arms, and its independent samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchstone.errors import StudyError
from torchstone.lab.progress import Quiet
from torchstone.lab.runnable import Runnable
from torchstone.report.write import load
from torchstone.studies import _softmax_bottleneck as parts
from torchstone.studies.softmax_bottleneck import SoftmaxBottleneck


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_arms_are_matched_and_differ_by_their_intervention_only(scale: str) -> None:
    study = SoftmaxBottleneck()
    trained = [arm for arm in study.check(study.scales[scale]) if not parts.is_text(arm)]
    records = {arm.name: study.arm_record(arm) for arm in trained}
    for name, record in records.items():
        against = records["text.full" if name.startswith("text.") else "narrow"]
        assert abs(record.parameters / against.parameters - 1) <= 0.005, name
    paths = {name: {change.path for change in record.intervention} for name, record in records.items()}
    assert paths["wide"] == {"model.width", "model.block.feedforward.hidden"}
    assert paths["narrow-mixture"] == {"model.block.feedforward.hidden", "model.head.kind", "model.head.components"}
    assert paths["mixture.narrow"] == {"data.scale", "data.latent", "data.components"}


def test_samples_share_no_document() -> None:
    samples = [{document.id for document in parts.sample(seed, 100)} for seed in range(parts.PARTS)]
    assert sum(map(len, samples)) == len(set.union(*samples)) > 100
    assert len(parts.sample(0, 0.05)) < len(samples[0])
    with pytest.raises(StudyError, match="seeds 0 to 3, not 4"):
        parts.sample(4, 1.0)


def test_smoke(tmp_path: Path) -> None:
    finished = Runnable(SoftmaxBottleneck()).run("smoke", seeds=1, out=tmp_path, on="inline", progress=Quiet())
    assert [cell.error for cell in finished.result.cells if cell.status != "done"] == []
    assert {verdict.status for verdict in finished.verdicts} == {"inconclusive"}
    again = load(tmp_path)
    cells = {cell.arm: cell for cell in again.cells}
    assert cells["narrow"].metrics["excess"] > 0 and -1 < cells["wide"].metrics["anisotropy"] < 1
    assert cells["bytes"].metrics["critical_rank"] > 0 and cells["bytes"].series["fitted gap"].axes["rank"] == (4, 16)
    floors = {row[:2]: row[2] for row in again.tables[2].rows}
    assert floors["free", 8] > floors["free", 32] > 0 and ("mixture", 8) in floors
    assert any("not expected" in note for note in again.notes)
    assert {line.name for line in again.figures[0].lines} == {"bytes", "bytes-noise", "bpe", "bpe-noise"}
