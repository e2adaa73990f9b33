"""The study end to end at smoke scale, its design, and the exact part against the theory."""

from __future__ import annotations

import math

import pytest
import torch

from torchstone.lab.progress import Quiet
from torchstone.lab.runnable import Runnable
from torchstone.recipe.load import load_recipe
from torchstone.report.write import load
from torchstone.studies._factor_descent import (
    DIAGONAL,
    RATE,
    STEPS,
    factor_descent,
    random_starts,
    soft_threshold,
)
from torchstone.studies.attention_rank import AttentionRank

TARGET = torch.diag(torch.tensor(DIAGONAL))


def descend(decay, record, starts=3):
    return factor_descent(*random_starts(starts, 0), TARGET, rate=RATE, decay=decay, record=record)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.3, 0.5, 0.9, 1.2])
def test_singular_values_end_at_the_soft_threshold(decay):
    values = descend(decay, [STEPS]).values[0]
    assert float((values - soft_threshold(decay)).abs().max()) < 1e-3


@pytest.mark.parametrize("decay", [0.1, 0.3, 0.5])
def test_each_step_multiplies_the_imbalance_by_the_square_of_its_own_decay(decay):
    found = descend(decay, [20, 100]).imbalance
    rate = (found[0] / found[1]).log() / 80
    assert (rate / (-2 * math.log(1 - RATE * decay)) - 1).abs().max() < 0.03


def test_without_decay_the_imbalance_stays_and_the_gap_does_not_close():
    found = descend(0.0, [20, STEPS])
    torch.testing.assert_close(found.imbalance[0], found.imbalance[1], rtol=0.01, atol=0)
    assert (found.half_frobenius[1] - found.nuclear[1]).min() > 0.1


def test_half_frobenius_is_never_below_the_nuclear_norm():
    found = descend(torch.tensor([[0.0], [0.2], [0.7]]), range(0, 200, 10))
    assert found.values.shape == (20, 3, 3, 5)
    assert (found.half_frobenius - found.nuclear).min() > -1e-12


def test_many_decays_at_once_are_each_alone():
    together = descend(torch.tensor([[0.1], [0.4]]), [0, 50])
    for index, decay in enumerate((0.1, 0.4)):
        alone = descend(torch.tensor(decay), [0, 50])
        torch.testing.assert_close(together.values[:, index], alone.values, rtol=1e-12, atol=1e-12)


def test_arms_differ_by_their_decay_alone():
    study = AttentionRank()
    arms = {arm.name: arm for arm in study.check(study.scales["toy"])}
    decays = {}
    for name in ("attention-0", "attention-low", "attention-high", "rest-only"):
        record = study.arm_record(arms[name])
        assert {change.path.rpartition(".")[0] for change in record.intervention} <= {"optimizer.weight_decay"}
        decay = load_recipe(arms[name].settings["recipe"]).optimizer.weight_decay
        assert decay.embeddings == 0 and decay.attention_qk == decay.attention_vo
        decays[name] = (decay.attention_qk, decay.default)
    assert decays == {
        "attention-0": (0, 0),
        "attention-low": (0.3, 0),
        "attention-high": (1, 0),
        "rest-only": (0, 1),
    }
    assert study.arm_record(arms["descent"]).parameters is None


def test_every_scale_can_be_prepared():
    study = AttentionRank()
    for scale in study.scales.values():
        assert {arm.role for arm in study.check(scale)} == {"baseline", "arm", "control"}


def test_smoke(tmp_path):
    finished = Runnable(AttentionRank()).run("smoke", seeds=1, out=tmp_path, on="inline", progress=Quiet())
    assert [cell.error for cell in finished.result.cells if cell.status != "done"] == []
    assert {verdict.status for verdict in finished.verdicts} == {"inconclusive"}
    again = load(tmp_path)
    trained = next(cell for cell in again.cells if cell.arm == "rest-only")
    assert 1 < trained.metrics["effective_rank_qk"] <= 8
    assert trained.metrics["half_frobenius_over_nuclear_ov"] >= 1
    descent = next(cell for cell in again.cells if cell.arm == "descent")
    assert descent.metrics["value_error"] < 1e-3 and 0 < descent.metrics["rate_error"] < 0.1
    table = again.tables[0]
    row = dict(zip(table.columns, next(row for row in table.rows if row[0] == "attention-high"), strict=True))
    assert row["η·steps·λ attention"] == pytest.approx(4 * 8e-3)
    lines = {line.name: line for line in again.figures[0].lines}
    assert len(lines) == 10 and lines["closed form, d = 1"].y[0] == 1
