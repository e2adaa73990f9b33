"""SGD with momentum, as the inner rule of rotational updates and by itself.

    g ← g + λ W;   m ← μ m + g;   W ← W − η m

The decay goes through the momentum buffer, as in torch's SGD; `optimizer: rotational` with this inner rule decays by its angle.

Pitfall: the buffer is a sum, so that an update is 1/(1−μ) times as long as its gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from torchstone.optim import momentum_direction as rules
from torchstone.optim.momentum import MomentumOptimizer
from torchstone.optim.momentum_config import MomentumSettings, limited
from torchstone.optim.momentum_direction import Direction
from torchstone.optim.rotational_groups import named_groups


class SGDM(MomentumOptimizer):
    """SGD with momentum.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: learning rate η.
        momentum: μ.
        weight_decay: λ, through the momentum.
        fused: False for tensor operations only.

    Raises:
        ConfigError: see `MomentumOptimizer`.
    """

    moments = ("momentum_buffer",)
    sums = True

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, fused)

    def direction(self, group: Mapping[str, Any], step: int) -> Direction:
        """See `MomentumOptimizer`."""
        return rules.sgdm(group["momentum"], "none", step)

    def beta_of(self, group: Mapping[str, Any]) -> float:
        """See `MomentumOptimizer`."""
        return float(group["momentum"])


class SGDMConfig(MomentumSettings):
    """`optimizer: sgdm`."""

    family: ClassVar[str] = "optimizer"
    kind: Literal["sgdm"] = "sgdm"
    learning_rate: float = Field(default=0.1, gt=0, description="peak learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="decay of the momentum, a sum of gradients")
    clip: float | None = Field(default=1.0, gt=0, description="largest global gradient norm; null: no clipping")

    def build(self, model: nn.Module) -> SGDM:
        """The optimizer over the model's trainable parameters; raises ConfigError (see `decay_groups`)."""
        return limited(self, SGDM(named_groups(model, self.weight_decay), self.learning_rate, self.momentum))
