"""Scaled dot-product attention: an eager core that shows every step, and the fast ways of computing the same.

    scores = scale · q kᵀ + bias,   maps = softmax(scores over visible keys),   weights = maps,   out = weights · v
                                                                                              (Vaswani et al. 2017)

The bias is the position's (`nn.position`), where it has one. Differential attention has two maps per head, which share its
bias, and other weights: weights = first map − λ · second map (`Difference`).

Shapes: b batch · u query sub-heads, one map each · h heads, u or u/2 · g key heads (g divides u) · t queries · s keys ·
d key channels · e value channels.

`eager_attention` is the meaning, and what runs when a model is observed (`nn.attention.observe`). A mixer calls `attend`,
which chooses:

- a score processor: `nn.attention.processed`.
- observed: eager, everything recorded.
- one query and two maps: `nn.attention.step`, which copies nothing of the decoding state.
- CPU, causal, up to BLOCKED_LENGTH tokens, and two maps, half precision or a bias on BIASED_LENGTH tokens or more:
  `nn.attention.blocked`.
- CUDA, causal, with a bias: `nn.attention.flex`, which computes it score by score.
- otherwise torch's fused kernels, which hold no map (but a bias, if any); two maps are then subtracted after the values
  are read. CUDA's take a bias only in the type of the queries, which is too coarse where that is a half type: eager then.

Pitfalls: the softmax is in fp32 whatever the inputs; dropout acts on the weights, in training only. No fused CPU kernel
accepts d != e (differential attention), so q and k are then padded with zero channels, which leaves the scores as they
are.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.nn.attention.bias import ScoreBias
from torchstone.nn.attention.blocked import blocked_attention
from torchstone.nn.attention.difference import Difference
from torchstone.nn.attention.flex import fits_flex, flex_attention
from torchstone.nn.attention.mask import Mask
from torchstone.nn.attention.observe import Observation
from torchstone.nn.attention.processed import processed_attention
from torchstone.nn.attention.score_processor import ScoreProcessor
from torchstone.nn.attention.step import step_attention

BLOCKED_LENGTH = 1024
BIASED_LENGTH = 128


def attend(
    q_butd: Tensor,
    k_bgsd: Tensor,
    v_bgse: Tensor,
    mask: Mask,
    *,
    scale: float,
    difference: Difference | None = None,
    dropout: float = 0.0,
    observation: Observation | None = None,
    bias: ScoreBias | None = None,
    processor: ScoreProcessor | None = None,
) -> Tensor:
    """Outputs [b, h, t, e]; sub-head i reads key head i // (u/g), head i reads value head i // (h / value heads).

    Args:
        mask: visibility, from `parallel_mask` or `step_mask`.
        scale: factor of the scores, usually 1/√d.
        difference: for two maps per head; None where each map is a head.
        dropout: probability of dropping a weight in this call (0 outside training).
        observation: filled, through the eager core, when given.
        bias: of the position, one channel per head; None where it has none.
        processor: what changes the scores; the keys must be in the order that its reach asks for.
    """
    if processor is not None:
        return processed_attention(
            q_butd,
            k_bgsd,
            v_bgse,
            mask,
            scale=scale,
            difference=difference,
            dropout=dropout,
            observation=observation,
            bias=None if bias is None else lambda rows: _of_maps(bias.rows(rows), difference),
            processor=processor,
        )
    if observation is not None:
        return eager_attention(q_butd, k_bgsd, v_bgse, mask, scale, difference, dropout, observation, bias)
    if dropout == 0 and difference is not None and q_butd.shape[2] == 1:
        return step_attention(q_butd, k_bgsd, v_bgse, mask, scale, difference, bias)
    if dropout == 0 and _blocked(q_butd, mask, difference, bias):
        return _blocked_attention(q_butd, k_bgsd, v_bgse, mask, scale, difference, bias)
    term = bias.term() if bias is not None and dropout == 0 and fits_flex(q_butd, mask) else None
    if bias is not None and term is None and q_butd.device.type != "cpu" and q_butd.dtype.itemsize < 4:
        return eager_attention(q_butd, k_bgsd, v_bgse, mask, scale, difference, dropout, Observation(), bias)
    if difference is not None:
        v_bgse = _values_of_keys(v_bgse, k_bgsd.shape[1], difference)
    if term is None:
        out_bute = fused_attention(q_butd, k_bgsd, v_bgse, mask, scale, dropout, bias, difference)
    else:
        pairs = None if difference is None else difference.neighbours
        out_bute = flex_attention(q_butd, k_bgsd, v_bgse, mask, scale, term, pairs)
    return out_bute if difference is None else difference.subtract(out_bute)


def eager_attention(
    q_butd: Tensor,
    k_bgsd: Tensor,
    v_bgse: Tensor,
    mask: Mask,
    scale: float,
    difference: Difference | None,
    dropout: float,
    observation: Observation,
    bias: ScoreBias | None = None,
) -> Tensor:
    """Attention step by step; records q, k, v, scores, maps and weights."""
    k_busd = _repeat(k_bgsd, q_butd.shape[1])
    fine = torch.promote_types(q_butd.dtype, torch.float32)
    scores_buts = (q_butd @ k_busd.transpose(-2, -1)).to(fine) * scale
    if bias is not None:
        scores_buts = scores_buts + _of_maps(bias.whole(), difference)
    maps_buts = masked_softmax(scores_buts, mask)
    weights_bhts = maps_buts if difference is None else difference.subtract(maps_buts)
    v_bhse = _repeat(v_bgse, weights_bhts.shape[1])
    observation.q, observation.k, observation.v = q_butd, k_busd, v_bhse
    observation.scores, observation.maps, observation.weights = scores_buts, maps_buts, weights_bhts
    return F.dropout(weights_bhts, dropout).to(v_bhse.dtype) @ v_bhse


def masked_softmax(scores_buts: Tensor, mask: Mask) -> Tensor:
    """Softmax over the visible keys; rows that see nothing are all 0."""
    hidden: Tensor | None = None
    if mask.allowed_b1ts is not None:
        hidden = ~mask.allowed_b1ts
    elif mask.causal:
        hidden = torch.ones(scores_buts.shape[-2:], dtype=torch.bool, device=scores_buts.device).triu(1)
    if hidden is not None:
        scores_buts = scores_buts.masked_fill(hidden, -torch.inf)
    return mask.clear_empty(scores_buts.softmax(dim=-1))


def fused_attention(
    q_butd: Tensor,
    k_bgsd: Tensor,
    v_bgse: Tensor,
    mask: Mask,
    scale: float,
    dropout: float,
    bias: ScoreBias | None = None,
    difference: Difference | None = None,
) -> Tensor:
    """Outputs [b, u, t, e] of every sub-head through torch's fused kernels; `difference` orders the bias of two maps."""
    if bias is None:
        added = mask.additive(q_butd.dtype)
    else:
        # torch's CPU kernel misreads a mask that is coarser than the queries
        bias_buts = _of_maps(bias.whole(), difference)
        added = mask.biased(bias_buts.to(torch.promote_types(bias_buts.dtype, q_butd.dtype)))
    channels, wanted = q_butd.shape[-1], v_bgse.shape[-1]
    if wanted > channels and q_butd.device.type == "cpu":
        q_butd = F.pad(q_butd, (0, wanted - channels))
        k_bgsd = F.pad(k_bgsd, (0, wanted - channels))
    # Autocast would round the bias to its half type; torch's CPU kernels take it in fp32 beside queries of a half type.
    alone = bias is not None and q_butd.device.type == "cpu"
    if alone:
        q_butd, k_bgsd, v_bgse = _autocast(q_butd, k_bgsd, v_bgse)
    with torch.autocast("cpu", enabled=False) if alone else nullcontext():
        out_bute = F.scaled_dot_product_attention(
            q_butd,
            k_bgsd,
            v_bgse,
            attn_mask=added,
            dropout_p=dropout,
            is_causal=added is None and mask.causal,
            scale=scale,
            enable_gqa=q_butd.shape[1] != k_bgsd.shape[1],
        )
    return mask.clear_empty(out_bute)


def _blocked(q_butd: Tensor, mask: Mask, difference: Difference | None, bias: ScoreBias | None) -> bool:
    """Whether explicit maps in blocks are the fastest way."""
    length = q_butd.shape[2]
    short = q_butd.device.type == "cpu" and length <= BLOCKED_LENGTH
    special = difference is not None or q_butd.dtype == torch.bfloat16 or (bias is not None and length >= BIASED_LENGTH)
    return short and mask.causal and special


def _blocked_attention(
    q_butd: Tensor,
    k_bgsd: Tensor,
    v_bgse: Tensor,
    mask: Mask,
    scale: float,
    difference: Difference | None,
    bias: ScoreBias | None,
) -> Tensor:
    q_butd, k_butd, v_bgse = _autocast(q_butd, _repeat(k_bgsd, q_butd.shape[1]), v_bgse)
    if difference is None:
        q_bmhtd, k_bmhtd, lambda_bht = q_butd.unsqueeze(1), k_butd.unsqueeze(1), None
    else:
        q_bmhtd, k_bmhtd, lambda_bht = difference.pairs(q_butd), difference.pairs(k_butd), difference.lambda_bht
    v_bhte = _repeat(v_bgse, q_bmhtd.shape[2])
    bias_bhts = None if bias is None else bias.whole()
    return mask.clear_empty(
        blocked_attention(q_bmhtd, k_bmhtd, v_bhte, lambda_bht, mask.allowed_b1ts, scale, bias_bhts)
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the type that autocast gives to attention, which an operator of our own has to ask for itself."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors)


def _repeat(x_bgsd: Tensor, heads: int) -> Tensor:
    """One key or value head per query head."""
    repeats = heads // x_bgsd.shape[1]
    return x_bgsd if repeats == 1 else x_bgsd.repeat_interleave(repeats, dim=1)


def _values_of_keys(v_bgse: Tensor, key_heads: int, difference: Difference) -> Tensor:
    """A value head for every key head, in the order of the keys: both maps of a head read the same values."""
    if v_bgse.shape[1] == key_heads:
        return v_bgse
    return difference.share(v_bgse)


def _of_maps(bias_bhts: Tensor, difference: Difference | None) -> Tensor:
    """The bias of every map, in the order of the sub-heads."""
    return bias_bhts if difference is None else difference.share(bias_bhts)
