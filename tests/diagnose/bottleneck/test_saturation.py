"""Saturation: aligned curves of a series, the law of larger models, and bad series."""

from __future__ import annotations

import pytest
import torch
from tests.support.subjects import byte_subject, texts

from torchstone.diagnose.bottleneck.anisotropy import layer_anisotropy
from torchstone.diagnose.bottleneck.saturation import measure, saturation_finding
from torchstone.diagnose.bottleneck.saturation_law import Law, Run, excess_interval, fit_law
from torchstone.diagnose.texts import token_rows
from torchstone.errors import DataError

SETTINGS = {"rows": 8, "length": 16}
TRUE = Law(120.0, 0.25)


def runs(noise: float = 0.0) -> list[Run]:
    """Three sizes, four checkpoints each, on the law up to `noise`."""
    signs = (1, -1, -1, 1)
    return [
        Run(f"{size:g}", size, tokens, TRUE.predict(size, tokens) * (1 + noise * signs[index]))
        for size in (4e8, 1.4e9, 7e9)
        for index, tokens in enumerate((2e10, 5e10, 1e11, 3e11))
    ]


def test_the_law_is_found_again() -> None:
    law = fit_law(runs())
    assert law.power == pytest.approx(TRUE.power, abs=2e-3) and law.factor == pytest.approx(TRUE.factor, rel=0.05)
    small = Run("small", 7e7, 3e11, 1.08 * TRUE.predict(7e7, 3e11))
    assert law.excess(small) == pytest.approx(0.08, abs=2e-3)


def test_one_wild_checkpoint_moves_the_law_little() -> None:
    wild = [*runs(), Run("7e+09", 7e9, 2e11, 2 * TRUE.predict(7e9, 2e11))]
    small = Run("small", 7e7, 3e11, TRUE.predict(7e7, 3e11))
    assert abs(fit_law(wild).excess(small)) < 0.02


def test_interval_resamples_models() -> None:
    small = Run("small", 7e7, 3e11, 1.08 * TRUE.predict(7e7, 3e11))
    interval = excess_interval(small, runs(2e-3), resamples=20)
    assert interval is not None and interval[0] <= interval[1] and interval[0] < 0.09 and interval[1] > 0.07
    assert excess_interval(small, runs()[:8], resamples=20) is None


@pytest.mark.parametrize("bad", [[], [Run("a", 1e8, 1e9, 3.0)], [Run("a", 1e8, 1e9, 3.0), Run("b", 2e8, 1e9, -1.0)]])
def test_laws_need_sizes_and_positive_numbers(bad: list[Run]) -> None:
    with pytest.raises(DataError, match="at least 2 sizes"):
        fit_law(bad)


def test_a_series_is_read_one_by_one_and_sorted() -> None:
    opened = []

    def series():
        for tokens, seed in ((3e6, 2), (1e6, 0), (2e6, 1)):
            opened.append(seed)
            yield tokens, byte_subject(seed)

    found = saturation_finding(series(), texts(), **SETTINGS)
    assert opened == [2, 0, 1]
    assert [row[0] for row in found.tables[0].rows] == [1e6, 2e6, 3e6]
    assert len(found.figures) == 4 and all(figure.lines[0].x == (1e6, 2e6, 3e6) for figure in found.figures)
    point = measure(byte_subject(1), texts(), 2e6, 8, 16)
    assert found.tables[0].rows[1][1:3] == (point.loss, point.anisotropy[-1])


def test_a_loss_that_turns_up_is_said_and_compared_with_larger_models() -> None:
    series = [(1e6, byte_subject(0)), (2e6, byte_subject(0, head={"kind": "linear", "tied": False}))]
    first, second = (measure(subject, texts(), 1, 8, 16).loss for _, subject in series)
    if first > second:
        series = [(1e6, series[1][1]), (2e6, series[0][1])]
    found = saturation_finding(series, texts(), margin=1e-6, larger=runs(), **SETTINGS)
    assert "above its best" in found.answer and "law of the larger models" in found.answer
    assert "does not turn up" in saturation_finding(series, texts(), margin=50.0, **SETTINGS).answer


def test_a_checkpoint_whose_losses_are_not_finite_is_refused_with_the_place() -> None:
    subject = byte_subject()
    with torch.no_grad():
        subject.model.blocks[1].mixer.w_o.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match="loss of nan at token 1 of row 0 .*the state after block 1"):
        saturation_finding([(1e6, byte_subject()), (2e6, subject)], texts(), **SETTINGS)


def test_special_tokens_before_the_text_are_context(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = byte_subject()
    monkeypatch.setattr(subject, "first_tokens", lambda: [256])
    point = measure(subject, texts(), 1e6, 8, 16)
    rows_nt = token_rows(subject, texts(), 16, 8)
    assert point.loss == pytest.approx(float(subject.losses(rows_nt).mean())) and rows_nt[:, 0].eq(256).all()
    assert point.anisotropy[-1] == layer_anisotropy(subject, rows_nt, 1)[-1].raw


def test_series_without_a_course_are_refused() -> None:
    with pytest.raises(DataError, match="at least 2 checkpoints"):
        saturation_finding([(1e6, byte_subject())], texts(), **SETTINGS)
    with pytest.raises(DataError, match="different token counts"):
        saturation_finding([(1e6, byte_subject(0)), (1e6, byte_subject(1))], texts(), **SETTINGS)
