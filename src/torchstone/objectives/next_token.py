"""Next-token cross-entropy in chunks, so that the logits of all tokens never exist at once.

    loss = Σ_i w_i · (logsumexp(W h_i) − (W h_i)[y_i]),   w_i = 1 where there is a target, else 0

With 32k tokens of vocabulary and 8k tokens in a batch, fp32 logits and their gradient take 2 GB, more than the rest of a
small model's step. Here each chunk's logits are made, reduced to losses and to gradients of `h` and `W`, and dropped; the
backward pass only scales what the forward pass left (the gradient of a sum of losses with respect to the logits is
softmax − one-hot, whatever comes later, up to a factor).

Any head works (`torchstone.nn.heads.base`): W multiplies the head's features instead of h, a soft cap multiplies the
gradient by its slope, and a mixture has its own function in `mixture_cross_entropy`.

Shapes: n tokens (batch and time flattened) · c tokens of a chunk · d width · v vocabulary.

Pitfall: the matrix products run in autocast's type, losses, sums and softmax in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torchstone.data.batch import IGNORE, Batch
from torchstone.nn.heads.base import Features, Head, capped, logits_of
from torchstone.nn.span import Span
from torchstone.objectives.mixture_cross_entropy import MixtureCrossEntropy
from torchstone.recipe.part import Part

# On CPUs 4 MB of fp32 stay in a core's cache; the number for GPUs is not tuned yet.
CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 25}
LEAST_TOKENS = 128
MOST_COMPILED_CHUNKS = 16


@dataclass(frozen=True)
class LossOutput:
    """Loss of a batch.

    Attributes:
        loss_sum: scalar, differentiable: the sum over valid targets.
        count: scalar int64: what the sum is divided by, the valid targets unless an objective selects among them.
        per_token_bt: fp32, detached, unweighted; 0 where there is no target.
        correct_bt: bool, where the target is the most likely token; only without gradients, else None.
        auxiliary: scalar, differentiable: what layers add to the mean loss (load balance of experts); None if nothing.
        weights_bt: fp32, detached: the weight of each target in the sum; None: 1 each.
    """

    loss_sum: Tensor
    count: Tensor
    per_token_bt: Tensor
    correct_bt: Tensor | None = None
    auxiliary: Tensor | None = None
    weights_bt: Tensor | None = None

    @property
    def minimised(self) -> Tensor:
        """What training minimises: the sum of losses and, once per target, the auxiliary ones.

        Divided by the targets of the global batch this is the mean loss plus the auxiliary losses of all micro-batches, each
        weighted by its share of the targets.
        """
        return self.loss_sum if self.auxiliary is None else self.loss_sum + self.auxiliary * self.count

    @property
    def loss(self) -> Tensor:
        """Mean over valid targets; nan if there is none."""
        return self.loss_sum / self.count


class _ChunkedCrossEntropy(torch.autograd.Function):
    """(hidden_nd, weight_vd, targets_n) → (sum of losses, losses_n); see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nd: Tensor,
        weight_vd: Tensor,
        targets_n: Tensor,
        chunk: int,
        dtype: torch.dtype,
        soft_cap: float | None,
        weights_n: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        cast_nd, cast_vd = hidden_nd.to(dtype), weight_vd.to(dtype)
        # Results are written in place: what outlives a chunk must not lie between the large blocks that chunks free.
        losses_n = torch.empty_like(targets_n, dtype=torch.float32)
        grad_hidden_nd = torch.empty_like(hidden_nd)
        grad_weight_vd = torch.zeros_like(weight_vd, dtype=torch.float32)
        for start in range(0, hidden_nd.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_cd, targets_c = cast_nd[rows], targets_n[rows]
            valid_c, index_c1 = targets_c != IGNORE, targets_c.clamp(min=0).unsqueeze(1)
            logits_cv, slope_cv = _bounded(F.linear(hidden_cd, cast_vd).float(), soft_cap)
            log_p_cv = logits_cv.log_softmax(-1)
            del logits_cv  # frees a chunk of memory before the gradient needs it
            losses_n[rows] = torch.where(valid_c, -log_p_cv.gather(1, index_c1).squeeze(1), 0.0)
            minus_one_c1 = torch.full_like(index_c1, -1, dtype=torch.float32)
            scale_c = valid_c if weights_n is None else valid_c * weights_n[rows]
            grad_cv = log_p_cv.exp_().scatter_add_(1, index_c1, minus_one_c1).mul_(scale_c.unsqueeze(1))
            grad_cv = (grad_cv if slope_cv is None else grad_cv.mul_(slope_cv)).to(dtype)
            grad_hidden_nd[rows] = grad_cv @ cast_vd
            if dtype == torch.float32:
                grad_weight_vd.addmm_(grad_cv.t(), hidden_cd)
            else:
                grad_weight_vd += grad_cv.t() @ hidden_cd
        ctx.save_for_backward(grad_hidden_nd, grad_weight_vd.to(weight_vd.dtype))
        ctx.mark_non_differentiable(losses_n)
        return (losses_n if weights_n is None else losses_n * weights_n).sum(), losses_n

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_nd, grad_weight_vd = ctx.saved_tensors
        hidden_scale, weight_scale = grad_sum.to(grad_hidden_nd.dtype), grad_sum.to(grad_weight_vd.dtype)
        return grad_hidden_nd * hidden_scale, grad_weight_vd * weight_scale, None, None, None, None, None


def _bounded(logits_cv: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits under the cap, and the cap's slope there."""
    if soft_cap is None:
        return logits_cv, None
    logits_cv = capped(logits_cv, soft_cap)
    return logits_cv, 1 - (logits_cv / soft_cap).square()


def chunk_size(weight_vd: Tensor) -> int:
    """Tokens whose logits exist at once by default."""
    return max(LEAST_TOKENS, CHUNK_LOGITS.get(weight_vd.device.type, CHUNK_LOGITS["cpu"]) // weight_vd.shape[0])


Untraced = Mapping[type[torch.autograd.Function], Callable[..., tuple[Tensor, Tensor]]]


def chunked_cross_entropy(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    targets_n: Tensor,
    chunk: int | None = None,
    untraced: Untraced | None = None,
    soft_cap: float | None = None,
    weights_n: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies and each token's own, of logits `hidden @ weightᵀ`.

    Args:
        hidden_nd: hidden states.
        weight_vd: output matrix.
        targets_n: int64 token ids; IGNORE (-100) where there is no target.
        chunk: tokens at a time; None takes `chunk_size`.
        untraced: used in place of the traced function where there are many chunks, see `NextToken.before_compile`.
        soft_cap: bound of the logits, or None.
        weights_n: fp32, detached: factor of each token's loss in the sum; None: 1 each.

    Returns:
        the sum (differentiable, fp32) and losses [n] (detached, unweighted, fp32; 0 where there is no target).
    """
    size = chunk or chunk_size(weight_vd)
    apply = _function(_ChunkedCrossEntropy, -(-hidden_nd.shape[0] // size), untraced)
    return apply(hidden_nd, weight_vd, targets_n, size, _product_type(hidden_nd), soft_cap, weights_n)


def head_cross_entropy(
    head: Head,
    hidden_nd: Tensor,
    targets_n: Tensor,
    chunk: int | None = None,
    untraced: Untraced | None = None,
    weights_n: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for any head: `hidden_nd` are the states that the head takes, `chunk` counts tokens.

    With `weights_n`, tokens of weight 0 cost nothing: their logits are not computed, and their loss is given as 0.
    """
    if weights_n is not None and bool((kept_n := (weights_n != 0) | (targets_n == IGNORE)).logical_not().any()):
        chosen = kept_n.logical_and(targets_n != IGNORE).nonzero().squeeze(1)
        pieces = hidden_nd[chosen], targets_n[chosen]
        loss_sum, losses_c = head_cross_entropy(head, *pieces, chunk, untraced, weights_n[chosen])
        return loss_sum, torch.zeros_like(weights_n).index_copy_(0, chosen, losses_c)
    states, log_prior_nk = head.features(hidden_nd)
    if log_prior_nk is None:
        return chunked_cross_entropy(states, head.weight_vd, targets_n, chunk, untraced, head.soft_cap, weights_n)
    size = chunk or max(1, chunk_size(head.weight_vd) // log_prior_nk.shape[1])
    apply = _function(MixtureCrossEntropy, -(-hidden_nd.shape[0] // size), untraced)
    return apply(states, log_prior_nk, head.weight_vd, targets_n, size, _product_type(hidden_nd), weights_n)


def _function(
    function: type[torch.autograd.Function], chunks: int, untraced: Untraced | None
) -> Callable[..., tuple[Tensor, Tensor]]:
    return function.apply if untraced is None or chunks <= MOST_COMPILED_CHUNKS else untraced[function]


def _product_type(hidden_nd: Tensor) -> torch.dtype:
    """The type of matrix products: autocast's, where it is on."""
    device = hidden_nd.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_nd.dtype


@torch.no_grad()
def chunked_scores(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    targets_n: Tensor,
    chunk: int | None = None,
    log_prior_nk: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses [n] and whether each target is the most likely token [n]; arguments as in `chunked_cross_entropy`.

    With `log_prior_nk`, the first argument is [n, k, d]: a mixture.
    """
    components = 1 if log_prior_nk is None else log_prior_nk.shape[1]
    size = chunk or max(1, chunk_size(weight_vd) // components)
    losses, correct = [], []
    for start in range(0, hidden_nd.shape[0], size):
        rows = slice(start, start + size)
        features = Features(hidden_nd[rows], None if log_prior_nk is None else log_prior_nk[rows])
        logits_cv, targets_c = logits_of(features, weight_vd, soft_cap).float(), targets_n[rows]
        losses.append(F.cross_entropy(logits_cv, targets_c, ignore_index=IGNORE, reduction="none"))
        correct.append(logits_cv.argmax(-1) == targets_c)
    return torch.cat(losses), torch.cat(correct)


@torch.no_grad()
def head_scores(head: Head, hidden_nd: Tensor, targets_n: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """`chunked_scores` for any head."""
    states, log_prior_nk = head.features(hidden_nd)
    return chunked_scores(states, head.weight_vd, targets_n, chunk, log_prior_nk, head.soft_cap)


class NextToken(nn.Module):
    """The objective: mean cross-entropy of the next token, over all positions that have a target."""

    def __init__(self, chunk: int | None = None) -> None:
        super().__init__()
        self.chunk = chunk
        self._untraced: Untraced | None = None

    def before_compile(self) -> None:
        """Keep a loss of many chunks out of `torch.compile`, which would unroll them and take minutes."""
        functions = (_ChunkedCrossEntropy, MixtureCrossEntropy)
        self._untraced = {function: torch.compiler.disable(function.apply) for function in functions}

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        """Loss of `model` (a decoder) on a batch."""
        span = Span(positions_bt=batch.positions_bt, documents_bt=batch.documents_bt)
        hidden_btd, _, auxiliary = model(batch.tokens_bt, span)
        targets_bt = batch.targets_bt
        count = (targets_bt != IGNORE).sum()
        flat = model.head, hidden_btd.flatten(0, 1), targets_bt.flatten()
        if torch.is_grad_enabled():
            loss_sum, losses_n = head_cross_entropy(*flat, self.chunk, self._untraced)
            return LossOutput(loss_sum, count, losses_n.view(targets_bt.shape), auxiliary=auxiliary)
        losses_n, correct_n = head_scores(*flat, self.chunk)
        shape = targets_bt.shape
        return LossOutput(losses_n.sum(), count, losses_n.view(shape), correct_n.view(shape), auxiliary)


class NextTokenConfig(Part):
    """`objective: next-token`: predict every next token, cross-entropy in nats."""

    family: ClassVar[str] = "objective"
    kind: Literal["next-token"] = "next-token"
    chunk: int | None = Field(
        default=None, gt=0, description="tokens whose logits exist at once; null: about a million logits"
    )

    def build(self) -> NextToken:
        """The objective."""
        return NextToken(self.chunk)
