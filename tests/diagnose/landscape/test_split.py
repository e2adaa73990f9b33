"""Changes of the loss by entropy: groups of equal mass, borders, ties, weights, refusals."""

from __future__ import annotations

import pytest
import torch

from torchstone.diagnose.landscape.split import entropy_split
from torchstone.errors import ConfigError, DataError


def test_groups_are_ordered_by_entropy_and_have_equal_mass() -> None:
    entropy_n = torch.arange(100.0)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    before_n = torch.full((100,), 5.0)
    split = entropy_split(before_n, before_n - 0.01 * entropy_n, entropy_n)
    assert split.entropy == pytest.approx([10 * i + 4.5 for i in range(10)])
    assert split.change == pytest.approx([-0.01 * (10 * i + 4.5) for i in range(10)], abs=1e-6)
    assert split.drop_top == pytest.approx(0.945, abs=1e-6) and split.drop_bottom == pytest.approx(0.045, abs=1e-6)


def test_a_token_on_a_border_is_divided() -> None:
    split = entropy_split(torch.zeros(3), torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.0, 1.0, 2.0]), groups=2)
    assert split.change == pytest.approx([-(1 * 2 + 2 * 1) / 3, -(2 * 1 + 3 * 2) / 3])


def test_weights_are_mass() -> None:
    given = torch.zeros(3), torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.0, 1.0, 2.0])
    split = entropy_split(*given, weights_n=torch.tensor([2.0, 1.0, 1.0]), groups=2)
    assert split.change == pytest.approx([-1.0, -2.5])
    repeated = entropy_split(*(torch.cat([values[:1], values]) for values in given), groups=2)
    assert repeated == split


def test_ties_share_their_change_whatever_their_order() -> None:
    entropy_n = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0])
    change_n = torch.tensor([-4.0, 0.0, 0.0, 0.0, -3.0, -5.0])
    splits = [
        entropy_split(torch.zeros(6), change_n[order], entropy_n[order], groups=6)
        for order in (torch.arange(6), torch.tensor([3, 2, 5, 1, 0, 4]))
    ]
    assert splits[0].change == pytest.approx([-1.0, -1.0, -1.0, -1.0, -3.0, -5.0]) == splits[1].change


def test_numbers_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(DataError, match="belong to the same tokens; given 3, 3, 2, 2"):
        entropy_split(torch.zeros(3), torch.zeros(3), torch.zeros(2))
    with pytest.raises(DataError, match="finite"):
        entropy_split(torch.zeros(2), torch.tensor([0.0, float("nan")]), torch.zeros(2))
    with pytest.raises(DataError, match="weights"):
        entropy_split(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(DataError, match="3 tokens make no 10 groups; give longer or more texts, or ask for at most 3"):
        entropy_split(torch.zeros(3), torch.zeros(3), torch.arange(3.0))
    assert len(entropy_split(torch.zeros(3), torch.zeros(3), torch.arange(3.0), torch.ones(3)).change) == 10
    for groups in (0, -2):
        with pytest.raises(ConfigError, match=f"groups was given as {groups}"):
            entropy_split(torch.zeros(3), torch.zeros(3), torch.arange(3.0), groups=groups)
