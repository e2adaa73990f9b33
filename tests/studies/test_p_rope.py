"""The study end to end at smoke scale, and the design that its docstring promises."""

from __future__ import annotations

import pytest

from torchstone.lab.progress import Quiet
from torchstone.lab.runnable import Runnable
from torchstone.report.write import load
from torchstone.studies._p_rope import theory_table
from torchstone.studies.p_rope import ENCODINGS, PROBED, PROBES, PRope

POSITION = "model.block.mixer.position"


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_arms_differ_in_what_turns_and_in_nothing_else(scale):
    study = PRope()
    records = {arm.name: study.arm_record(arm) for arm in study.check(study.scales[scale])}
    assert set(records) == {"rope", *ENCODINGS, "rope-large", "p-0.75-large"} | {
        f"{probe}.{name}" for probe in PROBES for name in ("rope", *PROBED)
    }
    for name, record in records.items():
        probe, _, encoding = name.partition(".")
        origin = records[f"{probe}.rope" if probe in PROBES else "rope"]
        assert (record.parameters, record.flops_per_token) == (origin.parameters, origin.flops_per_token)
        if encoding != "rope" or probe not in PROBES:
            assert all(change.path.startswith(POSITION) for change in record.intervention), name


def test_the_exact_part_agrees_with_the_theory():
    rows = theory_table().rows
    assert len(rows) >= 10
    for statement, theory, computed in rows:
        if theory is not None:
            tolerance = 1 if statement.startswith("tokens") else 6e-4
            assert computed == pytest.approx(theory, abs=tolerance), statement


def test_smoke(tmp_path):
    finished = Runnable(PRope()).run("smoke", seeds=1, out=tmp_path, on="inline", progress=Quiet())
    assert [cell.error for cell in finished.result.cells if cell.status != "done"] == []
    assert {verdict.status for verdict in finished.verdicts} == {"inconclusive"}
    again = load(tmp_path)
    cells = {cell.arm: cell.metrics for cell in again.cells}
    assert 0 < cells["p-0.75"]["slow_share"] < 1 and "slow_share" not in cells["nope"]
    assert all(cells["nope"][f"last_loss_{multiple}x"] > 0 for multiple in (1, 2, 4, 8))
    assert 0 <= cells["match.nope"]["match_far_accuracy"] <= 1 and 0 <= cells["copy.rope"]["copy_accuracy"] <= 1
    tables = {table.title: table for table in again.tables}
    ladders = {row[0]: row for row in tables["How far the pairs turn over the training window"].rows}
    assert ladders["rope"][2:4] == (8, ladders["rope"][4]) and ladders["p-0.75"][2] == 6 and ladders["nope"][2] == 0
    assert ladders["rope-large"][4] < 0.1 < ladders["rope"][4]
    assert {row[0] for row in tables["Probes: means over seeds"].rows} == {"rope", *PROBED}
    assert {line.name for line in again.figures[0].lines} == {"rope", *ENCODINGS, "rope-large", "p-0.75-large"}
    assert len(again.paper) == 6 and all(figure.ours != "–" for figure in again.paper)
