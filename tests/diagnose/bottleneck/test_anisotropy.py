"""Anisotropy is the mean of all pairwise cosines, raw and centred, and bad states are named."""

from __future__ import annotations

import pytest
import torch
from tests.support.subjects import byte_subject, texts

from torchstone.diagnose.bottleneck.anisotropy import anisotropy, anisotropy_finding, layer_anisotropy
from torchstone.diagnose.texts import token_rows
from torchstone.errors import DataError


def pairwise(states_nd: torch.Tensor) -> float:
    """The definition, with the n × n matrix."""
    unit_nd = torch.nn.functional.normalize(states_nd.double(), dim=1)
    cosines_nn = unit_nd @ unit_nd.T
    count = len(unit_nd)
    return float((cosines_nn.sum() - cosines_nn.trace()) / (count * (count - 1)))


@pytest.mark.parametrize(("rows", "channels", "shift"), [(2, 3, 0.0), (7, 50, 2.0), (400, 8, -0.5)])
def test_closed_form_is_the_mean_cosine(rows: int, channels: int, shift: float) -> None:
    states_nd = torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows)) + shift
    assert anisotropy(states_nd) == pytest.approx(pairwise(states_nd), abs=1e-12)
    assert -1 / (rows - 1) - 1e-12 <= anisotropy(states_nd) <= 1


def test_extremes_and_scale() -> None:
    line = torch.ones(5, 4) * torch.tensor([1e-20, 1.0, 3.0, 1e20, 2.0])[:, None]
    assert anisotropy(line) == pytest.approx(1.0)
    simplex = torch.eye(4) - 0.25
    assert anisotropy(simplex) == pytest.approx(-1 / 3)
    assert anisotropy(1e30 * simplex) == pytest.approx(-1 / 3)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (torch.ones(1, 4), "at least 2 rows"),
        (torch.ones(0, 4), "at least 2 rows"),
        (torch.ones(4), "at least 2 rows"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "token 1 .* zero"),
        (torch.tensor([[1.0, float("nan")], [1.0, 0.0]]), "token 0 .* not finite"),
        (torch.tensor([[1.0, 1.0], [float("inf"), 0.0]]), "token 1 .* not finite"),
    ],
)
def test_bad_rows_are_named(states: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        anisotropy(states)


def test_layers_are_those_of_the_model_whatever_the_batches() -> None:
    subject = byte_subject()
    rows_nt = token_rows(subject, texts(), 16, 11)
    found = layer_anisotropy(subject, rows_nt)
    assert [layer.layer for layer in found] == ["embedding", "block 0", "block 1", "final norm"]
    for layer, states_btd in zip(found, subject.hidden_states(rows_nt), strict=True):
        states_nd = states_btd.flatten(0, 1).double()
        assert layer.raw == pytest.approx(pairwise(states_nd), abs=1e-6)
        assert layer.centred == pytest.approx(pairwise(states_nd - states_nd.mean(0)), abs=1e-6)


def test_special_tokens_before_the_text_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = byte_subject()
    monkeypatch.setattr(type(subject), "first_tokens", lambda self: [256])
    found = anisotropy_finding(subject, texts(), tokens=80, length=8)
    rows_nt = token_rows(subject, texts(), 8, 10)
    assert rows_nt[:, 0].eq(256).all() and "70 tokens of text in rows of 8" in found.notes[0]
    for row, states_btd in zip(found.tables[0].rows, subject.hidden_states(rows_nt), strict=True):
        states_nd = states_btd[:, 1:].flatten(0, 1).double()
        assert row[1:3] == pytest.approx((pairwise(states_nd), pairwise(states_nd - states_nd.mean(0))), abs=1e-6)


def test_a_bad_layer_is_named() -> None:
    subject = byte_subject()
    with torch.no_grad():
        subject.model.norm.gain.zero_()
    with pytest.raises(DataError, match="final norm: token 0 .* zero"):
        layer_anisotropy(subject, token_rows(subject, texts(), 16, 2))
    with pytest.raises(DataError, match="at least 2"):
        layer_anisotropy(byte_subject(), torch.zeros(1, 1, dtype=torch.long))


def test_a_common_direction_is_raw_and_not_centred() -> None:
    subject = byte_subject()
    with torch.no_grad():
        subject.model.embed.weight[:, 0] += 30
    first = layer_anisotropy(subject, token_rows(subject, texts(), 16, 8))[0]
    assert first.raw > 0.9 and abs(first.centred) < 0.2


def test_finding() -> None:
    found = anisotropy_finding(byte_subject(), texts(), tokens=128, length=16)
    assert found.analysis == "anisotropy" and len(found.tables[0].rows) == 4
    assert "untrained" in found.answer and "128 tokens" in found.notes[0]
    with pytest.raises(DataError, match="text too short"):
        anisotropy_finding(byte_subject(), ["short"], length=64)
