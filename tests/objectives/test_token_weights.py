"""The pipeline of token weights: every step against its definition, masks, ties, rows of zeros, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchstone.errors import DataError
from torchstone.objectives.token_weights import PRESETS, TokenWeights

ROWS, LENGTH = 3, 12


def losses(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(ROWS, LENGTH, generator=generator) * 6 for _ in range(2))  # type: ignore[return-value]


def by_hand(settings: TokenWeights, long: list[float], base: list[float]) -> list[float]:
    """One row, in Python's floats."""
    if settings.compare == "quotient":
        w = [(a + 1e-5) / (b + 1e-5) for a, b in zip(long, base, strict=True)]
    else:
        w = [a - b for a, b in zip(long, base, strict=True)]
    for step in settings.transforms:
        w = {
            "minus": lambda w: [-x for x in w],
            "abs": lambda w: [abs(x) for x in w],
            "exp": lambda w: [math.exp(x) for x in w],
            "max": lambda w: [max(x, 0.0) for x in w],
        }.get(step if isinstance(step, str) else "", lambda w, c=step: [x - math.log(c.shift) for x in w])(w)
    if settings.truncate is not None:
        w = [min(x, settings.truncate) for x in w]
    if settings.sparsify is not None:
        kept = sorted(range(len(w)), key=lambda i: (-w[i], i))[: int(settings.sparsify * len(w))]
        w = [float(i in kept) for i in range(len(w))]
    if settings.normalise == "l1":
        w = [1.0] * len(w) if not any(w) else w
        w = [abs(x) / sum(map(abs, w)) * len(w) for x in w]
    elif settings.normalise == "softmax":
        top = max(w)
        e = [math.exp(x - top) for x in w]
        w = [x / sum(e) * len(w) for x in e]
    if settings.interpolate is not None:
        w = [settings.interpolate + (1 - settings.interpolate) * x for x in w]
    return w


PIPELINES = {
    **PRESETS,
    "quotient": TokenWeights(compare="quotient", transforms=("minus",), normalise="softmax", interpolate=0.25),
    "signed": TokenWeights(normalise="l1"),
    "truncated": TokenWeights(transforms=("minus", {"shift": 0.5}), truncate=0.3),
    "tied": TokenWeights(transforms=("abs",), truncate=1.0, sparsify=0.5),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_is_its_definition(name):
    settings = PIPELINES[name]
    long_bt, base_bt = losses()
    found_bt = settings.weights(long_bt, base_bt)
    rows = (
        [(long_bt.flatten(), base_bt.flatten())]
        if settings.over == "batch"
        else list(zip(long_bt, base_bt, strict=True))
    )
    expected = [by_hand(settings, a.tolist(), b.tolist()) for a, b in rows]
    torch.testing.assert_close(found_bt, torch.tensor(expected).view(ROWS, LENGTH), rtol=1e-5, atol=1e-6)
    assert found_bt.dtype == torch.float32 and not found_bt.requires_grad


@pytest.mark.parametrize("name", PIPELINES)
def test_a_mask_leaves_tokens_out_as_if_they_were_not_there(name):
    settings = PIPELINES[name].model_copy(update={"over": "row"})
    long_bt, base_bt = losses(1)
    valid_bt = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.7
    valid_bt[1] = False
    poisoned = [one.masked_fill(~valid_bt, torch.nan) for one in (long_bt, base_bt)]
    found_bt = settings.weights(*poisoned, valid_bt)
    assert not found_bt[~valid_bt].any()
    for row in (0, 2):
        kept = valid_bt[row]
        torch.testing.assert_close(found_bt[row][kept], settings.weights(long_bt[row][kept], base_bt[row][kept]))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=24), st.floats(0.05, 1))
def test_ties_go_to_the_lowest_index(values, share):
    long_t = torch.tensor(values, dtype=torch.float32)
    found = TokenWeights(sparsify=share).weights(long_t, torch.zeros_like(long_t)).tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert [i for i, weight in enumerate(found) if weight] == sorted(order[: int(share * len(values))])


@given(st.integers(0, 10_000))
def test_normalised_weights_have_the_mean_one(seed):
    for name in ("dense", "sparse", "ppmi", "slm", "quotient"):
        assert PIPELINES[name].weights(*losses(seed)).mean() == pytest.approx(1, rel=1e-5)


def test_a_row_of_zeros_becomes_uniform():
    long_bt, _ = losses()
    assert torch.equal(PRESETS["dense"].weights(long_bt, long_bt), torch.ones_like(long_bt))
    ppmi = PRESETS["ppmi"].weights(long_bt, long_bt)  # −ln 1.5 everywhere, cut at 0
    assert torch.equal(ppmi, torch.ones_like(long_bt))


def test_a_share_that_rounds_to_no_token_is_uniform_under_l1_and_nothing_without():
    long_bt, base_bt = losses()
    short = slice(0, 3)  # int(0.2 · 3) = 0
    assert torch.equal(PRESETS["sparse"].weights(long_bt[:, short], base_bt[:, short]), torch.ones(ROWS, 3))
    assert not TokenWeights(sparsify=0.2).weights(long_bt[:, short], base_bt[:, short]).any()


def test_selection_over_the_batch_may_leave_a_row_out():
    base_bt = torch.zeros(2, 5)
    long_bt = torch.tensor([[9.0, 8, 7, 6, 5], [1.0, 1, 1, 1, 1]])
    weights_bt = PRESETS["slm"].weights(long_bt, base_bt)
    assert (weights_bt > 0).tolist() == [[True] * 5, [True] + [False] * 4]
    assert weights_bt.max() == pytest.approx(10 / 6)


def test_an_infinite_difference_is_cut_and_an_overflow_named():
    long_bt = torch.tensor([[0.0, 1.0]])
    base_bt = torch.tensor([[200.0, 1.0]])
    assert PRESETS["longce"].weights(long_bt, base_bt).tolist() == [[5.0, 1.0]]
    with pytest.raises(
        DataError, match=r"the weight of the token at \(row 0, position 0\) is inf, from losses of 0 and 200"
    ):
        TokenWeights(transforms=("minus", "exp")).weights(long_bt, base_bt)


def test_a_loss_that_is_no_number_is_named():
    long_bt, base_bt = losses()
    base_bt[2, 7] = torch.nan
    with pytest.raises(DataError, match=r"\(row 2, position 7\) is nan: its losses are .* and nan"):
        PRESETS["dense"].weights(long_bt, base_bt)


def test_shapes_that_differ_are_refused():
    long_bt, base_bt = losses()
    with pytest.raises(DataError, match=r"shapes \[3, 12\], \[3, 11\]"):
        PRESETS["dense"].weights(long_bt, base_bt[:, 1:])


def test_no_rows_have_no_weights():
    assert PRESETS["slm"].weights(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolate": 0.5}, "set normalise to l1 or softmax"),
        ({"normalise": "l1", "interpolate": 1.5}, "less than or equal to 1"),
        ({"sparsify": 0.0}, "greater than 0"),
        ({"sparsify": 1.2}, "less than or equal to 1"),
        ({"transforms": ["square"]}, "'minus', 'abs', 'exp' or 'max'"),
        ({"transforms": [{"shift": 0.0}]}, "greater than 0"),
        ({"compare": "ratio"}, "'difference' or 'quotient'"),
        ({"kappa": 0.2}, "Extra inputs are not permitted"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TokenWeights.model_validate(settings)


def test_settings_are_plain_data_and_back():
    for preset in PRESETS.values():
        assert TokenWeights.model_validate(preset.model_dump(mode="json")) == preset
