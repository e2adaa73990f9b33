"""Dispatch: tokens to the rows of their experts and back.

A layer of experts is written once, in terms of rows, and either way of dispatch computes it:

    rows = dispatch.spread(x_nd)                 each token's vector once for each of its experts
    rows = dispatch.apply(rows, weight_eoi)      every row times the matrix of its expert
    y_nd = dispatch.combine(rows, gates_nk)      Σ_j gate_j · row of slot j

`Grouped` sorts (token, slot) pairs by expert, stably, and keeps rows in that order between products (`parallel`). Nothing is
dropped and nothing waits for a GPU. `Loop` keeps rows in the order of tokens and multiplies in a Python loop over experts,
as the authors of JetMoE (arXiv 2404.07413) do, which is easy to read and waits for the GPU once per expert.

Shapes: n tokens · k slots · m = n·k rows · d, c, i, o channels · e experts.

Pitfall: gradients of gathered rows are gathered too, through the inverse permutation. Adding them up by index, which is what
differentiating the gather would do, is slower and, on GPUs, of an order that changes from run to run.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from torchstone.nn.experts.choice import Routing
from torchstone.nn.experts.parallel import expert_linear


class Dispatch(Protocol):
    """Rows of (token, slot) pairs, in an order of its own."""

    def spread(self, x_nd: Tensor) -> Tensor:
        """Rows [m, d] of tokens, each once for every slot."""
        ...

    def place(self, x_nkc: Tensor) -> Tensor:
        """Rows [m, c] of what every token has in each slot."""
        ...

    def apply(self, x_mi: Tensor, weight_eoi: Tensor) -> Tensor:
        """Rows [m, o]: each times the matrix of its expert."""
        ...

    def collect(self, x_mc: Tensor) -> Tensor:
        """[n, k, c]: rows by token and slot; undoes `place`."""
        ...

    def combine(self, x_md: Tensor, gates_nk: Tensor) -> Tensor:
        """[n, d]: the sum of each token's rows, each times its gate, in the rows' type."""
        ...


class Grouped:
    """Rows sorted by expert."""

    def __init__(self, routing: Routing) -> None:
        experts_m, count = routing.experts_nk.flatten(), routing.logits_ne.shape[1]
        self.slots = routing.experts_nk.shape[1]
        sorted_m, self.order_m = experts_m.sort(dim=0, stable=True)
        every_e = torch.arange(count, device=experts_m.device)
        self.ends_e = torch.searchsorted(sorted_m, every_e, right=True, out_int32=True)
        place_m = torch.arange(experts_m.shape[0], device=experts_m.device)
        self.inverse_m = torch.empty_like(self.order_m).scatter_(0, self.order_m, place_m)

    def spread(self, x_nd: Tensor) -> Tensor:
        """See `Dispatch`."""
        spread: Tensor = _Spread.apply(x_nd, self.order_m // self.slots, self.inverse_m, self.slots)
        return spread

    def place(self, x_nkc: Tensor) -> Tensor:
        """See `Dispatch`."""
        placed: Tensor = _Permute.apply(x_nkc.flatten(0, 1), self.order_m, self.inverse_m)
        return placed

    def apply(self, x_mi: Tensor, weight_eoi: Tensor) -> Tensor:
        """See `Dispatch`."""
        return expert_linear(x_mi, weight_eoi, self.ends_e)

    def collect(self, x_mc: Tensor) -> Tensor:
        """See `Dispatch`."""
        collected: Tensor = _Permute.apply(x_mc, self.inverse_m, self.order_m)
        return collected.unflatten(0, (-1, self.slots))

    def combine(self, x_md: Tensor, gates_nk: Tensor) -> Tensor:
        """See `Dispatch`."""
        combined: Tensor = _Combine.apply(x_md, gates_nk, self.order_m, self.inverse_m)
        return combined


class Loop:
    """Rows in the order of tokens, and a loop over experts."""

    def __init__(self, routing: Routing) -> None:
        self.experts_m, self.slots = routing.experts_nk.flatten(), routing.experts_nk.shape[1]

    def spread(self, x_nd: Tensor) -> Tensor:
        """See `Dispatch`."""
        return x_nd.repeat_interleave(self.slots, dim=0)

    def place(self, x_nkc: Tensor) -> Tensor:
        """See `Dispatch`."""
        return x_nkc.flatten(0, 1)

    def apply(self, x_mi: Tensor, weight_eoi: Tensor) -> Tensor:
        """See `Dispatch`."""
        rows = [(self.experts_m == expert).nonzero().squeeze(1) for expert in range(weight_eoi.shape[0])]
        products = [x_mi[own] @ weight.t() for own, weight in zip(rows, weight_eoi, strict=True)]
        return torch.cat(products)[torch.cat(rows).argsort()]

    def collect(self, x_mc: Tensor) -> Tensor:
        """See `Dispatch`."""
        return x_mc.unflatten(0, (-1, self.slots))

    def combine(self, x_md: Tensor, gates_nk: Tensor) -> Tensor:
        """See `Dispatch`."""
        return (self.collect(x_md) * gates_nk.unsqueeze(-1)).sum(1).to(x_md.dtype)


DISPATCHES: dict[str, type[Grouped] | type[Loop]] = {"grouped": Grouped, "loop": Loop}


class _Spread(torch.autograd.Function):
    """x [n, d] → the row of token tokens_m[i] at place i."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, tokens_m: Tensor, inverse_m: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(inverse_m)
        ctx.slots = slots
        return x_nd.index_select(0, tokens_m)

    @staticmethod
    def backward(ctx: Any, grad_md: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_m,) = ctx.saved_tensors
        return grad_md.index_select(0, inverse_m).unflatten(0, (-1, ctx.slots)).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """x [m, c] → its rows in the given order; `back_m` is the inverse."""

    @staticmethod
    def forward(ctx: Any, x_mc: Tensor, order_m: Tensor, back_m: Tensor) -> Tensor:
        ctx.save_for_backward(back_m)
        return x_mc.index_select(0, order_m)

    @staticmethod
    def backward(ctx: Any, grad_mc: Tensor) -> tuple[Tensor, None, None]:
        (back_m,) = ctx.saved_tensors
        return grad_mc.index_select(0, back_m), None, None


class _Combine(torch.autograd.Function):
    """(rows [m, d] sorted by expert, gates [n, k]) → Σ_j gate_j · row of slot j."""

    @staticmethod
    def forward(ctx: Any, x_md: Tensor, gates_nk: Tensor, order_m: Tensor, inverse_m: Tensor) -> Tensor:
        ctx.save_for_backward(x_md, gates_nk, order_m, inverse_m)
        y_nd = gates_nk.new_zeros(gates_nk.shape[0], x_md.shape[1])
        for gate_n, rows_n in zip(gates_nk.unbind(1), inverse_m.view_as(gates_nk).unbind(1), strict=True):
            y_nd.addcmul_(x_md.index_select(0, rows_n).to(y_nd.dtype), gate_n.unsqueeze(1))
        return y_nd.to(x_md.dtype)

    @staticmethod
    def backward(ctx: Any, grad_nd: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_md, gates_nk, order_m, inverse_m = ctx.saved_tensors
        grad_md = grad_nd.to(gates_nk.dtype).index_select(0, order_m // gates_nk.shape[1])
        of_gates_m = (grad_md * x_md.to(gates_nk.dtype)).sum(-1)
        scale_m1 = gates_nk.flatten().index_select(0, order_m).unsqueeze(1)
        of_rows_md = grad_md.mul_(scale_m1).to(x_md.dtype)
        return of_rows_md, of_gates_m.index_select(0, inverse_m).view_as(gates_nk), None, None
