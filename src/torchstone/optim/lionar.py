"""LionAR: the sign of the momentum as direction, the angle of every step fixed (after Kosson et al., arXiv 2410.23922).

Matrices take the rotational update (`optim.momentum_update`) with LionA's direction; every row turns by

    θ = √(2λ/η_peak) · η · γ   (angle_schedule linear: the angle follows the schedule in proportion; needs η_peak)
    θ = √(2ηλ) · γ             (sqrt)                                     γ = √((1−β)/(1+β)), as AdamW with this β

exactly, as `update_norm_decay` is 0 here. What does not rotate takes LionA's steps: vectors without decay, groups with
`rotational: False` with theirs. Early updates are then neither longer nor larger in angle than late ones.

With β = 0.98, Nesterov's momentum and the inverse bias correction (the defaults) the paper needed no warmup. It has no released
code; this is a definition that follows its text, and the linear angle is this project's.

Pitfalls: as of `optim.rotational`. `inverse` multiplies the angle by 1 − β^t, a warmup of about 1/(1−β) steps of its own; choose
`none` for an angle that is the same from the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from torchstone.errors import ConfigError
from torchstone.optim import momentum_direction as rules
from torchstone.optim.angle import AngleSchedule, average_rms, lion_rms, lionar_angle
from torchstone.optim.momentum import MomentumOptimizer
from torchstone.optim.momentum_config import limited
from torchstone.optim.momentum_direction import BiasCorrection, Direction, check_correction
from torchstone.optim.rotational import RotationSettings, check_something_rotates, rotation_settings
from torchstone.optim.rotational_groups import rotational_groups

BETA = 0.98


class LionAR(MomentumOptimizer):
    """LionAR.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: learning rate η, as for AdamW.
        beta: β of the momentum, 0.98 unless betas are given.
        betas: β1, β2 of Lion's own mixture, in place of beta and nesterov.
        weight_decay: λ, which sets the angle.
        nesterov: mix the gradient in once more; default True with beta.
        bias_correction: of the momentum that starts at 0.
        fused: False for tensor operations only.
        rotation: settings in `torchstone.optim.rotational.ROTATION`; here update_norm_decay is 0 and angle_schedule linear unless
            given, so that peak_lr is needed.

    Raises:
        ConfigError: settings that exclude each other, and see `MomentumOptimizer`.
    """

    rest_decays = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta: float | None = None,
        betas: tuple[float, float] | None = None,
        weight_decay: float = 0.1,
        nesterov: bool | None = None,
        bias_correction: BiasCorrection = "inverse",
        fused: bool | None = None,
        **rotation: Any,
    ) -> None:
        check_correction(bias_correction)
        if betas is not None and (beta is not None or nesterov is not None or bias_correction == "adam"):
            raise ConfigError(
                "betas are Lion's own mixture of momentum and gradient, and beta, nesterov or bias_correction adam was given "
                "beside them; give either betas, or beta with nesterov."
            )
        defaults: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "bias_correction": bias_correction}
        if betas is None:
            defaults |= {"beta": BETA if beta is None else beta, "nesterov": nesterov is not False}
        else:
            defaults["betas"] = tuple(betas)
        rotation = rotation_settings(rotation, update_norm_decay=0.0, angle_schedule="linear")
        super().__init__(params, {**defaults, **rotation}, fused)
        check_something_rotates(self)

    def direction(self, group: Mapping[str, Any], step: int) -> Direction:
        """See `MomentumOptimizer`."""
        if "betas" in group:
            return replace(rules.lion(group["betas"]), scale=lion_rms(group["betas"]))
        return rules.liona(group["beta"], group["nesterov"], group["bias_correction"], step)

    def angle(self, group: Mapping[str, Any], lr: float) -> float:
        """See `MomentumOptimizer`."""
        gamma = lion_rms(group["betas"]) if "betas" in group else average_rms(group["beta"])
        return lionar_angle(lr, group["weight_decay"], gamma)

    def beta_of(self, group: Mapping[str, Any]) -> float:
        """See `MomentumOptimizer`."""
        return float(group["betas"][1] if "betas" in group else group["beta"])


class LionARConfig(RotationSettings):
    """`optimizer: lionar`."""

    family: ClassVar[str] = "optimizer"
    kind: Literal["lionar"] = "lionar"
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate, as for AdamW")
    beta: float = Field(default=BETA, ge=0, lt=1, description="decay of the momentum")
    nesterov: bool = Field(default=True, description="Nesterov's momentum")
    bias_correction: BiasCorrection = Field(
        default="inverse",
        description="inverse and rms: times 1 - beta^t or its root-mean-square form; adam: of the momentum",
    )
    update_norm_decay: float = Field(
        default=0.0, ge=0, lt=1, description="average of the squared update norm over steps; 0: strict angles"
    )
    angle_schedule: AngleSchedule = Field(
        default="linear", description="linear: the angle is proportional to the rate; sqrt: that of the present rate"
    )

    def build(self, model: nn.Module) -> LionAR:
        """The optimizer over the model's trainable parameters; raises ConfigError (see `rotational_groups`)."""
        optimizer = LionAR(
            rotational_groups(model, self.weight_decay, self.rotate_embeddings),
            self.learning_rate,
            self.beta,
            weight_decay=self.weight_decay.default,
            nesterov=self.nesterov,
            bias_correction=self.bias_correction,
            **self.rotation(),
        )
        return limited(self, optimizer)
