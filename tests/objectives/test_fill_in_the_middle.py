"""Fill in the middle: which targets are scored, and that the loss is next-token's on those."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstone.data.batch import IGNORE, Batch
from torchstone.models.decoder import DecoderConfig
from torchstone.objectives.fill_in_the_middle import FillInTheMiddleObjectiveConfig, middle_mask
from torchstone.objectives.next_token import NextTokenConfig

FIM, END = 0, 1


def slow_mask(targets: list[int]) -> list[bool]:
    """The rule word by word: on after <fim>, off after an end token."""
    scored, inside = [], False
    for target in targets:
        scored.append(inside and target != FIM)
        if target == FIM:
            inside = True
        if target == END:
            inside = False
    return scored


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_the_mask_follows_the_rule(targets: list[int]) -> None:
    assert middle_mask(torch.tensor([targets]), FIM, END)[0].tolist() == slow_mask(targets)


def test_the_first_end_of_a_row_that_began_elsewhere_is_not_scored() -> None:
    targets_bt = torch.tensor([[5, END, 6, FIM, 7, END, 8]])
    assert middle_mask(targets_bt, FIM, END).tolist() == [[False, False, False, False, True, True, False]]


def test_the_loss_is_that_of_next_tokens_on_the_middle() -> None:
    model = DecoderConfig(width=16, depth=1, head_dim=8).build(9, 12, 0)
    tokens_bt = torch.randint(0, 9, (4, 13), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens_bt[:, :-1], tokens_bt[:, 1:])
    objective = FillInTheMiddleObjectiveConfig(fim_token=FIM, end_token=END).build()
    mask_bt = middle_mask(batch.targets_bt, FIM, END)
    assert 0 < int(mask_bt.sum()) == objective.count_targets(batch, None) < mask_bt.numel()
    kept = Batch(batch.tokens_bt, batch.targets_bt.masked_fill(~mask_bt, IGNORE))
    ours, theirs = objective(model, batch), NextTokenConfig().build()(model, kept)
    assert torch.equal(ours.loss, theirs.loss) and int(ours.count) == int(mask_bt.sum())
    with torch.no_grad():
        held = objective(model, batch)
    torch.testing.assert_close(held.loss, ours.loss.detach())
    assert held.correct_bt is not None


def test_its_tokens_have_no_default() -> None:
    with pytest.raises(ValueError, match="fim_token"):
        FillInTheMiddleObjectiveConfig()  # type: ignore[call-arg]
