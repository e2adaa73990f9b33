"""Temporal convolution: each channel is a weighted sum of its own last few values.

    c_t = b + Σ_{s=0}^{w−1} W[w−1−s] ⊙ z_{t−s}                                  (depthwise, causal; w taps)

It comes before a recurrence (De et al., arXiv 2402.19427), which by itself cannot tell neighbouring tokens apart well.

Taps that reach across the start of a document are dropped, and padding is passed by: a tap reads the s-th *visible* token
before, wherever it stands. The state is the last w − 1 visible inputs, those of an earlier document set to zero; with it any
number of further tokens continues the sequence.

Shapes: b batch · t tokens · p = w − 1 + t, the tail of what came before and the tokens · d channels · w taps · s taps back.

Pitfall: published implementations ignore documents in training, or continue by exactly one token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchstone.nn.recurrence.boundaries import Boundaries
from torchstone.nn.span import Span

STD = 0.1  # of the weights, over √taps


class Reach(NamedTuple):
    """How far back the taps of each token may reach.

    Attributes:
        keep: for s = 1 … w − 1, bool [b, t, 1], False where tap s crosses a start; empty where none does.
        tail_bw1: bool [b, w − 1, 1], False for inputs of the new tail that belong to an earlier document; None as above.
        order_bt, place_bt: visible tokens first, in order, and where each token then stands; None where there is no padding.
        visible_b: visible tokens of each row; None as above.
    """

    keep: tuple[Tensor, ...] = ()
    tail_bw1: Tensor | None = None
    order_bt: Tensor | None = None
    place_bt: Tensor | None = None
    visible_b: Tensor | None = None


class TemporalConvolution(nn.Module):
    """Depthwise causal convolution with a bias.

    Args:
        width: channels.
        taps: values that one output reads, the current one included; at least 1.
    """

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, z_btd: Tensor, span: Span, limits: Boundaries, tail_bwd: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [b, t, d] and the tail [b, w − 1, d] after these tokens.

        Args:
            z_btd: inputs.
            span: of the pass; layers share what they derive from it.
            limits: starts and padding of the tokens.
            tail_bwd: the last w − 1 inputs before them, zeros at the beginning.
        """
        taps = self.weight.shape[0]
        tail_bwd = tail_bwd.to(z_btd.dtype)
        if limits.plain:
            past_bpd = torch.cat([tail_bwd.masked_fill(limits.starts_bt[:, :1, None], 0.0), z_btd], dim=1)
            return _Taps.apply(past_bpd, self.weight, self.bias), past_bpd[:, z_btd.shape[1] :]
        key = ("taps", taps, *limits.starts_bt.shape)
        reach: Reach = span.once(key, lambda: _reach(limits, taps, span.valid_bt is not None))
        if reach.order_bt is not None:
            z_btd = _taken(z_btd, reach.order_bt)
        past_bpd = torch.cat([tail_bwd, z_btd], dim=1)
        c_btd = _Taps.apply(past_bpd, self.weight, self.bias, *reach.keep)
        if reach.visible_b is None or reach.place_bt is None:
            tail_bwd = past_bpd[:, z_btd.shape[1] :]
        else:
            c_btd = _taken(c_btd, reach.place_bt)
            index_w = torch.arange(taps - 1, device=z_btd.device)
            tail_bwd = _taken(past_bpd, reach.visible_b[:, None] + index_w)
        return c_btd, tail_bwd if reach.tail_bw1 is None else tail_bwd.masked_fill(~reach.tail_bw1, 0.0)

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """Weights are drawn from N(0, 0.01/taps), biases are zero."""
        std = STD / self.weight.shape[0] ** 0.5
        return {
            "weight": lambda weight, generator: weight.normal_(0.0, std, generator=generator),
            "bias": lambda bias, generator: bias.zero_(),
        }

    def parameter_roles(self) -> dict[str, Any]:
        """Its weights are no dense map."""
        return {"weight": "other"}


def _taken(x_bnd: Tensor, index_bm: Tensor) -> Tensor:
    """Rows of each sequence by index: [b, m, d]."""
    return x_bnd.gather(1, index_bm[:, :, None].expand(-1, -1, x_bnd.shape[2]))


def _reach(limits: Boundaries, taps: int, padded: bool) -> Reach:
    """Reach of the taps for tokens with documents or padding."""
    starts_bt, (batch, length) = limits.starts_bt, limits.starts_bt.shape
    order_bt = place_bt = visible_b = None
    last_b = torch.full((batch,), length, device=starts_bt.device)
    if padded and limits.valid_bt is not None:
        order_bt = (~limits.valid_bt).to(torch.int8).argsort(dim=1, stable=True)
        place_bt = order_bt.argsort(dim=1)
        starts_bt = starts_bt.gather(1, order_bt)
        last_b = visible_b = limits.valid_bt.sum(dim=1)
    # one place before the first token too: the tail after a call without visible tokens
    starts_bp = torch.cat([starts_bt.new_zeros(batch, taps - 1), starts_bt], dim=1)
    keeps = [starts_bt.new_ones(batch, length + 1)]
    for back in range(1, taps):
        first = taps - 1 - back
        keeps.append(keeps[-1] & ~starts_bp[:, first : first + length + 1])
    at_last = [keep.gather(1, last_b[:, None]) for keep in reversed(keeps[: taps - 1])]
    tail_bw1 = torch.stack(at_last, dim=1) if at_last else None
    return Reach(tuple(keep[:, 1:, None] for keep in keeps[1:]), tail_bw1, order_bt, place_bt, visible_b)


class _Taps(torch.autograd.Function):
    """The sum over taps of [b, p, d], accumulated in place in both directions (a third of autograd's time), in fp32 or finer."""

    @staticmethod
    def forward(ctx: Any, past_bpd: Tensor, weight_wd: Tensor, bias_d: Tensor, *keep: Tensor) -> Tensor:
        """Outputs [b, t, d] in the type of the inputs."""
        ctx.save_for_backward(past_bpd, weight_wd, *keep)
        fine = torch.promote_types(weight_wd.dtype, torch.float32)
        weight_wd, taps = weight_wd.to(fine), weight_wd.shape[0]
        length = past_bpd.shape[1] - taps + 1
        out_btd = torch.addcmul(bias_d.to(fine), weight_wd[-1], past_bpd[:, taps - 1 :])
        for back in range(1, taps):
            z_btd = past_bpd[:, taps - 1 - back :][:, :length]
            out_btd.addcmul_(weight_wd[-1 - back], z_btd * keep[back - 1] if keep else z_btd)
        return out_btd.to(past_bpd.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_btd: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of inputs, weights and bias."""
        past_bpd, weight_wd, *keep = ctx.saved_tensors
        taps, length = weight_wd.shape[0], gradient_btd.shape[1]
        gradient_btd = gradient_btd.to(torch.promote_types(weight_wd.dtype, torch.float32))
        by_past_bpd = torch.zeros_like(past_bpd, dtype=gradient_btd.dtype)
        by_weight = []
        for back in range(taps):
            reached = slice(taps - 1 - back, taps - 1 - back + length)
            g_btd = gradient_btd * keep[back - 1] if keep and back else gradient_btd
            by_past_bpd[:, reached].addcmul_(weight_wd[-1 - back], g_btd)
            by_weight.append((g_btd * past_bpd[:, reached]).sum((0, 1)))
        by_weight_wd = torch.stack(by_weight[::-1]).to(weight_wd.dtype)
        by_bias_d = gradient_btd.sum((0, 1)).to(weight_wd.dtype)
        return by_past_bpd.to(past_bpd.dtype), by_weight_wd, by_bias_d, *(None for _ in keep)
