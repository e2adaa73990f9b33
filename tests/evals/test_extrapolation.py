"""The same last tokens at every length, context that is only made longer, and the foreign-context control."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from torchstone.errors import ConfigError, DataError
from torchstone.evals.extrapolation import Extrapolation, extrapolation, held_out_windows
from torchstone.recipe.load import load_recipe

WINDOWS = torch.arange(5 * 65).view(5, 65)


class Reader:
    """Stands for a model: keeps what it reads; its loss is 1 / context length."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, tokens_bt: Tensor, last: int) -> Tensor:
        self.seen.append(tokens_bt)
        return torch.full((tokens_bt.shape[0], last), 1 / (tokens_bt.shape[1] - 1))


def test_every_length_ends_in_the_same_tokens() -> None:
    reader = Reader()
    found = extrapolation(reader, WINDOWS, [32, 8, 64], last=8)
    assert found.lengths == (8, 32, 64)
    assert [part.shape[1] for part in reader.seen] == [9, 33, 65]
    for part in reader.seen:
        assert torch.equal(part[:, -9:], WINDOWS[:, -9:])
    assert found.means == pytest.approx({8: 1 / 8, 32: 1 / 32, 64: 1 / 64})


def test_long_windows_are_read_a_few_at_a_time() -> None:
    reader = Reader()
    extrapolation(reader, torch.zeros(3, 8193, dtype=torch.long), [8192], last=4)
    assert [tuple(part.shape) for part in reader.seen] == [(1, 8193)] * 3


def test_foreign_context_keeps_the_trained_length_and_nothing_before() -> None:
    reader = Reader()
    extrapolation(reader, WINDOWS, [16, 64], last=8, trained=16)
    short, long = reader.seen
    assert torch.equal(short, WINDOWS[:, -17:])
    assert torch.equal(long[:, -17:], WINDOWS[:, -17:])
    assert torch.equal(long[:, :-17], WINDOWS.roll(1, 0)[:, :-17])


def test_slope_is_per_doubling_and_paired_by_window() -> None:
    level_n = np.linspace(1, 3, 12)
    found = Extrapolation((8, 16, 64), np.stack([level_n, level_n - 0.5, level_n - 1.5]))
    np.testing.assert_allclose(found.slopes_n, -0.5)
    assert found.slope().effect == pytest.approx(-0.5)
    rise = found.rise(64)
    assert (rise.effect, rise.n) == (pytest.approx(-1.5), 12)
    assert rise.high < -1.49  # the spread between windows cancels
    assert found.items(16)["window 0"] == 0.5


@pytest.mark.parametrize("lengths", [[4], [65], []])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ConfigError, match="lengths"):
        extrapolation(Reader(), WINDOWS, lengths, last=8)


def test_one_length_has_no_slope_and_one_window_no_stranger() -> None:
    with pytest.raises(ConfigError, match="two lengths"):
        _ = extrapolation(Reader(), WINDOWS, [16], last=8).slopes_n
    with pytest.raises(ConfigError, match="two windows"):
        extrapolation(Reader(), WINDOWS[:1], [16], last=8, trained=8)


def test_a_table_of_positions_that_is_too_short_is_explained() -> None:
    def model(tokens_bt: Tensor, last: int) -> Tensor:
        raise IndexError("index out of range in self")

    with pytest.raises(ConfigError, match="cannot read 64 tokens"):
        extrapolation(model, WINDOWS, [64], last=8)


def test_windows_are_held_out_text_inside_one_document() -> None:
    data = load_recipe("recipes/tiny.yaml", ["data.tokenizer=bytes", "data.length=64"]).data
    windows_nt = held_out_windows(data, 256, 8)
    assert windows_nt.shape == (8, 257)
    source = data.build(None)
    assert not (windows_nt == source.tokenizer.end_of_document).any()
    assert torch.equal(windows_nt, held_out_windows(data, 256, 8))
    held_out = source.shards.validation.read(0, len(source.shards.validation.tokens)).astype(np.uint16).tobytes()
    assert all(row.numpy().astype(np.uint16).tobytes() in held_out for row in windows_nt)
    with pytest.raises(DataError, match="inside one document"):
        held_out_windows(data, 256, 10**6)


def test_tasks_have_no_longer_windows() -> None:
    with pytest.raises(ConfigError, match="recall"):
        held_out_windows(load_recipe("recipes/tiny.yaml", ["data=recall"]).data, 64, 4)
