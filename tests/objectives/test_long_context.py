"""LongCE in training: windows over batches and documents, micro-batches, normalisation, cost, and bad settings."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.objectives.long_context import LongContextConfig, long_context_weights
from torchstone.objectives.long_context_windows import window_groups, window_starts, windowed
from torchstone.objectives.next_token import NextTokenConfig
from torchstone.objectives.token_weights import TokenWeights
from torchstone.recipe.load import load_recipe
from torchstone.train.budget import counts_of

WINDOW = {"trunc_len": 6, "stride": 3}


def decoder(seed: int = 0) -> Decoder:
    part = {"width": 16, "depth": 2, "head_dim": 8, "initialisation": {"kind": "normal", "std": 0.3}}
    return DecoderConfig.model_validate(part).build(11, 24, seed)


def batch_of(rows: int = 3, length: int = 24, seed: int = 0) -> Batch:
    ids = torch.randint(0, 11, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def logits_of(model: Decoder) -> Any:
    return lambda tokens_bt: model.logits(model(tokens_bt).hidden_btd)


@given(length=st.integers(1, 60), trunc_len=st.integers(1, 30), stride=st.integers(1, 20))
def test_windows_score_every_target_once(length: int, trunc_len: int, stride: int) -> None:
    official = []
    for start in range(0, max(0, length - trunc_len), stride):
        end = min(start + trunc_len + stride, length)
        official.append((start, end - start, end - start - trunc_len))
    groups = window_groups(length, trunc_len, stride)
    assert [(start, width, targets) for starts, width, targets in groups for start in starts] == official
    assert sum(targets for _, _, targets in official) == max(0, length - trunc_len)
    assert list(window_starts(length, trunc_len, stride)) == [start for start, _, _ in official]


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 24), trunc_len=st.integers(1, 20), stride=st.integers(1, 9), at_once=st.integers(1, 60))
def test_the_objective_weighs_as_the_function_for_own_loops(
    length: int, trunc_len: int, stride: int, at_once: int
) -> None:
    model, batch = decoder(), batch_of(2, length)
    ids_bt = torch.cat([batch.tokens_bt, batch.targets_bt[:, -1:]], dim=1)
    expected = long_context_weights(logits_of(model), ids_bt, trunc_len=trunc_len, stride=stride)
    found = LongContextConfig(trunc_len=trunc_len, stride=stride).build()(model, batch).weights_bt
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    seen: list[int] = []
    windowed(
        ids_bt, trunc_len, stride, lambda w, n: (seen.append(w.numel()), w[:, -n:].float())[1],
        length=length + 1, at_once=at_once,
    )  # fmt: skip
    assert all(size <= max(at_once, trunc_len + stride) for size in seen)


def test_the_loss_is_the_weighted_sum_over_all_targets() -> None:
    model, batch = decoder(), batch_of()
    targets_bt = batch.targets_bt.clone()
    targets_bt[0, 10:14] = IGNORE
    batch = replace(batch, targets_bt=targets_bt)
    found = LongContextConfig(**WINDOW).build()(model, batch)
    with torch.no_grad():
        plain = NextTokenConfig().build()(model, batch)
    assert found.weights_bt is not None and not found.weights_bt.requires_grad
    assert int(found.count) == 3 * 24 - 4
    assert bool((found.weights_bt[:, :5] == 1).all())
    assert bool((found.weights_bt[0, 10:14] == 0).all())
    assert float(found.weights_bt.max()) <= 5.0
    torch.testing.assert_close(found.loss_sum, (found.weights_bt * plain.per_token_bt).sum(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.per_token_bt, plain.per_token_bt)


def test_gradients_are_those_of_fixed_weights() -> None:
    model, batch = decoder(), batch_of()
    objective = LongContextConfig(**WINDOW).build()
    objective(model, batch).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    weights_bt = objective(model, batch).weights_bt
    model.zero_grad()
    logits_btv = logits_of(model)(batch.tokens_bt)
    losses = torch.nn.functional.cross_entropy(logits_btv.flatten(0, 1), batch.targets_bt.flatten(), reduction="none")
    (weights_bt.flatten() * losses).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_evaluation_is_plain_cross_entropy() -> None:
    model, batch = decoder(), batch_of()
    with torch.no_grad():
        found, plain = LongContextConfig(**WINDOW).build()(model, batch), NextTokenConfig().build()(model, batch)
    assert torch.equal(found.loss_sum, plain.loss_sum) and found.weights_bt is None


def test_rows_that_no_window_scores_are_plain() -> None:
    model, batch = decoder(), batch_of(length=5)
    found = LongContextConfig(trunc_len=6, stride=3).build()(model, batch)
    plain = NextTokenConfig().build()(model, batch)
    assert torch.equal(found.loss_sum, plain.loss_sum)


def test_masked_documents_see_in_windows_what_they_see_in_rows() -> None:
    model = decoder()
    batch = batch_of(1)
    documents_bt = torch.tensor([[0] * 14 + [1] * 10])
    positions_bt = torch.cat([torch.arange(14), torch.arange(10)])[None]
    packed = replace(batch, documents_bt=documents_bt, positions_bt=positions_bt)
    objective = LongContextConfig(**WINDOW).build()
    found = objective(model, packed).weights_bt
    assert found is not None
    # the second document begins inside the window of its first targets: as much context in both passes
    torch.testing.assert_close(found[0, 14:17], torch.ones(3), atol=1e-4, rtol=0)
    changed = packed.tokens_bt.clone()
    changed[0, :13] = (changed[0, :13] + 1) % 11
    other = objective(model, replace(packed, tokens_bt=changed)).weights_bt
    assert other is not None
    torch.testing.assert_close(found[0, 14:], other[0, 14:], atol=1e-4, rtol=0)  # nothing of the first reaches it
    assert not torch.allclose(found[0, 6:13], other[0, 6:13])


def test_gamma_bounds_and_null_does_not() -> None:
    model, batch = decoder(), batch_of()
    free = LongContextConfig(**WINDOW, gamma=None).build()(model, batch).weights_bt
    bounded = LongContextConfig(**WINDOW, gamma=1.2).build()(model, batch).weights_bt
    assert free is not None and bounded is not None
    assert float(free.max()) > 1.2
    torch.testing.assert_close(bounded, free.clamp(max=1.2))


def test_other_pipelines_weigh_the_scored_tokens() -> None:
    model, batch = decoder(), batch_of()
    sparse = LongContextConfig(**WINDOW, weights="sparse").build()(model, batch).weights_bt
    assert sparse is not None
    assert bool(((sparse[:, 5:] > 0).sum(1) == int(0.2 * 19)).all())
    own = TokenWeights(transforms=("minus", "exp"), truncate=5.0)
    first = LongContextConfig(**WINDOW, weights=own).build()(model, batch).weights_bt
    assert torch.equal(first, LongContextConfig(**WINDOW).build()(model, batch).weights_bt)


def test_normalised_weights_have_mean_one_over_the_global_batch() -> None:
    model, batch = decoder(), batch_of(4)
    objective = LongContextConfig(**WINDOW, normalize=True).build()
    whole = objective(model, batch)
    assert whole.weights_bt is not None
    assert float(whole.weights_bt.mean()) == pytest.approx(1.0, abs=1e-6)
    plain = LongContextConfig(**WINDOW).build()(model, batch)
    assert plain.weights_bt is not None
    torch.testing.assert_close(whole.loss, plain.loss_sum / plain.weights_bt.sum())
    with torch.no_grad():
        pieces = objective.plan(model, batch.split(1), nullcontext)
    planned = torch.cat([piece.weights_bt for piece in pieces])
    torch.testing.assert_close(planned, whole.weights_bt, atol=1e-5, rtol=1e-5)
    sums = [objective(model, piece).loss_sum for piece in pieces]
    torch.testing.assert_close(sum(sums), whole.loss_sum, atol=1e-4, rtol=1e-5)


def test_normalisation_counts_all_ranks() -> None:
    class World:
        """Another rank that has as many targets, of twice the weight."""

        def total(self, sums: Tensor) -> None:
            sums += sums * torch.tensor([1.0, 2.0], dtype=sums.dtype)

    objective = LongContextConfig(**WINDOW, normalize=True).build()
    objective.join(World())
    found = objective(decoder(), batch_of()).weights_bt
    assert float(found.mean()) == pytest.approx(2 / 3, abs=1e-5)


def test_a_scorer_gives_the_short_losses() -> None:
    model, other, batch = decoder(0), decoder(1), batch_of()
    objective = LongContextConfig(**WINDOW, scorer="runs/small").build()
    assert objective.reference_run == "runs/small"
    objective.attach_reference(other)
    assert not list(objective.parameters())
    found = objective(model, batch).weights_bt
    short_bs = LongContextConfig(**WINDOW).build().short_losses(other, batch)
    with torch.no_grad():
        long_bt = NextTokenConfig().build()(model, batch).per_token_bt
    torch.testing.assert_close(found[:, 5:], (short_bs - long_bt[:, 5:]).exp().clamp(max=5.0), atol=1e-5, rtol=1e-4)


def test_a_step_tells_mean_weight_and_shares() -> None:
    model, batch = decoder(), batch_of()
    objective = LongContextConfig(**WINDOW, gamma=1.1).build()
    weights_bt = objective(model, batch).weights_bt
    found = objective.step_metrics(lambda sums: None)
    assert found["mean_weight"] == pytest.approx(float(weights_bt.mean()), abs=1e-6)
    assert found["share_below_one"] == pytest.approx(float((weights_bt < 1).double().mean()))
    assert found["share_at_bound"] == pytest.approx(float((weights_bt >= 1.1).double().mean()))
    assert found["share_at_bound"] > 0
    assert objective.step_metrics(lambda sums: None) == {}


def test_cost_counts_windows_as_forward_passes() -> None:
    model = decoder()
    objective = LongContextConfig(**WINDOW).build()
    inputs = 6 * 8 + 7  # ids 25: six windows of 9 ids and one of 7
    assert [len(starts) * (width - 1) for starts, width, _ in window_groups(25, 6, 3)] == [48, 6]
    trunk = sum(
        len(starts) * (width - 1) * model.stack_flops(width - 1) for starts, width, _ in window_groups(25, 6, 3)
    )
    extra = trunk + 2 * 19 * model.head.flops()
    assert inputs > 24
    assert objective.flops(model, 24) == pytest.approx(model.flops(24) + extra / (3 * 24))
    with pytest.raises(ConfigError, match="rows have 5 tokens and objective.trunc_len is 6"):
        objective.flops(model, 5)


def test_recipes_know_the_cost_and_refuse_short_rows() -> None:
    base = {
        "model": {"kind": "decoder", "width": 32, "depth": 2, "head_dim": 16},
        "data": {"kind": "far-tag", "length": 64, "every": 16},
        "objective": {"kind": "long-context", "trunc_len": 16, "stride": 16},
        "budget": {"steps": 1},
    }
    plain = counts_of(load_recipe({**base, "objective": {"kind": "next-token"}})).training_flops_per_token
    assert 1.2 < counts_of(load_recipe(base)).training_flops_per_token / plain < 1.8
    with pytest.raises(ConfigError, match="objective.trunc_len below 64"):
        counts_of(load_recipe(base, ["objective.trunc_len=65"]))


def test_settings_that_cannot_be_honoured() -> None:
    with pytest.raises(ValidationError, match="gamma is 2.0 and bounds the weights of longce only"):
        LongContextConfig(weights="dense", gamma=2.0)
    for name in ("trunc_len", "stride", "gamma"):
        with pytest.raises(ValidationError):
            LongContextConfig(**{name: 0})
    with pytest.raises(ConfigError, match="stride was given as 0"):
        long_context_weights(lambda x: x, torch.zeros(1, 9, dtype=torch.long), trunc_len=4, stride=0)
    with pytest.raises(ConfigError, match="at least two ids"):
        long_context_weights(lambda x: x, torch.zeros(1, 1, dtype=torch.long))


def test_the_windows_do_not_change_the_model_or_its_mode() -> None:
    model, batch = decoder().train(), batch_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    LongContextConfig(**WINDOW).build()(model, batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(modes) and model.training and len(modes) > 1


def test_weights_decided_beforehand_are_used() -> None:
    model, batch = decoder(), batch_of()
    weights_bt = torch.rand(batch.tokens_bt.shape) + 0.5
    broken = SimpleNamespace()  # short losses would need a model
    objective = LongContextConfig(**WINDOW).build()
    objective.attach_reference(broken)
    found = objective(model, replace(batch, weights_bt=weights_bt))
    assert torch.equal(found.weights_bt, weights_bt)
