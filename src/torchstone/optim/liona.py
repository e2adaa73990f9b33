"""LionA: Lion with AdamW's update size (after Kosson et al., arXiv 2410.23922).

    m ← β m + (1−β) g;   v = β m + (1−β) g with Nesterov, else m;   u = γ sign(v), γ = √((1−β)/(1+β));   W ← W − η (u + λ W)

The root mean square of u is γ at every step, AdamW's own once gradients are uncorrelated: so AdamW's η and λ carry over, and the
4.4 times longer first updates of AdamW (β = 0.9) are gone. It fixes the ℓ2 size of updates and nothing else. The paper has no
released code; γ is this project's scaling.

`bias_correction` is described in `optim.momentum_direction`; `inverse` and `rms` make early updates smaller on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from torchstone.optim import momentum_direction as rules
from torchstone.optim.momentum import MomentumOptimizer
from torchstone.optim.momentum_config import MomentumSettings, limited
from torchstone.optim.momentum_direction import BiasCorrection, Direction, check_correction
from torchstone.optim.rotational_groups import named_groups


class LionA(MomentumOptimizer):
    """LionA.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: learning rate η, as for AdamW.
        beta: β of the momentum.
        weight_decay: decoupled λ.
        nesterov: mix the gradient in once more.
        bias_correction: of the momentum that starts at 0.
        fused: False for tensor operations only.

    Raises:
        ConfigError: see `MomentumOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        bias_correction: BiasCorrection = "none",
        fused: bool | None = None,
    ) -> None:
        check_correction(bias_correction)
        defaults = {
            "lr": lr,
            "beta": beta,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, fused)

    def direction(self, group: Mapping[str, Any], step: int) -> Direction:
        """See `MomentumOptimizer`."""
        return rules.liona(group["beta"], group["nesterov"], group["bias_correction"], step)

    def beta_of(self, group: Mapping[str, Any]) -> float:
        """See `MomentumOptimizer`."""
        return float(group["beta"])


class LionAConfig(MomentumSettings):
    """`optimizer: liona`."""

    family: ClassVar[str] = "optimizer"
    kind: Literal["liona"] = "liona"
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate, as for AdamW")
    beta: float = Field(default=0.9, ge=0, lt=1, description="decay of the momentum")
    nesterov: bool = Field(default=False, description="Nesterov's momentum")
    bias_correction: BiasCorrection = Field(
        default="none",
        description="inverse and rms: times 1 - beta^t or its root-mean-square form; adam: of the momentum",
    )

    def build(self, model: nn.Module) -> LionA:
        """The optimizer over the model's trainable parameters; raises ConfigError (see `decay_groups`)."""
        groups = named_groups(model, self.weight_decay)
        optimizer = LionA(
            groups, self.learning_rate, self.beta, nesterov=self.nesterov, bias_correction=self.bias_correction
        )
        return limited(self, optimizer)
