"""The mixer `differential`: softmax attention minus a learned multiple of a second softmax attention.

What both maps put on irrelevant tokens cancels, as noise does in a differential amplifier; the difference may be
sparse and negative, which one softmax cannot be. `version` selects the function: `v1` is the paper (arXiv 2410.05258),
`v2` the authors' later revision. Each is explained in its own file.

`heads` counts differential heads. A plain attention with H heads corresponds to H/2 heads of version 1 (each is twice
as wide) and to H heads of version 2; putting this kind in the place of `attention` keeps that correspondence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from torchstone.errors import ConfigError
from torchstone.nn.attention.differential_v1 import DifferentialV1, Pairing, scheduled_lambda
from torchstone.nn.attention.differential_v2 import DifferentialV2
from torchstone.nn.attention.heads import resolve_heads
from torchstone.nn.attention.mixer import build_scores
from torchstone.nn.attention.replacing import refuse_lost
from torchstone.nn.context import BuildContext
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field


class DifferentialConfig(Part):
    """`mixer: differential`."""

    family: ClassVar[str] = "mixer"
    kind: Literal["differential"] = "differential"
    version: Literal["v1", "v2"] = Field(default="v1", description="v1: the paper; v2: the authors' revision")
    heads: int | None = Field(
        default=None, gt=0, description="differential heads; null: from replaces_heads, else from head_dim"
    )
    kv_heads: int | None = Field(default=None, gt=0, description="KV heads; null: as many as heads")
    head_dim: int | None = Field(
        default=None, gt=0, description="channels d of a sub-head (v1) or head (v2); null: from heads, or the model's"
    )
    replaces_heads: int | None = Field(
        default=None,
        gt=0,
        description="heads of the plain attention in whose place this stands: v1 has half, v2 as many",
    )
    replaces_kv_heads: int | None = Field(default=None, gt=0, description="the same for kv_heads")
    window: int | None = Field(default=None, gt=0, description="sliding window in tokens; null: the whole past")
    lambda_init: Literal["schedule"] | float = Field(
        default="schedule", description="v1: 0.8 - 0.6 exp(-0.3 layer), or a constant"
    )
    head_norm: bool = Field(default=True, description="v1: RMSNorm on each head's output")
    kv_pairing: Pairing = Field(default="flash", description="v1 with grouped KV heads: which keys a map reads")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="must be 0: two maps have no common dropout mask")
    position: part_field("position") = {"kind": "rotary"}  # type: ignore[valid-type]
    score_processor: part_field("score_processor") | None = Field(  # type: ignore[valid-type]
        default=None, description="what changes the scores of all maps before the softmax; null: nothing"
    )

    @classmethod
    def inherit(cls, previous: Mapping[str, Any]) -> dict[str, Any]:
        """Head counts of a plain attention become `replaces_heads`, so that the version decides what they mean.

        Raises:
            ConfigError: the replaced attention has a norm, a bias or a window that this kind lacks, which would be lost unseen.
        """
        refuse_lost(cls, previous)
        kept = super().inherit(previous)
        if previous["kind"] == "differential":
            return kept
        for name in ("heads", "kv_heads"):
            count = kept.pop(name, None)
            if count is not None:
                kept[f"replaces_{name}"] = count
        return kept

    def build(self, context: BuildContext) -> DifferentialV1 | DifferentialV2:
        """The module.

        Raises:
            ConfigError: dropout above 0, a setting of the other version, odd counts where halves are needed, or head
                counts and width that do not fit.
        """
        if self.dropout > 0:
            raise ConfigError(
                f"differential attention was given dropout {self.dropout:g}; its two maps have no common dropout mask, "
                "so only dropout 0 is allowed."
            )
        unit = 2 if self.version == "v1" else 1
        heads, kv_heads = self._counts(unit)
        resolved = resolve_heads(f"differential {self.version}", context, heads, kv_heads, self.head_dim, unit)
        position, processor = build_scores(self, context, resolved.dim, resolved.query, 2 * resolved.query)
        if self.version == "v1":
            scheduled = self.lambda_init == "schedule"
            lambda_init = scheduled_lambda(context.layer) if scheduled else float(self.lambda_init)
            return DifferentialV1(
                context, resolved, position, lambda_init, self.head_norm, self.kv_pairing, self.window, processor
            )
        self._refuse_v1_settings()
        return DifferentialV2(context, resolved, position, self.window, processor)

    def _counts(self, unit: int) -> tuple[int | None, int | None]:
        """Heads and KV heads, from those given or from those replaced."""
        counts = []
        for name in ("heads", "kv_heads"):
            given, replaced = getattr(self, name), getattr(self, f"replaces_{name}")
            if given is None and replaced is not None:
                if replaced % unit:
                    raise ConfigError(
                        f"differential v1 has half the {name} of the attention that it replaces, and "
                        f"replaces_{name} is {replaced}, which is odd; make it even, or set {name}."
                    )
                given = replaced // unit
            counts.append(given)
        return counts[0], counts[1]

    def _refuse_v1_settings(self) -> None:
        """Version 2 has none of these; a value other than the default would be ignored."""
        for name in ("lambda_init", "head_norm", "kv_pairing"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ConfigError(
                    f"differential v2 has no {name}, and {value!r} was given; remove it, or choose version v1."
                )
