"""Cross-entropy of the pair head over many pairs, in chunks: the sibling of `next_token` for belief-state models.

    [g; u] = P_i + Q_j          P = [W_gate; W_up]_f f,  Q = [W_gate; W_up]_b b, made once per token
    r = [f_i; b_j] + W_down(silu(g) ⊙ u),   y = gain ⊙ r / √(mean(r²) + ε)
    loss = Σ_pairs weight · ( w_next · CE(U y_next, x_{i+1}) + w_prev · CE(U y_prev, x_{j−1}) )

There are O(T²) pairs and O(T) tokens. So the encoders run once, the head works through the pairs in chunks, and each chunk
leaves its gradients in f, b, P, Q and the head's weights and is dropped; the backward pass only scales what is there, and the
encoders receive the sums. Nothing is approximated, and memory does not depend on the number of pairs.

Shapes: m tokens (rows and time flattened) · n pairs · c pairs of a chunk · d width · h hidden · v vocabulary · s sides (next,
prev, or one of them).

Pitfall: matrix products run in autocast's type, everything else in fp32. On a GPU the sums over pairs are made with atomic
additions, whose order, and so the last digits, may change from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.nn.heads.pair import PairHead

# Numbers of a chunk that exist at once. On CPUs 4 MB of fp32 stay in a core's cache; the number for GPUs is not tuned yet.
CHUNK_VALUES = {"cpu": 1 << 20, "cuda": 1 << 27}


@dataclass(frozen=True, eq=False)
class PairTargets:
    """What the pairs are and how they count.

    Attributes:
        prefix_n, suffix_n: place of f and of b in the flattened tokens.
        targets_ns: token ids, on the sides in question.
        weight_ns: fp32 weight of each loss.
        sides: of [next, prev]: slice(0, 2), or one of them.
    """

    prefix_n: Tensor
    suffix_n: Tensor
    targets_ns: Tensor
    weight_ns: Tensor
    sides: slice

    def piece(self, part: slice) -> PairTargets:
        """Some of the pairs."""
        kept = (self.prefix_n[part], self.suffix_n[part], self.targets_ns[part], self.weight_ns[part])
        return PairTargets(*kept, self.sides)


class _Inputs(NamedTuple):
    """Tensors of the head and of the tokens: f, b, P, Q, W_down, gain, U."""

    prefix_md: Tensor
    suffix_md: Tensor
    prefix_mh: Tensor
    suffix_mh: Tensor
    down_dh: Tensor
    gain_d: Tensor
    weight_vd: Tensor


class _Kept(NamedTuple):
    """What the gradient of a chunk needs of its forward pass."""

    gate_ch: Tensor
    up_ch: Tensor
    active_ch: Tensor
    normed_cd: Tensor
    inverse_c1: Tensor
    features_csd: Tensor
    log_p_csv: Tensor


def _forward(given: _Inputs, part: PairTargets, eps: float, dtype: torch.dtype) -> _Kept:
    gate_ch, up_ch = (given.prefix_mh[part.prefix_n] + given.suffix_mh[part.suffix_n]).chunk(2, dim=-1)
    active_ch = F.silu(gate_ch) * up_ch
    both_cd = torch.cat([given.prefix_md[part.prefix_n], given.suffix_md[part.suffix_n]], dim=1)
    raw_cd = both_cd + F.linear(active_ch.to(dtype), given.down_dh.to(dtype))
    inverse_c1 = torch.rsqrt(raw_cd.square().mean(1, keepdim=True) + eps)
    normed_cd = raw_cd * inverse_c1
    features_csd = (normed_cd * given.gain_d).unflatten(1, (2, -1))[:, part.sides].to(dtype)
    logits_csv = F.linear(features_csd, given.weight_vd.to(dtype)).to(normed_cd.dtype)
    return _Kept(gate_ch, up_ch, active_ch, normed_cd, inverse_c1, features_csd, logits_csv.log_softmax(-1))


def _backward(given: _Inputs, grads: _Inputs, part: PairTargets, kept: _Kept, dtype: torch.dtype) -> None:
    """Add the gradients of a chunk to `grads`."""
    one_cs1 = torch.full_like(part.targets_ns, -1, dtype=kept.log_p_csv.dtype).unsqueeze(-1)
    error_csv = kept.log_p_csv.exp_().scatter_add_(2, part.targets_ns.unsqueeze(-1), one_cs1)
    error_csv = error_csv.mul_(part.weight_ns.unsqueeze(-1)).to(dtype)
    grads.weight_vd.add_(error_csv.flatten(0, 1).t() @ kept.features_csd.flatten(0, 1))
    out_cd = torch.zeros_like(kept.normed_cd)
    out_cd.unflatten(1, (2, -1))[:, part.sides] = (error_csv @ given.weight_vd.to(dtype)).to(out_cd.dtype)
    grads.gain_d.add_((out_cd * kept.normed_cd).sum(0))
    out_cd = out_cd.mul_(given.gain_d)
    along_c1 = (out_cd * kept.normed_cd).mean(1, keepdim=True)
    raw_cd = out_cd.sub_(kept.normed_cd * along_c1).mul_(kept.inverse_c1)
    grads.down_dh.add_(raw_cd.to(dtype).t() @ kept.active_ch.to(dtype))
    active_ch = (raw_cd.to(dtype) @ given.down_dh.to(dtype)).to(kept.gate_ch.dtype)
    sigmoid_ch = kept.gate_ch.sigmoid()
    silu_ch = kept.gate_ch * sigmoid_ch
    slope_ch = torch.addcmul(sigmoid_ch, silu_ch, 1 - sigmoid_ch)
    inner_ch = torch.cat([active_ch * kept.up_ch * slope_ch, active_ch * silu_ch], dim=1)
    width = given.prefix_md.shape[1]
    grads.prefix_mh.index_add_(0, part.prefix_n, inner_ch)
    grads.suffix_mh.index_add_(0, part.suffix_n, inner_ch)
    grads.prefix_md.index_add_(0, part.prefix_n, raw_cd[:, :width])
    grads.suffix_md.index_add_(0, part.suffix_n, raw_cd[:, width:])


class _PairCrossEntropy(torch.autograd.Function):
    """(targets, eps, chunk, dtype, *_Inputs) → (weighted sum of losses, losses_ns)."""

    @staticmethod
    def forward(
        ctx: Any, targets: PairTargets, eps: float, chunk: int, dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        fine = torch.promote_types(tensors[0].dtype, torch.float32)
        given = _Inputs(*(tensor.to(fine) for tensor in tensors))
        grads = _Inputs(*(torch.zeros_like(tensor) for tensor in given))
        losses_ns = torch.empty(targets.targets_ns.shape, dtype=fine, device=tensors[0].device)
        for start in range(0, len(losses_ns), chunk):
            part = targets.piece(slice(start, start + chunk))
            kept = _forward(given, part, eps, dtype)
            losses_ns[start : start + chunk] = _losses(kept, part)
            _backward(given, grads, part, kept, dtype)
        ctx.save_for_backward(*(grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True)))
        ctx.mark_non_differentiable(losses_ns)
        return (losses_ns * targets.weight_ns).sum(), losses_ns

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(saved * grad_sum.to(saved.dtype) for saved in ctx.saved_tensors)


def _losses(kept: _Kept, part: PairTargets) -> Tensor:
    return -kept.log_p_csv.gather(2, part.targets_ns.unsqueeze(-1)).squeeze(-1)


def chunk_size(head: PairHead, device: torch.device) -> int:
    """Pairs that the head works on at once by default."""
    values = 4 * head.w_down.weight.shape[1] + 8 * head.width + 4 * head.weight_vd.shape[0]
    return max(128, CHUNK_VALUES.get(device.type, CHUNK_VALUES["cpu"]) // values)


def _inputs(head: PairHead, prefix_md: Tensor, suffix_md: Tensor) -> _Inputs:
    tables = head.tables(prefix_md, suffix_md)
    return _Inputs(prefix_md, suffix_md, *tables, head.w_down.weight, head.norm.gain, head.weight_vd)


def _product_type(states: Tensor) -> torch.dtype:
    """The type of matrix products: autocast's, where it is on."""
    device = states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(states.dtype, torch.float32)


def pair_cross_entropy(
    head: PairHead, prefix_md: Tensor, suffix_md: Tensor, targets: PairTargets, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of losses (differentiable, fp32) and the losses [n, s] (detached).

    Args:
        head: the pair head.
        prefix_md, suffix_md: states of all tokens.
        targets: pairs, targets, weights.
        chunk: pairs at a time; None takes `chunk_size`.
    """
    size = chunk or chunk_size(head, prefix_md.device)
    dtype = _product_type(prefix_md)
    return _PairCrossEntropy.apply(targets, head.norm.eps, size, dtype, *_inputs(head, prefix_md, suffix_md))


@torch.no_grad()
def pair_scores(
    head: PairHead, prefix_md: Tensor, suffix_md: Tensor, targets: PairTargets, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Losses [n, s], and whether each target is the most likely token [n, s]; arguments as in `pair_cross_entropy`."""
    size, dtype = chunk or chunk_size(head, prefix_md.device), _product_type(prefix_md)
    fine = torch.promote_types(prefix_md.dtype, torch.float32)
    given = _Inputs(*(tensor.to(fine) for tensor in _inputs(head, prefix_md, suffix_md)))
    losses = [targets.weight_ns.new_empty(0, targets.weight_ns.shape[1])]
    correct = [losses[0].bool()]
    for start in range(0, len(targets.prefix_n), size):
        part = targets.piece(slice(start, start + size))
        kept = _forward(given, part, head.norm.eps, dtype)
        losses.append(_losses(kept, part))
        correct.append(kept.log_p_csv.argmax(-1) == part.targets_ns)
    return torch.cat(losses), torch.cat(correct)
