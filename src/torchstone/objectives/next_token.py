"""Next-token cross-entropy in chunks, so that the logits of all tokens never exist at once.

    loss = Σ_i w_i · (logsumexp(W h_i) − (W h_i)[y_i]),   w_i = 1 where there is a target, else 0

With 32k tokens of vocabulary and 8k tokens in a batch, fp32 logits and their gradient take 2 GB, more than the rest of a
small model's step. Here each chunk's logits are made, reduced to losses and to gradients of `h` and `W`, and dropped; the
backward pass only scales what the forward pass left (the gradient of a sum of losses with respect to the logits is
softmax − one-hot, whatever comes later, up to a factor).

Shapes: n tokens (batch and time flattened) · c tokens of a chunk · d width · v vocabulary.

Pitfall: the matrix products run in autocast's type, losses, sums and softmax in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torchstone.data.batch import IGNORE, Batch
from torchstone.nn.span import Span
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
        count: scalar int64: valid targets.
        per_token_bt: fp32, detached; 0 where there is no target.
        correct_bt: bool, where the target is the most likely token; only without gradients, else None.
    """

    loss_sum: Tensor
    count: Tensor
    per_token_bt: Tensor
    correct_bt: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Mean over valid targets; nan if there is none."""
        return self.loss_sum / self.count


class _ChunkedCrossEntropy(torch.autograd.Function):
    """(hidden_nd, weight_vd, targets_n) → (sum of losses, losses_n); see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, chunk: int, dtype: torch.dtype
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
            log_p_cv = F.linear(hidden_cd, cast_vd).float().log_softmax(-1)
            losses_n[rows] = torch.where(valid_c, -log_p_cv.gather(1, index_c1).squeeze(1), 0.0)
            minus_one_c1 = torch.full_like(index_c1, -1, dtype=torch.float32)
            grad_cv = log_p_cv.exp_().scatter_add_(1, index_c1, minus_one_c1).mul_(valid_c.unsqueeze(1)).to(dtype)
            grad_hidden_nd[rows] = grad_cv @ cast_vd
            if dtype == torch.float32:
                grad_weight_vd.addmm_(grad_cv.t(), hidden_cd)
            else:
                grad_weight_vd += grad_cv.t() @ hidden_cd
        ctx.save_for_backward(grad_hidden_nd, grad_weight_vd.to(weight_vd.dtype))
        ctx.mark_non_differentiable(losses_n)
        return losses_n.sum(), losses_n

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden_nd, grad_weight_vd = ctx.saved_tensors
        hidden_scale, weight_scale = grad_sum.to(grad_hidden_nd.dtype), grad_sum.to(grad_weight_vd.dtype)
        return grad_hidden_nd * hidden_scale, grad_weight_vd * weight_scale, None, None, None


def chunk_size(weight_vd: Tensor) -> int:
    """Tokens whose logits exist at once by default."""
    return max(LEAST_TOKENS, CHUNK_LOGITS.get(weight_vd.device.type, CHUNK_LOGITS["cpu"]) // weight_vd.shape[0])


def chunked_cross_entropy(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    targets_n: Tensor,
    chunk: int | None = None,
    untraced: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies and each token's own, of logits `hidden @ weightᵀ`.

    Args:
        hidden_nd: hidden states.
        weight_vd: output matrix.
        targets_n: int64 token ids; IGNORE (-100) where there is no target.
        chunk: tokens at a time; None takes `chunk_size`.
        untraced: used in place of the traced function where there are many chunks, see `NextToken.before_compile`.

    Returns:
        the sum (differentiable, fp32) and losses [n] (detached, fp32; 0 where there is no target).
    """
    device = hidden_nd.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_nd.dtype
    size = chunk or chunk_size(weight_vd)
    many = -(-hidden_nd.shape[0] // size) > MOST_COMPILED_CHUNKS
    apply = untraced if many and untraced is not None else _ChunkedCrossEntropy.apply
    return apply(hidden_nd, weight_vd, targets_n, size, dtype)


@torch.no_grad()
def chunked_scores(
    hidden_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Losses [n] and whether each target is the most likely token [n]; arguments as in `chunked_cross_entropy`."""
    size = chunk or chunk_size(weight_vd)
    losses, correct = [], []
    for hidden_cd, targets_c in zip(hidden_nd.split(size), targets_n.split(size), strict=True):
        logits_cv = F.linear(hidden_cd, weight_vd).float()
        losses.append(F.cross_entropy(logits_cv, targets_c, ignore_index=IGNORE, reduction="none"))
        correct.append(logits_cv.argmax(-1) == targets_c)
    return torch.cat(losses), torch.cat(correct)


class NextToken(nn.Module):
    """The objective: mean cross-entropy of the next token, over all positions that have a target."""

    def __init__(self, chunk: int | None = None) -> None:
        super().__init__()
        self.chunk = chunk
        self._untraced: Callable[..., tuple[Tensor, Tensor]] | None = None

    def before_compile(self) -> None:
        """Keep a loss of many chunks out of `torch.compile`, which would unroll them and take minutes."""
        self._untraced = torch.compiler.disable(_ChunkedCrossEntropy.apply)

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        """Loss of `model` (a decoder) on a batch."""
        span = Span(positions_bt=batch.positions_bt, documents_bt=batch.documents_bt)
        hidden_btd = model(batch.tokens_bt, span).hidden_btd
        targets_bt = batch.targets_bt
        count = (targets_bt != IGNORE).sum()
        flat = hidden_btd.flatten(0, 1), model.head.weight_vd, targets_bt.flatten()
        if torch.is_grad_enabled():
            loss_sum, losses_n = chunked_cross_entropy(*flat, self.chunk, self._untraced)
            return LossOutput(loss_sum, count, losses_n.view(targets_bt.shape))
        losses_n, correct_n = chunked_scores(*flat, self.chunk)
        shape = targets_bt.shape
        return LossOutput(losses_n.sum(), count, losses_n.view(shape), correct_n.view(shape))


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
