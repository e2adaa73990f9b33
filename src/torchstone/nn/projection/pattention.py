"""Pattention: attention from a token to a list of learned parameter tokens, in place of a weight matrix.

TokenFormer (Wang et al., arXiv 2410.23168, eq. 4-6). With keys K [n, d] and values V [n, e],

    A = x Kᵀ,   Â = τ · A / √(‖A‖² + ε),   y = GELU(Â) V                                       ‖·‖ over the n parameter tokens

The number n of parameter tokens is independent of the widths d and e, so a trained layer is enlarged by appending rows to
K and V (`torchstone.models.growth`). τ = √n when the layer is made, and it is a stored buffer: it stays what it was when
rows are appended, which is what makes growth with zero keys exact. `norm_mode`:

  l2-norm-gelu  as above: the paper's formula and every released configuration
  gelu-l2-norm  τ · GELU(A) / √(‖GELU(A)‖² + ε)
  softmax       τ² · softmax(A); the factor (n at creation) keeps the variance of the output
  none          GELU(A): the two layers of an MLP without biases

Shapes: n parameter tokens · d inputs · e outputs; leading dimensions are free.

Pitfalls: the global scale of K has no effect on the function under l2-norm-gelu, only on its gradient. ‖A‖ is taken in fp32
(fp64 for fp64 input), and ε makes a row of zeros give zeros. There is no 1/√d. A bias that the layer around asks for (q, k
and v biases of attention) is added to the output; TokenFormer itself has none. Frozen rows (`frozen_…_tokens`) are
parameters of their own without gradient, so that neither updates nor weight decay reach them. l2-norm-gelu has no second
derivative: taking its gradient with `create_graph` raises ConfigError, whether or not the graph is then used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.nn.context import BuildContext, Use
from torchstone.recipe.part import Part

NormMode = Literal["l2-norm-gelu", "gelu-l2-norm", "softmax", "none"]
APPROXIMATE = {"exact": "none", "tanh": "tanh"}
KEY_STD = 0.02
UNUSED: dict[str, tuple[str, ...]] = {
    "l2-norm-gelu": (),
    "gelu-l2-norm": (),
    "softmax": ("gelu", "eps"),
    "none": ("tau", "eps"),
}
"""Settings that a mode does not use."""
BLOCK = 1 << 17  # products of a block on the CPU, 128 KiB in fp32: below what an allocator asks the system for


class NormThenGelu(torch.autograd.Function):
    """GELU(τ · A / √(‖A‖² + ε)) and its gradient in few passes over the scores, which are overwritten by Â.

    With â = Â/τ, s = τ/√(‖A‖² + ε) and u = GELU'(Â) ⊙ ∂G:  ∂A = s (u − â (â·u)). It keeps Â, where plain operations keep
    the scores, their square and Â. New blocks of memory cost more than the arithmetic, so there is none but the result's.
    """

    @staticmethod
    def forward(ctx: Any, scores_n: Tensor, tau: Tensor, eps: float, approximate: str) -> tuple[Tensor, Tensor]:
        """Weights of the values, in the type of the scores, and Â in the place of the scores."""
        fine = torch.promote_types(scores_n.dtype, torch.float32)
        norm_1 = torch.linalg.vector_norm(scores_n, dim=-1, keepdim=True, dtype=fine)
        scale_1 = tau.to(fine) * norm_1.square_().add_(eps).rsqrt_()
        scores_n.mul_(scale_1)
        ctx.mark_dirty(scores_n)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores_n, scale_1, tau)
        ctx.approximate = approximate
        return F.gelu(scores_n, approximate=approximate), scores_n

    @staticmethod
    def backward(ctx: Any, gradient_n: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
        """Gradient of the scores."""
        if gradient_n is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            raise ConfigError(
                "pattention under norm_mode l2-norm-gelu has no second derivative, and its gradient was taken with create_graph; "
                "take it without, or choose another norm_mode."
            )
        normed_n, scale_1, tau = ctx.saved_tensors
        u_n = torch.ops.aten.gelu_backward(gradient_n, normed_n, approximate=ctx.approximate)
        along_1 = _row_products(u_n, normed_n, scale_1.dtype) / tau.to(scale_1.dtype).square()
        u_n.addcmul_(normed_n, along_1.to(u_n.dtype), value=-1)
        return u_n.mul_(scale_1), None, None, None


def _row_products(u_n: Tensor, v_n: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ u v over the last dimension, […, 1]; on the CPU in blocks of rows, whose products stay in the cache."""
    if u_n.device.type != "cpu":
        return (u_n * v_n).sum(-1, keepdim=True, dtype=dtype)
    u_rn, v_rn = u_n.reshape(-1, u_n.shape[-1]), v_n.reshape(-1, v_n.shape[-1])
    rows = max(1, BLOCK // u_rn.shape[1])
    sums = [(u * v).sum(-1, dtype=dtype) for u, v in zip(u_rn.split(rows), v_rn.split(rows), strict=True)]
    return torch.cat(sums).view(*u_n.shape[:-1], 1)


class PattentionSettings(Part):
    """What the projection and the feed-forward of this kind share."""

    norm_mode: NormMode = Field(default="l2-norm-gelu", description="how scores become weights of the values")
    gelu: Literal["exact", "tanh"] = Field(
        default="exact", description="GELU by the error function, or its tanh form; softmax has none"
    )
    tau: float | None = Field(default=None, gt=0, description="scale τ of a new layer; null: √n; none has no scale")
    eps: float = Field(
        default=1e-8, gt=0, description="added to the sum of squares over the parameter tokens; for the l2-norm modes"
    )

    @model_validator(mode="after")
    def _has_effect(self) -> PattentionSettings:
        for name in UNUSED[self.norm_mode]:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(
                    f"norm_mode {self.norm_mode} does not use {name}, and {value} was given; remove it, or choose another "
                    "norm_mode."
                )
        return self


class Pattention(nn.Module):
    """A map from `inputs` to `outputs` channels through parameter tokens.

    Args:
        settings: mode, GELU, τ and ε.
        inputs, outputs: channels.
        tokens: parameter tokens n, frozen ones included.
        frozen: of these, the first ones that are not trained.
        value_std: standard deviation of the initial values.
        use: what the map is for, by which growth and the recipe name it.
        bias: add a learned vector to the output.

    Raises:
        ConfigError: no token is left to train.
    """

    def __init__(
        self,
        settings: PattentionSettings,
        inputs: int,
        outputs: int,
        tokens: int,
        frozen: int,
        value_std: float,
        use: Use,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if frozen >= tokens:
            raise ConfigError(
                f"{frozen} of {tokens} parameter tokens of use {use!r} are frozen; leave at least one to train."
            )
        self.settings, self.use, self.value_std = settings, use, value_std
        self.in_features, self.out_features = inputs, outputs
        if frozen:
            self.frozen_keys_nd = nn.Parameter(torch.empty(frozen, inputs), requires_grad=False)
            self.frozen_values_ne = nn.Parameter(torch.empty(frozen, outputs), requires_grad=False)
        self.keys_nd = nn.Parameter(torch.empty(tokens - frozen, inputs))
        self.values_ne = nn.Parameter(torch.empty(tokens - frozen, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.tau: Tensor
        self.register_buffer("tau", torch.empty(()))

    @property
    def frozen(self) -> int:
        """Parameter tokens that are not trained."""
        return self.frozen_keys_nd.shape[0] if "frozen_keys_nd" in self._parameters else 0

    @property
    def tokens(self) -> int:
        """Parameter tokens n."""
        return self.frozen + self.keys_nd.shape[0]

    def keys(self) -> Tensor:
        """All keys [n, d], frozen ones first."""
        return torch.cat([self.frozen_keys_nd, self.keys_nd]) if self.frozen else self.keys_nd

    def values(self) -> Tensor:
        """All values [n, e], frozen ones first."""
        return torch.cat([self.frozen_values_ne, self.values_ne]) if self.frozen else self.values_ne

    def forward(self, x_d: Tensor) -> Tensor:
        """[…, d] → […, e]."""
        y_e = self.weights(x_d) @ self.values()
        return y_e if self.bias is None else y_e + self.bias.to(y_e.dtype)

    def weights(self, x_d: Tensor) -> Tensor:
        """Weights […, n] of the values for inputs […, d]."""
        scores_n = F.linear(x_d, self.keys())
        settings, approximate = self.settings, APPROXIMATE[self.settings.gelu]
        if settings.norm_mode == "l2-norm-gelu":
            return NormThenGelu.apply(scores_n, self.tau, settings.eps, approximate)[0]
        fine = torch.promote_types(scores_n.dtype, torch.float32)
        if settings.norm_mode == "softmax":
            return (scores_n.softmax(-1, dtype=fine) * self.tau.to(fine).square()).to(scores_n.dtype)
        weights_n = F.gelu(scores_n, approximate=approximate)
        if settings.norm_mode == "none":
            return weights_n
        squares_1 = weights_n.to(fine).square().sum(-1, keepdim=True)
        return (weights_n * (self.tau.to(fine) * (squares_1 + settings.eps).rsqrt())).to(scores_n.dtype)

    def fill_buffers(self) -> None:
        """τ of a new layer."""
        self.tau.fill_(math.sqrt(self.tokens) if self.settings.tau is None else self.settings.tau)

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """Keys N(0, 0.02²) and values N(0, (2/(L√d))²), L blocks and d the model's width (the released code)."""
        stds = {
            name: KEY_STD if "keys" in name else self.value_std for name, _ in self.named_parameters() if name != "bias"
        }
        return {name: partial(_fill_normal, std) for name, std in stds.items()}

    def flops(self) -> float:
        """Forward FLOPs per token of the two products."""
        return 2.0 * self.tokens * (self.in_features + self.out_features)

    def activation_values(self) -> int:
        """Values per token kept for the backward pass: input, normalised scores, weights, output."""
        return self.in_features + 2 * self.tokens + self.out_features

    def extra_repr(self) -> str:
        """Sizes, for printing the model."""
        frozen = f", frozen={self.frozen}" if self.frozen else ""
        return f"{self.in_features}, {self.out_features}, tokens={self.tokens}{frozen}, {self.settings.norm_mode}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """τ scales every score, so a conversion of the model to half precision does not reach it."""
        before = self.tau
        super()._apply(fn, recurse)
        if self.tau.dtype.itemsize < torch.float32.itemsize:
            self.tau = before.to(self.tau.device)
        return self


def _fill_normal(std: float, tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor.normal_(0.0, std, generator=generator)


def released_value_std(context: BuildContext) -> float:
    """Standard deviation of initial values, 2/(L√d)."""
    return 2.0 / (context.depth * math.sqrt(context.width))


class PattentionConfig(PattentionSettings):
    """`projection: pattention`."""

    family: ClassVar[str] = "projection"
    kind: Literal["pattention"] = "pattention"
    input_tokens: int | None = Field(
        default=None, gt=0, description="parameter tokens of maps into a mixer (q, k, v); null: the model's width"
    )
    output_tokens: int | None = Field(
        default=None, gt=0, description="parameter tokens of maps out of a mixer; null: the model's width"
    )
    feedforward_tokens: int | None = Field(
        default=None,
        gt=0,
        description="parameter tokens of each map of an mlp, swiglu or geglu feed-forward; null: the model's width; no effect "
        "beside feedforward smoe or pattention, which have sizes of their own",
    )
    frozen_input_tokens: int = Field(default=0, ge=0, description="first tokens of maps into a mixer, not trained")
    frozen_output_tokens: int = Field(default=0, ge=0, description="first tokens of maps out of a mixer, not trained")
    frozen_feedforward_tokens: int = Field(
        default=0,
        ge=0,
        description="first tokens of feed-forward maps, not trained; no effect beside smoe or pattention",
    )

    def build(self, context: BuildContext, inputs: int, outputs: int, use: Use, bias: bool) -> Pattention:
        """The layer."""
        given = {"input": self.input_tokens, "output": self.output_tokens, "feedforward": self.feedforward_tokens}[use]
        frozen = {
            "input": self.frozen_input_tokens,
            "output": self.frozen_output_tokens,
            "feedforward": self.frozen_feedforward_tokens,
        }[use]
        tokens = context.width if given is None else given
        return Pattention(self, inputs, outputs, tokens, frozen, released_value_std(context), use, bias)
