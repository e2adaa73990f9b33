"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) in torch's fused form, with decay only where it belongs.

    m ← β1 m + (1−β1) g;  v ← β2 v + (1−β2) g²;  θ ← θ − η ( m̂ / (√v̂ + ε) + λ θ )

The peak rate η is multiplied by the schedule's factor at every step. `clip` bounds the global gradient norm before the
update; the trainer applies it. λ may differ by what a matrix does (`optim.weight_decay`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from torchstone.optim.groups import parameter_groups
from torchstone.optim.settings import carried_over
from torchstone.optim.weight_decay import WeightDecay
from torchstone.recipe.part import Part

Share = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(Part):
    """`optimizer: adamw`."""

    family: ClassVar[str] = "optimizer"
    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.95), description="decay of the two moment averages")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: WeightDecay = Field(
        default=WeightDecay(), description="decoupled decay of matrices, for all or by role; vectors are not decayed"
    )
    clip: float | None = Field(default=1.0, gt=0, description="largest global gradient norm; null: no clipping")

    @classmethod
    def inherit(cls, previous: Mapping[str, Any]) -> dict[str, Any]:
        """Decay, and the rate of optimizers whose rates have the same scale (see `carried_over`)."""
        return carried_over(cls.model_fields, "adamw", previous)

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer over the model's trainable parameters; raises ConfigError (see `parameter_groups`)."""
        groups = parameter_groups(model, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True)
