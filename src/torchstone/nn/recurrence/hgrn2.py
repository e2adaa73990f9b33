"""HGRN2: a recurrent mixer whose forget gate acts on the rows of a matrix state (Qin et al., arXiv 2404.07904).

    q = SiLU(x W_q),   z = x W_f,   i = x W_i
    f = β + (1 − β) σ(z),   k = 1 − f
    S_t = diag(f_t) S_{t−1} + k_tᵀ i_t,   o_t = s · q_t S_t         per head, S [E, E]
    y = RMSNorm(o) W_o

It is gated linear attention (`gated_linear`) with the key tied to the forget gate. The expand ratio E is the width of a head:
the state has width · E numbers and the parameters do not depend on E. E = 1 is the recurrence of HGRN with real numbers.
β is the layer's lower bound (`lower_bounds`), 0 in layer 0: higher layers forget less.

`variant: unit` is the authors' stand-alone unit: sigmoid on q, SiLU on i, biases, LayerNorm, s = 1.

Shapes: b batch · t tokens · d width · h heads · k = v = E channels of a head.

Pitfalls
- k is (1 − β) σ(−z). The difference 1 − exp(g) rounds to 0 where f is near 1, in bf16 long before.
- g = log f is logsigmoid(z) in layer 0: log β is −∞ there, and its gradient not a number.
- The norm is over the whole width and not per head. It makes the scale s irrelevant, up to its ε.
- Gates, recurrence and state are fp32 whatever the model's type, under autocast too.
- The authors' training kernel keeps f ≥ 0.05 in the decay alone, and their kernel for inference does not; here the gate is
  what the formula says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.nn.context import BuildContext
from torchstone.nn.norm.layernorm import LayerNorm
from torchstone.nn.norm.rmsnorm import RMSNorm
from torchstone.nn.project import layer_flops, matrices, project, roles
from torchstone.nn.recurrence.boundaries import Boundaries, boundaries
from torchstone.nn.recurrence.gated_linear import core_flops, gated_linear_attention, gated_linear_recurrence
from torchstone.nn.recurrence.gated_linear_fla import (
    Backend,
    fla_gated_linear_attention,
    require_installed,
    use_kernels,
)
from torchstone.nn.recurrence.lower_bounds import NAME, LowerBounds
from torchstone.nn.recurrence.state import RecurrentState, require_tensors
from torchstone.nn.roles import Roles
from torchstone.nn.span import Span
from torchstone.recipe.part import Part

Mode = Literal["auto", "chunk", "recurrent"]
Variant = Literal["lm", "unit"]


class HGRN2Config(Part):
    """`mixer: hgrn2`."""

    family: ClassVar[str] = "mixer"
    kind: Literal["hgrn2"] = "hgrn2"
    num_heads: int | None = Field(default=None, gt=0, description="heads; null: width / expand_ratio")
    expand_ratio: int | None = Field(
        default=None,
        gt=0,
        description="channels E of a head, by which the state grows; null: from num_heads, or head_dim",
    )
    lower_bound: Literal["learned", "none"] | float = Field(
        default="learned",
        description="of the forget gate: learned for all layers together, none, or one number in [0, 1)",
    )
    variant: Variant = Field(
        default="lm", description="lm: the language model's layer; unit: the authors' stand-alone one"
    )
    qk_scale: float | None = Field(
        default=None, gt=0, description="factor s of the outputs; null: E^(-1/2), or 1 in the unit"
    )
    chunk_size: int | None = Field(
        default=None,
        gt=0,
        description="most tokens computed together, a power of two, halved down to 8 where it would pad a row by more than an "
        "eighth; null: from E, 8 to 64. Of our own operator, which backend auto then uses",
    )
    mode: Mode = Field(
        default="auto", description="auto: chunks, and the recurrence for one token; or always one of them"
    )
    backend: Backend = Field(
        default="auto",
        description="auto: flash-linear-attention on CUDA if installed, not for fp64 or heads of fewer than 16 channels, else "
        "torch",
    )
    norm_eps: float = Field(default=1e-6, gt=0, description="of the norm before the output projection")

    @field_validator("lower_bound")
    @classmethod
    def _below_one(cls, value: str | float) -> str | float:
        if not isinstance(value, str) and not 0 <= value < 1:
            raise ValueError(
                f"a lower bound of {value:g} leaves the gate no room; give a number in [0, 1), learned or none"
            )
        return value

    @field_validator("chunk_size")
    @classmethod
    def _power_of_two(cls, value: int | None) -> int | None:
        if value is not None and value & (value - 1):
            raise ValueError(f"{value} tokens in a chunk; give a power of two, such as {1 << (value.bit_length() - 1)}")
        return value

    @model_validator(mode="after")
    def _all_heeded(self) -> HGRN2Config:
        if self.mode == "recurrent" and (self.chunk_size is not None or self.backend == "fla"):
            raise ValueError(
                "mode recurrent goes token by token, without chunks or kernels; remove chunk_size and backend fla, or choose "
                "mode auto."
            )
        if self.backend == "fla" and self.chunk_size is not None:
            raise ValueError(
                f"chunk_size {self.chunk_size} is a setting of our own operator, and the kernels of backend fla choose theirs; "
                "remove chunk_size, or choose backend torch."
            )
        return self

    def build(self, context: BuildContext) -> HGRN2:
        """The module.

        Raises:
            ConfigError: the width is not divisible into heads, or num_heads and expand_ratio disagree.
            DependencyError: backend fla is chosen and not installed.
        """
        if self.backend == "fla":
            require_installed()
        return HGRN2(self, context, self._heads(context))

    def _heads(self, context: BuildContext) -> int:
        width, ratio = context.width, self.expand_ratio
        if self.num_heads is None:
            name, divisor = ("expand_ratio", ratio) if ratio is not None else ("the model's head_dim", context.head_dim)
        else:
            name, divisor = "num_heads", self.num_heads
            if ratio is not None and ratio * self.num_heads != width:
                raise ConfigError(
                    f"hgrn2 was given num_heads {self.num_heads} and expand_ratio {ratio}, whose product is "
                    f"{self.num_heads * ratio} and not the model's width {width}; give one of them."
                )
        if width % divisor:
            raise ConfigError(
                f"the model's width {width} is not divisible by {name} {divisor}; choose num_heads or expand_ratio among the "
                f"divisors of {width}."
            )
        return divisor if self.num_heads is not None else width // divisor


class HGRN2(nn.Module):
    """The mixer; see the module's docstring.

    Args:
        config: settings.
        context: of the model.
        heads: a divisor of the model's width.

    Attributes:
        mean_key: mean of 1 − f over the visible tokens of the last parallel pass; None before the first.
    """

    def __init__(self, config: HGRN2Config, context: BuildContext, heads: int) -> None:
        super().__init__()
        width, unit = context.width, config.variant == "unit"
        self.config, self.layer, self.width, self.heads = config, context.layer, width, heads
        self.ratio = width // heads
        self.scale = config.qk_scale or (1.0 if unit else self.ratio**-0.5)
        self.w_q = context.linear(width, width, "input", bias=unit)
        self.w_f = context.linear(width, width, "input", bias=unit)
        self.w_i = context.linear(width, width, "input", bias=unit)
        self.norm = LayerNorm(width, config.norm_eps, True, True) if unit else RMSNorm(width, config.norm_eps)
        self.w_o = context.linear(width, width, "output", bias=unit)
        learned = config.lower_bound == "learned" and context.layer > 0
        bounds = _shared_bounds(context) if learned else None
        self._bounds = () if bounds is None else (bounds,)
        if bounds is not None and context.shared is None:  # outside a model nobody else holds it
            self.lower_bounds = bounds
        self.mean_key: Tensor | None = None

    def forward(
        self, x_btd: Tensor, span: Span, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        """Mixed tokens [b, t, d], 0 for padding, and the state, advanced by t tokens."""
        batch, length = x_btd.shape[:2]
        if state is not None:
            require_tensors(state, "hgrn2", {"s": (batch, self.heads, self.ratio, self.ratio)}, fine=("s",))
            state.require_room(length)
        limits = boundaries(span, batch, length, state, x_btd.device)
        q_btd, i_btd, k_btd, g_btd = self.gates(x_btd)
        if not limits.plain and limits.valid_bt is not None:  # padding passes the state on: f = 1, k = 0
            padding_bt1 = ~limits.valid_bt[:, :, None]
            k_btd, g_btd = k_btd.masked_fill(padding_bt1, 0.0), g_btd.masked_fill(padding_bt1, 0.0)
        if state is None:
            self.mean_key = _mean(k_btd.detach(), limits.valid_bt)
        o_btd, last_bhkv = self._mix(q_btd, k_btd, i_btd, g_btd, limits, state)
        if state is not None:
            state.advance(length, limits.last_b, s=last_bhkv)
        y_btd = self.w_o(self.norm(o_btd.to(i_btd.dtype)))
        if limits.plain or limits.valid_bt is None:
            return y_btd, state
        return y_btd.masked_fill(~limits.valid_bt[:, :, None], 0.0), state

    def gates(self, x_btd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q and i in the type of the projections, k = 1 − f and g = log f in fp32 or finer, [b, t, d] each."""
        q_btd, z_btd, i_btd = project(x_btd, self.w_q, self.w_f, self.w_i)
        if self.config.variant == "unit":
            q_btd, i_btd = q_btd.sigmoid(), F.silu(i_btd)
        else:
            q_btd = F.silu(q_btd)
        z_btd = z_btd.to(torch.promote_types(z_btd.dtype, torch.float32))
        k_btd, g_btd = torch.sigmoid(-z_btd), F.logsigmoid(z_btd)
        bound = self.bound(z_btd.device, z_btd.dtype)
        if bound is not None:
            beta_d, rest_d = bound
            k_btd, g_btd = rest_d * k_btd, torch.logaddexp(beta_d.log(), rest_d.log() + g_btd)
        return q_btd, i_btd, k_btd, g_btd

    def bound(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """β and 1 − β; None where β is 0."""
        if self._bounds:
            beta_d, rest_d = self._bounds[0](self.layer)
            return beta_d.to(device, dtype), rest_d.to(device, dtype)
        number = self.config.lower_bound
        if isinstance(number, str) or number == 0:
            return None
        # filled in place on the device, which the host need not wait for
        beta, rest = (torch.full((), value, device=device, dtype=dtype) for value in (number, 1 - number))
        return beta, rest

    def _mix(
        self,
        q_btd: Tensor,
        k_btd: Tensor,
        i_btd: Tensor,
        g_btd: Tensor,
        limits: Boundaries,
        state: RecurrentState | None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs of all heads side by side, and the last state."""
        config, starts_bt, before_bhkv = self.config, limits.starts_bt, None if state is None else state.tensors["s"]
        if before_bhkv is not None and limits.plain:  # only the first token can be a start
            before_bhkv = before_bhkv.masked_fill(starts_bt[:, 0, None, None, None], 0.0)
        starts = None if limits.plain else starts_bt
        q, k, i, g = (x.unflatten(-1, (self.heads, self.ratio)) for x in (q_btd, k_btd, i_btd, g_btd))
        if config.mode == "recurrent" or (config.mode == "auto" and q.shape[1] == 1):
            o_bthv, last_bhkv = gated_linear_recurrence(q, k, i, g, before_bhkv, self.scale, starts)
        elif config.chunk_size is None and use_kernels(config.backend, i.device, i.dtype, self.ratio):
            o_bthv, last_bhkv = fla_gated_linear_attention(q, k, i, g, before_bhkv, self.scale, starts)
        else:
            o_bthv, last_bhkv = gated_linear_attention(q, k, i, g, before_bhkv, self.scale, config.chunk_size, starts)
        return o_bthv.flatten(2), last_bhkv

    def new_state(self, batch: int, capacity: int, device: torch.device | str, dtype: torch.dtype) -> RecurrentState:
        """An empty state: `s` [b, h, k, v] in fp32 or finer. Its size is the same for any capacity."""
        shape = (batch, self.heads, self.ratio, self.ratio)
        fine = torch.promote_types(dtype, torch.float32)
        return RecurrentState({"s": torch.zeros(shape, device=device, dtype=fine)}, capacity)

    def flops(self, length: int) -> float:
        """Forward FLOPs per token: projections, state read and written (4 · width · E), pairs within a chunk.

        The recurrence has no such pairs; they are counted as in the chunked form, which training runs.
        """
        layers = (self.w_q, self.w_f, self.w_i, self.w_o)
        core = core_flops(length, self.ratio, self.ratio, self.config.chunk_size)
        return sum(map(layer_flops, layers)) + self.heads * core

    def diagnostics(self) -> dict[str, float]:
        """The mean lower bound; of the last parallel pass, padding left out, the mean forget gate and the memory that goes with
        it in tokens."""
        found = {"lower bound": float(self._beta().mean())}
        key = math.nan if self.mean_key is None else float(self.mean_key)
        if not math.isnan(key):
            found |= {"forget gate": 1 - key, "memory": 1 / max(key, 1e-9)}
        return found

    @torch.no_grad()
    def _beta(self) -> Tensor:
        """β of every channel [d], on the CPU."""
        bound = self.bound(torch.device("cpu"), torch.float64)
        return torch.zeros(self.width, dtype=torch.float64) if bound is None else bound[0].expand(self.width)

    def parameter_roles(self) -> Roles:
        """q and f meet behind nonlinear functions, i and o around a norm: no two act through their product alone."""
        return roles(self, dict.fromkeys(("w_q", "w_f", "w_i", "w_o"), "other"))

    def residual_parameters(self) -> tuple[str, ...]:
        """Weights that write into the residual stream."""
        return matrices(self, "w_o")


def _mean(k_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
    """The mean of keys that are 0 for padding over all others; NaN where there is none."""
    return k_btd.mean() if valid_bt is None else k_btd.sum() / (valid_bt.sum() * k_btd.shape[2])


def _shared_bounds(context: BuildContext) -> LowerBounds:
    """Γ of the model.

    Raises:
        ConfigError: it has no row for this layer, or another width.
    """
    bounds: LowerBounds = context.share(NAME, lambda: LowerBounds(context.depth, context.width))
    rows, width = bounds.gamma.shape
    if context.layer >= rows or width != context.width:
        raise ConfigError(
            f"layer {context.layer} of width {context.width} asks for a learned lower bound, and the model's bounds are for "
            f"{rows} layers of width {width}; build every layer with the model's own depth and width."
        )
    return bounds


# What a trained model remembers -------------------------------------------------------------------

MEMORY_EDGES = tuple(2.0**exponent for exponent in range(1, 13))  # tokens


@dataclass(frozen=True)
class LayerMemory:
    """How long one layer remembers.

    Attributes:
        path: of the mixer in the model, "blocks.3.mixer".
        layer: index of the block in its stack.
        shares: of all gates (tokens times channels), by effective memory 1 / (1 − f) in tokens: below 2, 2 to 4, … and 4096
            or more; they sum to 1.
        median: effective memory in tokens.
        beta: lower bound of each channel.
        state_bytes: of one sequence.
    """

    path: str
    layer: int
    shares: tuple[float, ...]
    median: float
    beta: tuple[float, ...]
    state_bytes: int


@torch.no_grad()
def memories(model: nn.Module, tokens_bt: Tensor) -> list[LayerMemory]:
    """The memory of every hgrn2 layer that runs while a model reads these tokens; empty for a model without any."""
    mixers = {path: module for path, module in model.named_modules() if isinstance(module, HGRN2)}
    keys: dict[str, Tensor] = {}

    def look(path: str, mixer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(mixer, HGRN2)
        keys[path] = mixer.gates(inputs[0])[2].flatten()

    hooks = [mixer.register_forward_pre_hook(partial(look, path)) for path, mixer in mixers.items()]
    try:
        model(tokens_bt)
    finally:
        for hook in hooks:
            hook.remove()
    return [_memory(path, mixer, keys[path].double()) for path, mixer in mixers.items() if path in keys]


def _memory(path: str, mixer: HGRN2, key_n: Tensor) -> LayerMemory:
    memory_n = 1 / key_n.clamp_min(1e-12)
    edges_e = torch.tensor(MEMORY_EDGES, dtype=memory_n.dtype, device=memory_n.device)
    counts_e = torch.bucketize(memory_n, edges_e, right=True).bincount(minlength=len(MEMORY_EDGES) + 1)
    return LayerMemory(
        path=path,
        layer=mixer.layer,
        shares=tuple((counts_e / counts_e.sum()).tolist()),
        median=float(memory_n.median()),
        beta=tuple(mixer._beta().tolist()),
        state_bytes=4 * mixer.width * mixer.ratio,
    )
