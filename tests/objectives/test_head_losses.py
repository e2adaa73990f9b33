"""The chunked loss of every head is plain cross-entropy of its logits: losses, gradients, accuracy, autocast, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchstone.data.batch import IGNORE
from torchstone.nn.context import BuildContext
from torchstone.nn.embedding import TokenEmbedding
from torchstone.nn.heads.base import Head
from torchstone.objectives.next_token import NextToken, head_cross_entropy, head_scores
from torchstone.recipe.registry import parse_part

WIDTH, VOCAB, TOKENS = 12, 29, 40
HEADS: list[dict[str, Any]] = [
    {"kind": "linear", "tied": True},
    {"kind": "linear", "tied": False, "soft_cap": 2.0},
    {"kind": "factored", "rank": 4},
    {"kind": "factored", "rank": 12, "soft_cap": 1.0},
    {"kind": "mixture-of-softmaxes", "components": 1},
    {"kind": "mixture-of-softmaxes", "components": 5, "tied": False},
]
EVERY_HEAD = pytest.mark.parametrize("part", HEADS, ids=str)


def head_of(part: dict[str, Any]) -> tuple[Head, nn.Module]:
    generator = torch.Generator().manual_seed(0)
    embedding = TokenEmbedding(VOCAB, WIDTH)
    context = BuildContext(WIDTH, 4, 1, 0, VOCAB, 8)
    head = parse_part("head", part).build(context, embedding)  # type: ignore[attr-defined]
    for parameter in [*head.parameters(), embedding.weight]:
        parameter.data.normal_(0, 0.7, generator=generator)
    return head, embedding


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_nd = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    targets_n = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets_n[::7] = IGNORE
    return hidden_nd, targets_n


def plain(head: Head, hidden_nd: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    losses_n = F.cross_entropy(head.logits(hidden_nd).float(), targets_n, ignore_index=IGNORE, reduction="none")
    return losses_n.sum(), losses_n


def leaves(head: Head, embedding: nn.Module, hidden_nd: Tensor) -> list[Tensor]:
    return [hidden_nd, *head.parameters(), *([embedding.weight] if head.tied else [])]


@EVERY_HEAD
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_losses_and_gradients(part: dict[str, Any], chunk: int | None) -> None:
    head, embedding = head_of(part)
    hidden_nd, targets_n = inputs()
    expected, expected_n = plain(head, hidden_nd, targets_n)
    wanted = torch.autograd.grad(3.0 * expected, leaves(head, embedding, hidden_nd))
    loss, losses_n = head_cross_entropy(head, hidden_nd, targets_n, chunk)
    found = torch.autograd.grad(3.0 * loss, leaves(head, embedding, hidden_nd))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(losses_n, expected_n, rtol=1e-5, atol=5e-6)
    assert not losses_n.requires_grad
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@EVERY_HEAD
def test_scores(part: dict[str, Any]) -> None:
    head, _ = head_of(part)
    hidden_nd, targets_n = inputs()
    losses_n, correct_n = head_scores(head, hidden_nd, targets_n, 7)
    torch.testing.assert_close(losses_n, plain(head, hidden_nd, targets_n)[1].detach(), rtol=1e-5, atol=5e-6)
    assert torch.equal(correct_n, head.logits(hidden_nd).argmax(-1) == targets_n)


@EVERY_HEAD
def test_bf16_stays_near_the_exact_loss(part: dict[str, Any]) -> None:
    head, _ = head_of(part)
    hidden_nd, targets_n = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, losses_n = head_cross_entropy(head, hidden_nd, targets_n, 16)
    loss.backward()
    assert losses_n.dtype == torch.float32 and hidden_nd.grad is not None and hidden_nd.grad.dtype == torch.float32
    torch.testing.assert_close(losses_n, plain(head, hidden_nd, targets_n)[1], rtol=3e-2, atol=0.15)


@EVERY_HEAD
@pytest.mark.parametrize("chunk", [20, 2])
def test_compiled(part: dict[str, Any], chunk: int) -> None:
    """A few chunks are traced, many run outside the graph."""
    head, _ = head_of(part)
    hidden_nd, targets_n = inputs()
    objective = NextToken(chunk)
    objective.before_compile()

    @torch.compile(backend="aot_eager")
    def compiled(hidden_nd: Tensor) -> Tensor:
        return head_cross_entropy(head, hidden_nd, targets_n, chunk, objective._untraced)[0]

    expected, _ = plain(head, hidden_nd, targets_n)
    (wanted,) = torch.autograd.grad(expected, [hidden_nd])
    loss = compiled(hidden_nd)
    (found,) = torch.autograd.grad(loss, [hidden_nd])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_no_target_gives_zero_gradients() -> None:
    head, _ = head_of(HEADS[-1])
    hidden_nd, targets_n = inputs()
    loss, _ = head_cross_entropy(head, hidden_nd, torch.full_like(targets_n, IGNORE), 8)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden_nd.grad is not None and not hidden_nd.grad.any()
    assert not any(parameter.grad.any() for parameter in head.parameters() if parameter.grad is not None)


def test_a_component_without_share_does_not_make_nans() -> None:
    head, _ = head_of({"kind": "mixture-of-softmaxes", "components": 2, "tied": False})
    hidden_nd, targets_n = inputs()
    with torch.no_grad():
        head.w_prior.weight.mul_(1e4)
    loss, losses_n = head_cross_entropy(head, hidden_nd, targets_n, 8)
    loss.backward()
    assert losses_n.isfinite().all() and hidden_nd.grad is not None and hidden_nd.grad.isfinite().all()


WEIGHTS = torch.tensor([0.0, 1.0, 0.25, 2.0, 0.0]).repeat(TOKENS // 5)


@EVERY_HEAD
@pytest.mark.parametrize("chunk", [None, 7])
def test_weights_multiply_losses_and_gradients(part: dict[str, Any], chunk: int | None) -> None:
    head, embedding = head_of(part)
    hidden_nd, targets_n = inputs()
    found, losses_n = head_cross_entropy(head, hidden_nd, targets_n, chunk, weights_n=WEIGHTS)
    _, expected_n = plain(head, hidden_nd, targets_n)
    torch.testing.assert_close(found, (expected_n * WEIGHTS).sum())
    torch.testing.assert_close(losses_n, torch.where(WEIGHTS == 0, 0.0, expected_n.detach()))
    given = leaves(head, embedding, hidden_nd)
    ours = torch.autograd.grad(found, given)
    theirs = torch.autograd.grad((expected_n * WEIGHTS).sum(), given)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@EVERY_HEAD
def test_weights_of_one_change_no_bit(part: dict[str, Any]) -> None:
    head, embedding = head_of(part)
    hidden_nd, targets_n = inputs()
    found = {}
    for name, weights_n in (("plain", None), ("ones", torch.ones(TOKENS))):
        loss_sum, losses_n = head_cross_entropy(head, hidden_nd, targets_n, 7, weights_n=weights_n)
        found[name] = [loss_sum, losses_n, *torch.autograd.grad(loss_sum, leaves(head, embedding, hidden_nd))]
    assert all(torch.equal(one, other) for one, other in zip(found["plain"], found["ones"], strict=True))


@EVERY_HEAD
def test_no_weight_at_all_is_a_loss_of_zero_with_a_gradient(part: dict[str, Any]) -> None:
    head, _ = head_of(part)
    hidden_nd, targets_n = inputs()
    loss_sum, losses_n = head_cross_entropy(head, hidden_nd, targets_n, weights_n=torch.zeros(TOKENS))
    (gradient_nd,) = torch.autograd.grad(loss_sum, hidden_nd)
    assert loss_sum.item() == 0 and not losses_n.any() and not gradient_nd.any()
