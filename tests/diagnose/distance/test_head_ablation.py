"""Ablation reports: what is compared, how random heads are drawn, and that long-range loss is seen where it is planted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from subjects import byte_subject

from torchstone.diagnose.distance import ablation as head_ablation
from torchstone.diagnose.distance.ablation import Increase, ablation_report, increases, random_like
from torchstone.errors import ConfigError, DataError


def test_random_heads_are_as_many_per_layer_and_never_the_same_set() -> None:
    subject = byte_subject(width=32)  # 4 heads in each of 2 layers
    chosen = [(0, 1), (1, 0), (1, 3)]
    drawn = list(random_like(subject, chosen, 200, seed=0))
    assert len(drawn) == 200
    for heads in drawn:
        assert Counter(layer for layer, _ in heads) == {0: 1, 1: 2} and len(set(heads)) == 3
        assert set(heads) != set(chosen)
    assert {head for heads in drawn for layer, head in heads if layer == 0} == {0, 1, 2, 3}
    assert drawn == list(random_like(subject, chosen, 200, seed=0)) != list(random_like(subject, chosen, 200, seed=1))


def test_all_heads_of_a_layer_have_no_other_draw() -> None:
    subject = byte_subject()
    heads = [(0, head) for head in range(subject.layers[0].heads)]
    with pytest.raises(ConfigError, match="every head of the layers"):
        list(random_like(subject, heads, 20, seed=0))


def test_the_report_is_the_difference_of_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = byte_subject(width=32)
    tokens_bt = torch.randint(0, 256, (3, 32), generator=torch.Generator().manual_seed(0))
    report = ablation_report(subject, tokens_bt, [(1, 2)], lowest=[(0, 0)], mode="zero")
    plain_bt = subject.losses(tokens_bt)
    with subject.ablate([(1, 2)], "zero"):
        without_bt = subject.losses(tokens_bt)
    quarter = plain_bt.shape[1] // 4
    assert report.early.plain == pytest.approx(float(plain_bt[:, :quarter].mean()), abs=1e-5)
    assert report.late.chosen == pytest.approx(float((without_bt - plain_bt)[:, -quarter:].mean()), abs=1e-5)
    assert len(report.late.random) == 20 and report.late.lowest is not None
    torch.testing.assert_close(subject.losses(tokens_bt), plain_bt)  # nothing is left behind
    monkeypatch.setattr(head_ablation, "TOKENS_AT_ONCE", 32)
    alone = ablation_report(subject, tokens_bt, [(1, 2)], mode="zero")
    assert alone.late.chosen == pytest.approx(report.late.chosen, abs=1e-5) and alone.late.lowest is None


def test_percentile_and_quantile_of_the_draws() -> None:
    rise = Increase(plain=1.0, chosen=0.5, random=(0.1, 0.2, 0.5, 0.9), lowest=None)
    assert rise.percentile == 0.5 and rise.quantile(0.5) == pytest.approx(0.35)


def test_what_cannot_be_ablated_is_refused() -> None:
    subject, tokens_bt = byte_subject(width=32), torch.zeros(1, 16, dtype=torch.long)
    for heads, message in (
        ([(0, 9)], r"head 9 of layer 0 is out of range: layers are 0 … 1, heads of this layer 0 … 3"),
        ([(5, 0)], r"head 0 of layer 5 is out of range"),
        ([], "no heads were given"),
    ):
        with pytest.raises(ConfigError, match=message):
            ablation_report(subject, tokens_bt, heads)
    with pytest.raises(ConfigError, match="at least 20"):
        increases(subject, dict, [(0, 0)], draws=5)
    with pytest.raises(ConfigError, match="window"):
        ablation_report(subject, tokens_bt, [(0, 0)], mode="window")


def test_a_measurement_that_is_not_finite_is_an_error_that_names_the_heads() -> None:
    subject = byte_subject(width=32)
    values = iter([1.0, 2.0, float("inf")])
    with pytest.raises(DataError, match=r"'loss' is inf without the heads [01]\.[0-3], so that no rise"):
        increases(subject, lambda: {"loss": next(values)}, [(0, 1)])
    with pytest.raises(DataError, match="'loss' is nan without any ablation"):
        increases(subject, lambda: {"loss": float("nan")}, [(0, 1)])
