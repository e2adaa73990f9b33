"""The recurrent block of Griffin, Hawk and RecurrentGemma (De et al., arXiv 2402.19427; Botev et al., arXiv 2404.07839).

    y = gelu(x W_y + b_y),   z = conv(x W_x + b_x),   h = RG-LRU(z),   out = (h ⊙ y) W_o + b_o

and the real-gated linear recurrent unit, gates σ(BD(z)) with block-diagonal BD:

    i_t = σ(BD_i(z_t)),   r_t = σ(BD_r(z_t)),   log a_t = −8 · r_t · softplus(α)
    h_t = a_t ⊙ h_{t−1} + m_t ⊙ i_t ⊙ z_t,      m_t = √(1 − a_t²);   where a document starts a_t = 0 and m_t = 1

The gates do not depend on h, so the recurrence is a linear scan (`linear_scan`). `gelu` is its tanh approximation. Shapes:
b batch · t tokens · d width of the model · r width of the recurrence · w taps of the convolution.

Pitfalls
- m at the start of a document is 1 and not √(1 − a²): a published layer that forgets the boundary scales the first token wrongly
  and carries the state over.
- The slope of √u has no bound at u = 0, and u is near 0 where a is near 1: it is cut off at 1000 in the backward pass. u is
  −expm1(2 log a), because 1 − a² loses its digits there.
- State, decay and scan are fp32 whatever the model's type, and the unit's parameters stay fp32. They are not decayed:
  decay would pull α, whose zero is a decay of a = 2^(−8r), out of its range.
- The paper starts a^8 in [0.9, 0.999], the released code a itself (`decay_init`): at r = ½ a step then keeps 0.95 to
  0.9995 of the state (`paper`), or 0.66 to 0.996 (`code`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.nn.context import BuildContext
from torchstone.nn.precision import Fine
from torchstone.nn.project import layer_flops, matrices, project, roles
from torchstone.nn.recurrence.block_diagonal import BlockDiagonal, block_diagonal
from torchstone.nn.recurrence.boundaries import Boundaries, boundaries
from torchstone.nn.recurrence.convolution import TemporalConvolution
from torchstone.nn.recurrence.linear_scan import linear_scan
from torchstone.nn.recurrence.state import RecurrentState, require_tensors
from torchstone.nn.roles import Roles
from torchstone.nn.span import Span
from torchstone.recipe.part import Part

DecayInit = Literal["code", "paper"]
SHARPNESS = 8.0  # c of the paper: how fast the recurrence gate closes
RANGE = (0.9, 0.999)  # of initial decays
STEEPEST = 1000.0  # slope of the square root in the backward pass


class _Gated(torch.autograd.Function):
    """Gates to the coefficients of the scan, in one step each way: half the memory and time of autograd's dozen."""

    @staticmethod
    def forward(ctx: Any, i_btr: Tensor, r_btr: Tensor, z_btr: Tensor, rate_r: Tensor, starts_bt1: Tensor) -> Any:
        """a and b [b, t, r] of gates before their sigmoid, inputs, and log a per unit of recurrence gate."""
        i_btr, r_btr = i_btr.sigmoid(), r_btr.sigmoid()
        # infinite decay makes a = 0 and m = 1, both exactly and without a gradient
        log_a_btr = (r_btr * rate_r).masked_fill_(starts_bt1, -torch.inf)
        a_btr = log_a_btr.exp()
        m_btr = log_a_btr.mul_(2).expm1_().neg_().sqrt_()
        ctx.save_for_backward(i_btr, r_btr, z_btr, rate_r, a_btr, m_btr)
        return a_btr, (m_btr * i_btr).mul_(z_btr)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of gates, inputs and rates; the slope of the root is at most STEEPEST."""
        i_btr, r_btr, z_btr, rate_r, a_btr, m_btr = ctx.saved_tensors
        by_a_btr, by_b_btr = gradients
        by_iz_btr = by_b_btr * m_btr
        by_z_btr = by_iz_btr * i_btr
        by_m_btr = (by_b_btr * i_btr).mul_(z_btr)
        # m² = 1 − a², whose slope by log a is −2 a²
        by_m_btr.mul_(a_btr).mul_(2).div_((2 * m_btr).clamp_min_(1 / STEEPEST))
        by_log_a_btr = (by_a_btr - by_m_btr).mul_(a_btr)
        by_rate_r = (by_log_a_btr * r_btr).sum((0, 1))
        by_r_btr = torch.ops.aten.sigmoid_backward(by_log_a_btr.mul_(rate_r), r_btr)
        by_i_btr = torch.ops.aten.sigmoid_backward(by_iz_btr.mul_(z_btr), i_btr)
        return by_i_btr, by_r_btr, by_z_btr, by_rate_r, None


class RGLRU(Fine):
    """The recurrent unit.

    Args:
        width: channels, a multiple of `blocks`.
        blocks: of the gates.
        decay_init: see the module's pitfalls.
    """

    def __init__(self, width: int, blocks: int, decay_init: DecayInit = "code") -> None:
        super().__init__()
        self.decay_init = decay_init
        self.alpha = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.input_gate = BlockDiagonal(width, blocks)
        self.recurrence_gate = BlockDiagonal(width, blocks)

    def forward(self, z_btr: Tensor, limits: Boundaries, before_br: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All states [b, t, r] in fp32 or finer (padding repeats the state before it), and the last one [b, r].

        Args:
            z_btr: inputs.
            limits: starts and padding.
            before_br: state before the first token; None for the beginning.
        """
        fine = torch.promote_types(z_btr.dtype, torch.float32)
        gates = (gate.to(fine) for gate in block_diagonal(z_btr, self.input_gate, self.recurrence_gate))
        rate_r = -SHARPNESS * F.softplus(self.alpha.to(fine))
        a_btr, b_btr = _Gated.apply(*gates, z_btr.to(fine), rate_r, limits.starts_bt[:, :, None])
        if not limits.plain and limits.valid_bt is not None:
            padding_bt1 = ~limits.valid_bt[:, :, None]
            a_btr, b_btr = a_btr.masked_fill(padding_bt1, 1.0), b_btr.masked_fill(padding_bt1, 0.0)
        return linear_scan(a_btr, b_btr, before_br)

    def decays(self) -> Tensor:
        """a of every channel [r] while the recurrence gate is half open."""
        return (-0.5 * SHARPNESS * F.softplus(self.alpha)).exp()

    def flops(self) -> float:
        """Forward FLOPs per token of the gates' products."""
        return self.input_gate.flops() + self.recurrence_gate.flops()

    def activation_values(self) -> int:
        """Values that the backward pass keeps per token: inputs, both gates, a, its root, states."""
        return 6 * self.alpha.shape[0]

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """α such that decays lie in RANGE."""
        return {"alpha": self._draw}

    def _draw(self, alpha_r: Tensor, generator: torch.Generator) -> None:
        low, high = RANGE
        if self.decay_init == "code":  # a² is uniform between the squares
            log_decay_r = alpha_r.uniform_(low**2, high**2, generator=generator).log() / 2
        else:  # a^8 is uniform
            log_decay_r = alpha_r.uniform_(low, high, generator=generator).log() / SHARPNESS
        alpha_r.copy_(torch.expm1(-log_decay_r).log())

    def no_decay_parameters(self) -> tuple[str, ...]:
        """None of the unit's parameters is decayed."""
        return tuple(name for name, _ in self.named_parameters())


class RecurrentBlock(nn.Module):
    """Mixer of two branches around the unit; see the module's docstring.

    Args:
        context: of the model.
        width: channels of the recurrence, a multiple of `blocks`.
        blocks: of the gates.
        taps: of the convolution.
        decay_init: how α starts.
    """

    def __init__(
        self, context: BuildContext, width: int, blocks: int, taps: int, decay_init: DecayInit = "code"
    ) -> None:
        super().__init__()
        self.width, self.taps = width, taps
        self.w_y = context.linear(context.width, width, "input", bias=True)
        self.w_x = context.linear(context.width, width, "input", bias=True)
        self.conv = TemporalConvolution(width, taps)
        self.rg_lru = RGLRU(width, blocks, decay_init)
        self.w_o = context.linear(width, context.width, "output", bias=True)

    def forward(
        self, x_btd: Tensor, span: Span, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        """Mixed tokens [b, t, d], 0 for padding, and the state, advanced by t tokens."""
        batch, length = x_btd.shape[:2]
        if state is not None:
            due = {"h": (batch, self.width), "conv": (batch, self.taps - 1, self.width)}
            require_tensors(state, "rglru", due, fine=("h",))
            state.require_room(length)
        limits = boundaries(span, batch, length, state, x_btd.device)
        y_btr, z_btr = project(x_btd, self.w_y, self.w_x)
        tail_bwr = z_btr.new_zeros(batch, self.taps - 1, self.width) if state is None else state.tensors["conv"]
        z_btr, tail_bwr = self.conv(z_btr, span, limits, tail_bwr)
        h_btr, last_br = self.rg_lru(z_btr, limits, None if state is None else state.tensors["h"])
        if state is not None:
            state.advance(length, limits.last_b, h=last_br, conv=tail_bwr)
        out_btd = self.w_o(h_btr.to(y_btr.dtype) * F.gelu(y_btr, approximate="tanh"))
        if limits.plain or limits.valid_bt is None:
            return out_btd, state
        return out_btd.masked_fill(~limits.valid_bt[:, :, None], 0.0), state

    def new_state(self, batch: int, capacity: int, device: torch.device | str, dtype: torch.dtype) -> RecurrentState:
        """An empty state: `h` [b, r] in fp32 or finer, `conv` [b, w − 1, r] in `dtype`. Its size is the same for any capacity."""
        fine = torch.promote_types(dtype, torch.float32)
        h_br = torch.zeros(batch, self.width, device=device, dtype=fine)
        conv_bwr = torch.zeros(batch, self.taps - 1, self.width, device=device, dtype=dtype)
        return RecurrentState({"h": h_br, "conv": conv_bwr}, capacity)

    def flops(self, length: int) -> float:
        """Forward FLOPs per token of projections and gates, whatever the length; scan and taps are no products of matrices."""
        return sum(map(layer_flops, (self.w_y, self.w_x, self.w_o))) + self.rg_lru.flops()

    def diagnostics(self) -> dict[str, float]:
        """Decays while the recurrence gate is half open: mean, fastest and slowest channel."""
        decays_r = self.rg_lru.decays().detach()
        return {
            "decay": float(decays_r.mean()),
            "fastest decay": float(decays_r.min()),
            "slowest decay": float(decays_r.max()),
        }

    def parameter_roles(self) -> Roles:
        """The three projections are neither queries' and keys' nor feed-forward weights."""
        return roles(self, {"w_y": "other", "w_x": "other", "w_o": "other"})

    def residual_parameters(self) -> tuple[str, ...]:
        """Weights that write into the residual stream."""
        return matrices(self, "w_o")


class RGLRUConfig(Part):
    """`mixer: rglru`."""

    family: ClassVar[str] = "mixer"
    kind: Literal["rglru"] = "rglru"
    lru_width: int | None = Field(default=None, gt=0, description="channels of the recurrence; null: the model's width")
    num_blocks: int | None = Field(
        default=None, gt=0, description="diagonal blocks of the gates; null: as wide as the model's head_dim"
    )
    conv_width: int = Field(default=4, gt=0, description="taps of the convolution, the current token included")
    decay_init: DecayInit = Field(
        default="code", description="what starts in [0.9, 0.999]: a (the released code), or a to the 8th (the paper)"
    )

    def build(self, context: BuildContext) -> RecurrentBlock:
        """The module; raises ConfigError where the blocks do not divide the width."""
        width = self.lru_width or context.width
        blocks = self.num_blocks or max(1, width // context.head_dim)
        if width % blocks and self.num_blocks is None:
            raise ConfigError(
                f"rglru has {width} channels, and the model's head_dim {context.head_dim} does not divide them into gate blocks "
                f"of that width; give num_blocks, a divisor of {width}, or a head_dim that divides {width}."
            )
        if width % blocks:
            raise ConfigError(
                f"rglru has {width} channels and {blocks} blocks, and {width} is not divisible by {blocks}; choose num_blocks "
                "among the divisors of lru_width (the model's width where that is null)."
            )
        return RecurrentBlock(context, width, blocks, self.conv_width, self.decay_init)
