"""Chunked cross-entropy is plain cross-entropy: losses, gradients, ignored targets, tied heads, autocast, compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchstone.data.batch import IGNORE, Batch
from torchstone.models.decoder import DecoderOutput
from torchstone.nn.heads.linear import LinearHead
from torchstone.objectives.next_token import (
    CHUNK_LOGITS,
    LEAST_TOKENS,
    NextTokenConfig,
    chunk_size,
    chunked_cross_entropy,
    chunked_scores,
)

WIDTH, VOCAB = 16, 37


def inputs(tokens: int = 50, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden_nd = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight_vd = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets_n = torch.randint(VOCAB, (tokens,), generator=generator)
    targets_n[::7] = IGNORE
    return hidden_nd, weight_vd, targets_n


def plain(hidden_nd, weight_vd, targets_n):
    losses_n = F.cross_entropy(F.linear(hidden_nd, weight_vd).float(), targets_n, ignore_index=IGNORE, reduction="none")
    return losses_n.sum(), losses_n


@pytest.mark.parametrize("chunk", [1, 7, 50, 64, None])
def test_losses_and_gradients_equal_plain_cross_entropy(chunk):
    hidden_nd, weight_vd, targets_n = inputs()
    expected, expected_n = plain(hidden_nd, weight_vd, targets_n)
    wanted = torch.autograd.grad(3.0 * expected, [hidden_nd, weight_vd])
    loss, losses_n = chunked_cross_entropy(hidden_nd, weight_vd, targets_n, chunk)
    found = torch.autograd.grad(3.0 * loss, [hidden_nd, weight_vd])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(losses_n, expected_n, rtol=1e-6, atol=2e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    assert not losses_n.requires_grad
    assert (losses_n[targets_n == IGNORE] == 0).all()


def test_gradient_of_a_function_of_the_loss_agrees_with_finite_differences():
    hidden_nd, weight_vd, targets_n = (tensor[:6] if tensor.shape[0] == 50 else tensor for tensor in inputs(50))
    hidden_nd, weight_vd = hidden_nd.detach().double(), weight_vd.detach().double()

    def value(hidden, weight):
        return float(chunked_cross_entropy(hidden, weight, targets_n, 4)[0])

    leaf = hidden_nd.clone().requires_grad_()
    chunked_cross_entropy(leaf, weight_vd, targets_n, 4)[0].backward()
    for row, column in ((1, 0), (5, 3)):
        step = torch.zeros_like(hidden_nd)
        step[row, column] = 1e-2
        slope = (value(hidden_nd + step, weight_vd) - value(hidden_nd - step, weight_vd)) / 2e-2
        assert float(leaf.grad[row, column]) == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_under_autocast_it_stays_within_bf16_of_the_exact_loss():
    hidden_nd, weight_vd, targets_n = inputs(200)
    exact, exact_n = plain(hidden_nd, weight_vd, targets_n)
    wanted = torch.autograd.grad(exact, [hidden_nd, weight_vd])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, losses_n = chunked_cross_entropy(hidden_nd, weight_vd, targets_n, 32)
    found = torch.autograd.grad(loss, [hidden_nd, weight_vd])
    assert losses_n.dtype == torch.float32 and loss.dtype == torch.float32
    torch.testing.assert_close(losses_n, exact_n, rtol=2e-2, atol=5e-2)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


def test_all_targets_ignored_gives_zero_loss_and_zero_gradients():
    hidden_nd, weight_vd, targets_n = inputs()
    loss, _ = chunked_cross_entropy(hidden_nd, weight_vd, torch.full_like(targets_n, IGNORE), 8)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not hidden_nd.grad.any() and not weight_vd.grad.any()


def test_huge_logits_neither_overflow_nor_lose_the_loss():
    hidden_nd, weight_vd, targets_n = inputs()
    loss, losses_n = chunked_cross_entropy(hidden_nd * 1e4, weight_vd, targets_n, 16)
    assert torch.isfinite(losses_n).all() and float(losses_n.detach().max()) > 1e4


@pytest.mark.parametrize("chunk", [10, 2])
def test_compiled_gives_the_same_loss_and_gradients(chunk):
    """A few chunks are traced, many run outside the graph."""
    hidden_nd, weight_vd, targets_n = inputs(40)

    @torch.compile(backend="aot_eager")
    def compiled(hidden, weight):
        return chunked_cross_entropy(torch.tanh(hidden), weight, targets_n, chunk)[0]

    expected, _ = plain(torch.tanh(hidden_nd), weight_vd, targets_n)
    wanted = torch.autograd.grad(expected, [hidden_nd, weight_vd])
    loss = compiled(hidden_nd, weight_vd)
    found = torch.autograd.grad(loss, [hidden_nd, weight_vd])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_scores_say_whether_the_target_is_the_most_likely_token():
    hidden_nd, weight_vd, targets_n = inputs()
    losses_n, correct_n = chunked_scores(hidden_nd, weight_vd, targets_n, 8)
    logits_nv = F.linear(hidden_nd, weight_vd)
    torch.testing.assert_close(losses_n, plain(hidden_nd, weight_vd, targets_n)[1], rtol=1e-6, atol=2e-6)
    assert torch.equal(correct_n, logits_nv.argmax(-1) == targets_n)
    assert not correct_n[targets_n == IGNORE].any()


def test_default_chunk_bounds_the_logits():
    assert chunk_size(torch.empty(4096, 1)) == CHUNK_LOGITS["cpu"] // 4096
    assert chunk_size(torch.empty(10**7, 1, device="meta")) == LEAST_TOKENS


class Tied(nn.Module):
    """An embedding that is also the head: the smallest thing that looks like a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embed.weight, generator=torch.Generator().manual_seed(3))
        self.head = LinearHead(WIDTH, self.embed, tied=True)

    def forward(self, tokens_bt, span):
        return DecoderOutput(self.embed(tokens_bt), None)


def batch(rows: int = 3, length: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(5)
    tokens_bt = torch.randint(VOCAB, (rows, length + 1), generator=generator)
    targets_bt = tokens_bt[:, 1:].clone()
    targets_bt[0, :4] = IGNORE
    return Batch(tokens_bt[:, :-1], targets_bt)


def test_objective_sums_over_valid_targets_and_trains_a_tied_head():
    model, given = Tied(), batch()
    output = NextTokenConfig(chunk=5).build()(model, given)
    logits_btv = F.linear(model.embed(given.tokens_bt), model.embed.weight)
    expected = F.cross_entropy(logits_btv.flatten(0, 1), given.targets_bt.flatten(), ignore_index=IGNORE)
    assert int(output.count) == given.targets_bt.numel() - 4
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-6)
    assert output.per_token_bt.shape == given.targets_bt.shape and output.correct_bt is None
    (wanted,) = torch.autograd.grad(expected, [model.embed.weight])
    (found,) = torch.autograd.grad(output.loss, [model.embed.weight])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_without_gradients_the_same_loss_comes_with_accuracy():
    model, given = Tied(), batch()
    objective = NextTokenConfig().build()
    with torch.no_grad():
        scored = objective(model, given)
    torch.testing.assert_close(scored.loss, objective(model, given).loss.detach(), rtol=1e-6, atol=1e-6)
    assert scored.correct_bt is not None and scored.correct_bt.dtype == torch.bool
