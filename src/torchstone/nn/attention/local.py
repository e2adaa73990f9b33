"""Local attention as Griffin and RecurrentGemma have it (De et al., arXiv 2402.19427; Botev et al., arXiv 2404.07839).

Multi-query attention (one key and one value head for all query heads) over a sliding window, with rotary positions on the first
half of each head and a bias on the output projection alone. It is `MultiHeadAttention` with those settings: a block of
its own kind so that a pattern such as R, R, A can name it.

Shapes: see `nn.attention.multihead`.

Pitfall: `window_convention`. In the released code a query sees keys up to W tokens back, which are W + 1 keys (`plus-one`);
other code bases, and `attention` here, see W keys with the current one (`inclusive`). Weights trained with one change their
output under the other once a text is longer than W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from torchstone.errors import ConfigError
from torchstone.nn.attention.heads import resolve_heads
from torchstone.nn.attention.multihead import MultiHeadAttention, WindowConvention, keys_in_window
from torchstone.nn.attention.replacing import refuse_lost
from torchstone.nn.context import BuildContext
from torchstone.nn.position.base import PositionContext
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field

ROTARY = {"kind": "rotary", "variant": "partial", "p": 0.5, "layout": "half"}


class LocalAttentionConfig(Part):
    """`mixer: local-attention`."""

    family: ClassVar[str] = "mixer"
    kind: Literal["local-attention"] = "local-attention"
    heads: int | None = Field(default=None, gt=0, description="query heads; null: width / head_dim")
    kv_heads: int = Field(default=1, gt=0, description="key-value heads")
    head_dim: int | None = Field(
        default=None, gt=0, description="channels per head; null: width / heads, or the model's head_dim"
    )
    window: int = Field(default=2048, gt=0, description="sliding window in tokens")
    window_convention: WindowConvention = Field(
        default="inclusive", description="keys that a window of W sees: W with the current one, or W + 1 (plus-one)"
    )
    output_bias: bool = Field(default=True, description="bias of the output projection")
    position: part_field("position") = ROTARY  # type: ignore[valid-type]

    @classmethod
    def inherit(cls, previous: Mapping[str, Any]) -> dict[str, Any]:
        """Heads, and a window if there is one: the rest is what makes this kind what it is.

        Raises:
            ConfigError: the replaced attention has a norm, a bias, dropout or a score processor, which would be lost unseen.
        """
        if previous["kind"] == "local-attention":
            return super().inherit(previous)
        refuse_lost(cls, previous)
        kept = {name: previous.get(name) for name in ("heads", "head_dim", "window")}
        if kept["window"] is not None:
            kept["window_convention"] = previous.get("window_convention", "inclusive")
        return {name: value for name, value in kept.items() if value is not None}

    def build(self, context: BuildContext) -> MultiHeadAttention:
        """The module; raises ConfigError where head counts and width do not fit, or half a head has no pairs."""
        heads = resolve_heads("local-attention", context, self.heads, self.kv_heads, self.head_dim)
        turning = getattr(self.position, "variant", None) == "partial" and self.position.p * heads.dim
        if turning % 2:
            raise ConfigError(
                f"local-attention turns {turning:g} of {heads.dim} channels of a head (p {self.position.p:g}), and rotation "
                "needs an even number; choose a head_dim that is a multiple of 4, or another position."
            )
        position = self.position.build(PositionContext(heads.dim, heads.query, context.length, processed=False))
        window = keys_in_window(self.window, self.window_convention)
        return MultiHeadAttention(context, heads, position, window, output_bias=self.output_bias)
