"""Lion (Chen et al., arXiv 2302.06675): the sign of a mixture of momentum and gradient.

    d = sign(β1 m + (1−β1) g);   m ← β2 m + (1−β2) g;   W ← W − η (d + λ W)

Every element moves by η, so that rates are 3 to 10 times smaller than AdamW's, and λ as much larger. One buffer of state.

Pitfall: the size of a gradient has no effect on the size of the update, so that clipping changes only how gradients mix in the
momentum. It is off by default here, also to keep comparisons clean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from torchstone.optim import momentum_direction as rules
from torchstone.optim.momentum import MomentumOptimizer
from torchstone.optim.momentum_config import MomentumSettings, Share, limited
from torchstone.optim.momentum_direction import Direction
from torchstone.optim.rotational_groups import named_groups


class Lion(MomentumOptimizer):
    """Lion.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: learning rate η.
        betas: β1 of the direction, β2 of the momentum.
        weight_decay: decoupled λ.
        fused: False for tensor operations only.

    Raises:
        ConfigError: see `MomentumOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}, fused)

    def direction(self, group: Mapping[str, Any], step: int) -> Direction:
        """See `MomentumOptimizer`."""
        return rules.lion(group["betas"])

    def beta_of(self, group: Mapping[str, Any]) -> float:
        """See `MomentumOptimizer`."""
        return float(group["betas"][1])


class LionConfig(MomentumSettings):
    """`optimizer: lion`."""

    family: ClassVar[str] = "optimizer"
    kind: Literal["lion"] = "lion"
    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate; 3 to 10 times below AdamW's")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.99), description="β1 of the direction, β2 of the momentum")

    def build(self, model: nn.Module) -> Lion:
        """The optimizer over the model's trainable parameters; raises ConfigError (see `decay_groups`)."""
        return limited(self, Lion(named_groups(model, self.weight_decay), self.learning_rate, self.betas))
