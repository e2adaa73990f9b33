"""Attention whose scores pass through a score processor: softmax(processor(scale · q kᵀ, bias)) · v.

No fused kernel can do this, because a processor reads maps. Three ways of computing the same:

- all maps at once, step by step: when observed, with dropout, and for training on GPUs (not yet run there);
- the processor's own operator (`ScoreProcessor.blocked`), for causal passes on the CPU;
- without gradients: some rows of queries at a time, exactly the same since a processor never mixes queries. Twelve
  maps of 8192 tokens then need some hundred megabytes instead of tens of gigabytes.

Shapes: b batch · u query sub-heads, one map each · h heads, u or u/2 · g key heads · t queries · s keys, in order of their
index · r some of the queries · d key channels · e value channels.

Pitfalls: scores are in fp32 whatever the inputs, under autocast too. What a query may see decides twice: the processor
reads nothing else, nor does the softmax. A decoding step without a mask sees all of its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.nn.attention.difference import Difference
from torchstone.nn.attention.mask import Mask
from torchstone.nn.attention.observe import Observation
from torchstone.nn.attention.score_processor import ScoreProcessor
from torchstone.nn.memory import device_bytes

CHUNK_SCORES = 1 << 21  # scores (or biases), over maps and rows of the batch, that exist at once without gradients

RowBias = Callable[[slice], Tensor]
"""Makes the bias of some rows of queries, [b, u, r, s] or with 1 for b."""


def processed_attention(
    q_butd: Tensor,
    k_bgsd: Tensor,
    v_bgse: Tensor,
    mask: Mask,
    *,
    scale: float,
    difference: Difference | None,
    dropout: float,
    observation: Observation | None,
    bias: RowBias | None,
    processor: ScoreProcessor,
) -> Tensor:
    """Outputs [b, h, t, e]; arguments as of `nn.attention.core.attend`, and:

    Args:
        bias: of the position; None where it has none.
        processor: what stands between the scores and the softmax.

    Raises:
        ConfigError: the maps that a training step keeps of this layer need more memory than the device has.
    """
    fine = torch.promote_types(q_butd.dtype, torch.float32)
    k_busd = _repeat(k_bgsd, q_butd.shape[1])
    v_bhse = _repeat(v_bgse, q_butd.shape[1] if difference is None else q_butd.shape[1] // 2)
    scores = _Scores(q_butd.to(fine), k_busd.to(fine), mask, scale, bias, processor)
    at_once = observation is not None or dropout > 0
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _check_memory(scores, at_once)
    if not at_once:
        v_buse = (v_bhse if difference is None else difference.share(v_bhse)).to(fine)
        out_bute = _blocked(scores, v_buse) if torch.is_grad_enabled() else _by_rows(scores, v_buse)
        if out_bute is not None:
            out_bute = mask.clear_empty(out_bute)
            return (out_bute if difference is None else difference.subtract(out_bute)).to(v_bgse.dtype)
    scores_buts = scores.processed(scores.all_rows)
    maps_buts = mask.clear_empty(scores.softmax(scores_buts, scores.all_rows))
    weights_bhts = maps_buts if difference is None else difference.subtract(maps_buts)
    if observation is not None:
        observation.q, observation.k, observation.v = q_butd, k_busd, v_bhse
        observation.scores, observation.maps, observation.weights = scores_buts, maps_buts, weights_bhts
    return F.dropout(weights_bhts, dropout).to(v_bhse.dtype) @ v_bhse


@dataclass(frozen=True, eq=False)
class _Scores:
    """What scores are made of; q and k in fp32 or finer, everything else as in `processed_attention`."""

    q_butd: Tensor
    k_busd: Tensor
    mask: Mask
    scale: float
    bias: RowBias | None
    processor: ScoreProcessor

    @property
    def all_rows(self) -> slice:
        return slice(0, self.q_butd.shape[2])

    def keys(self, rows: slice) -> int:
        """How many of the keys matter to these queries."""
        ahead = not self.mask.causal or self.processor.reads_ahead
        return self.k_busd.shape[2] if ahead else rows.stop

    def bias_of(self, rows: slice) -> Tensor | None:
        """[b or 1, u, r, the keys that matter]."""
        return None if self.bias is None else self.bias(rows)[..., : self.keys(rows)]

    def allowed(self, rows: slice) -> Tensor | None:
        """The mask's pattern over the keys that matter."""
        pattern_b1ts = self.mask.allowed_b1ts
        return None if pattern_b1ts is None else pattern_b1ts[:, :, rows, : self.keys(rows)]

    def visible(self, rows: slice) -> Tensor | None:
        """The same, with causality where the mask has no pattern; None where everything is visible."""
        if self.mask.allowed_b1ts is not None or not self.mask.causal:
            return self.allowed(rows)
        query_r = torch.arange(rows.start, rows.stop, device=self.q_butd.device)
        key_s = torch.arange(self.keys(rows), device=self.q_butd.device)
        return (query_r[:, None] >= key_s)[None, None]

    def block_rows(self) -> int | None:
        """Queries that the processor's operator computes at a time, at most; None where it cannot serve this call."""
        return self.processor.block_rows(self.q_butd.device) if self.mask.causal else None

    def processed(self, rows: slice) -> Tensor:
        """Scores after the processor, before the mask, [b, u, r, s]."""
        with torch.autocast(self.q_butd.device.type, enabled=False):
            k_busd = self.k_busd[:, :, : self.keys(rows)]
            scores_burs = self.q_butd[:, :, rows] @ k_busd.transpose(-2, -1) * self.scale
            return self.processor(scores_burs, self.bias_of(rows), self.visible(rows))

    def softmax(self, scores_burs: Tensor, rows: slice) -> Tensor:
        """Over the visible keys."""
        visible = self.visible(rows)
        if visible is not None:
            scores_burs = scores_burs.masked_fill(~visible, -torch.inf)
        return scores_burs.softmax(dim=-1)

    def blocked(self, v_buse: Tensor, rows: slice) -> Tensor | None:
        """Outputs [b, u, r, e] of the processor's operator; None where it has none for this."""
        keys = self.keys(rows)
        if not self.mask.causal or keys != rows.stop:
            return None
        q_burd, k_busd = self.q_butd[:, :, rows], self.k_busd[:, :, :keys]
        bias_burs, allowed_b1rs = self.bias_of(rows), self.allowed(rows)
        return self.processor.blocked(q_burd, k_busd, v_buse[:, :, :keys], bias_burs, allowed_b1rs, self.scale)


def _blocked(scores: _Scores, v_buse: Tensor) -> Tensor | None:
    return scores.blocked(v_buse, scores.all_rows)


def _by_rows(scores: _Scores, v_buse: Tensor) -> Tensor:
    """Outputs [b, u, t, e], some rows of queries after the other."""
    parts = []
    for rows in _chunks(scores):
        part = scores.blocked(v_buse, rows)
        if part is None:
            with torch.autocast(v_buse.device.type, enabled=False):
                maps_burs = scores.softmax(scores.processed(rows), rows)
                part = maps_burs @ v_buse[:, :, : maps_burs.shape[-1]]
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _chunks(scores: _Scores) -> Iterator[slice]:
    """Rows whose scores exist at once; of an operator that holds only a block of them, rows whose bias does."""
    b, u, t, _ = scores.q_butd.shape
    held, least = b, 1
    block = scores.block_rows()
    if block is not None and not scores.processor.reads_ahead:
        bias = scores.bias_of(slice(0, 1))
        held, least = 0 if bias is None else bias.shape[0], block
    size = t if held == 0 else max(CHUNK_SCORES // (held * u * scores.k_busd.shape[2]), least)
    for start in range(0, t, size):
        yield slice(start, min(start + size, t))


def _check_memory(scores: _Scores, at_once: bool) -> None:
    b, u, t, _ = scores.q_butd.shape
    keys, device, processor = scores.k_busd.shape[2], scores.q_butd.device, scores.processor
    kept = processor.kept_at_once(keys) if at_once or scores.block_rows() is None else processor.kept_values(keys)
    needed, there = 4 * b * t * kept, device_bytes(device)
    if needed > there:
        raise ConfigError(
            f"score processors need materialised scores: a training step on {b} sequences of {t} tokens with {u} maps "
            f"keeps {needed:,} bytes of maps per layer, and {device.type} has {there:,}; shorten the sequences or "
            "set batch.micro lower (evaluation works at any length, in chunks of rows)."
        )


def _repeat(x_bgsd: Tensor, heads: int) -> Tensor:
    """One key or value head per map or head."""
    repeats = heads // x_bgsd.shape[1]
    return x_bgsd if repeats == 1 else x_bgsd.repeat_interleave(repeats, dim=1)
