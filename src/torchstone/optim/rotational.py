"""Rotational updates over AdamW, SGDM or Lion (Kosson et al., "Rotational Equilibrium", arXiv 2305.17212).

Every row of a matrix keeps its norm and turns, at every step, by the angle that weight decay and the inner rule would settle at
anyway (`optim.angle`). So there is no early phase of other angles, and weight decay is no shrinking but sets the angle. The
update is in `optim.momentum_update`; what does not rotate (vectors, groups with `rotational: False`) takes the inner rule's own
steps, with its decay.

    θ = θ(η, λ) under angle_schedule sqrt;   θ(η_peak, λ) · η/η_peak under linear

Options: `per_neuron` rows or whole tensors; `zero_mean` keeps rows and directions centred; `update_norm_decay` u averages ‖d‖²
over steps (0: every step has exactly the target angle); `bias_correction` of the inner momentum (`optim.momentum_direction`).

Pitfalls: construction centres the rows of the weights (`zero_mean`). A row is one index of the first dimension: of stacked
experts [e, o, i] the whole matrix of an expert. A model whose every matrix keeps a small initial norm cannot grow its logits:
recipes leave out embeddings and head, and `projection: gained` gives other layers a gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator
from torch import nn

from torchstone.errors import ConfigError
from torchstone.optim import momentum_direction as rules
from torchstone.optim.angle import AngleSchedule, adamw_angle, lion_angle, sgdm_angle
from torchstone.optim.momentum import MomentumOptimizer
from torchstone.optim.momentum_config import MomentumSettings, Share, limited
from torchstone.optim.momentum_direction import BiasCorrection, Direction, check_correction
from torchstone.optim.rotational_groups import rotational_groups

Inner = Literal["adamw", "sgdm", "lion"]
BETAS: dict[str, tuple[float, float]] = {"adamw": (0.9, 0.95), "lion": (0.9, 0.99)}
MOMENTUM = 0.9
ROTATION: dict[str, Any] = {
    "rotational": None,
    "per_neuron": True,
    "zero_mean": True,
    "update_norm_decay": 0.9,
    "angle_schedule": "sqrt",
    "peak_lr": None,
    "eps_norm": 1e-8,
}
"""Settings of a group that concern rotation, with their defaults; each may be given to the constructor or to a group.

rotational: None rotates matrices where weight_decay is not 0; False nothing; True everything, and weight_decay 0 is an error.
peak_lr: the schedule's largest rate, needed by the linear angle schedule. eps_norm: beside the root of q.
"""


def rotation_settings(given: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """`ROTATION` with other defaults and with what was given; raises ConfigError for an unknown name or schedule."""
    settings = {**ROTATION, **defaults, **given}
    if unknown := sorted(settings.keys() - ROTATION.keys()):
        raise ConfigError(f"{', '.join(unknown)} is no setting of a rotation; settings are {', '.join(ROTATION)}.")
    if settings["angle_schedule"] not in get_args(AngleSchedule):
        raise ConfigError(f"angle_schedule is {settings['angle_schedule']!r}; choose sqrt or linear.")
    return settings


class Rotational(MomentumOptimizer):
    """A rotational optimizer over an inner rule.

    Args:
        params: parameters, named parameters, or groups of either.
        inner: adamw, sgdm or lion.
        lr: learning rate η, of which the angle is a function.
        weight_decay: λ; sets the angle of what rotates, and decays what does not.
        betas: of adamw (0.9, 0.95) and lion (0.9, 0.99). momentum: of sgdm (0.9).
        eps: of adamw.
        bias_correction: of the inner momentum; default adam for adamw, none for the others.
        fused: False for tensor operations only.
        rotation: settings in `ROTATION`.

    Raises:
        ConfigError: a setting that the inner rule does not have, and see `MomentumOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        inner: Inner = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] | None = None,
        momentum: float | None = None,
        eps: float | None = None,
        bias_correction: BiasCorrection | None = None,
        fused: bool | None = None,
        **rotation: Any,
    ) -> None:
        check_inner(inner, betas, momentum, eps)
        self.inner = inner
        self.moments = {"adamw": ("exp_avg", "exp_avg_sq"), "sgdm": ("momentum_buffer",), "lion": ("exp_avg",)}[inner]  # type: ignore[misc]
        self.sums = inner == "sgdm"  # type: ignore[misc]
        correction: str = bias_correction or ("adam" if inner == "adamw" else "none")
        check_correction(correction)
        if inner == "lion" and correction == "adam":
            raise ConfigError(
                "bias_correction is adam, which a sign does not see; choose none, inverse or rms for lion."
            )
        defaults: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "bias_correction": correction}
        if inner == "sgdm":
            defaults["momentum"] = MOMENTUM if momentum is None else momentum
        else:
            defaults["betas"] = tuple(betas or BETAS[inner])
        if inner == "adamw":
            defaults["eps"] = 1e-8 if eps is None else eps
        super().__init__(params, {**defaults, **rotation_settings(rotation)}, fused)
        check_something_rotates(self)

    def direction(self, group: Mapping[str, Any], step: int) -> Direction:
        """See `MomentumOptimizer`."""
        if self.inner == "adamw":
            return rules.adamw(group["betas"], group["eps"], group["bias_correction"], step)
        if self.inner == "lion":
            return rules.lion(group["betas"])
        return rules.sgdm(group["momentum"], group["bias_correction"], step)

    def angle(self, group: Mapping[str, Any], lr: float) -> float:
        """See `MomentumOptimizer`."""
        decay = group["weight_decay"]
        if self.inner == "adamw":
            return adamw_angle(lr, decay, group["betas"][0])
        if self.inner == "lion":
            return lion_angle(lr, decay, group["betas"])
        return sgdm_angle(lr, decay, group["momentum"])

    def beta_of(self, group: Mapping[str, Any]) -> float:
        """See `MomentumOptimizer`."""
        if self.inner == "sgdm":
            return float(group["momentum"])
        return float(group["betas"][0 if self.inner == "adamw" else 1])


def check_inner(inner: str, betas: object, momentum: object, eps: object) -> None:
    """Raises ConfigError for an unknown rule, and for a setting that the rule does not have."""
    if inner not in get_args(Inner):
        raise ConfigError(f"inner is {inner!r}; choose one of {', '.join(get_args(Inner))}.")
    owners = {"betas": ("adamw", "lion"), "momentum": ("sgdm",), "eps": ("adamw",)}
    for name, value in (("betas", betas), ("momentum", momentum), ("eps", eps)):
        if value is not None and inner not in owners[name]:
            raise ConfigError(
                f"{name} is {value}, and inner {inner} has no such setting (it belongs to {' and '.join(owners[name])}); "
                "leave it out, or give null where it carries over from another optimizer."
            )


def check_something_rotates(optimizer: MomentumOptimizer) -> None:
    """Raises ConfigError where nothing rotates, now or once it is unfrozen."""
    pairs = [(group, value) for group in optimizer.param_groups for value in group["params"]]
    if any(optimizer.rotates(group, value) for group, value in pairs):
        return
    waiting = [(group, value) for group, value in pairs if group["rotational"] is None and value.dim() > 1]
    if any(group["weight_decay"] == 0 for group, _ in waiting):
        raise ConfigError(
            "weight_decay is 0 for every matrix, which makes the target angle 0, so that nothing would rotate; give a "
            "weight_decay above 0, or choose an optimizer that does not rotate."
        )
    if not waiting and any(group["rotational"] is None for group in optimizer.param_groups):
        raise ConfigError(
            f"{type(optimizer).__name__} was given no matrix that may rotate, only vectors (or groups with rotational=False); "
            "give it the matrices too, or choose an optimizer that does not rotate."
        )


class RotationSettings(MomentumSettings):
    """What the recipe parts of rotational optimizers share."""

    per_neuron: bool = Field(default=True, description="norms and angles of rows; false: of whole tensors")
    zero_mean: bool = Field(default=True, description="keep rows of weights and of updates centred")
    update_norm_decay: float = Field(
        default=0.9, ge=0, lt=1, description="average of the squared update norm over steps; 0: strict angles"
    )
    angle_schedule: AngleSchedule = Field(
        default="sqrt", description="sqrt: the angle of the present rate; linear: proportional to the rate"
    )
    rotate_embeddings: bool = Field(
        default=False, description="rotate embeddings and output head too, whose norms are then frozen"
    )

    def rotation(self) -> dict[str, Any]:
        """Settings of a rotation, for the optimizer's constructor."""
        names = ("per_neuron", "zero_mean", "update_norm_decay", "angle_schedule")
        peak = self.learning_rate if self.angle_schedule == "linear" else None  # type: ignore[attr-defined]
        return {**{name: getattr(self, name) for name in names}, "peak_lr": peak}


class RotationalConfig(RotationSettings):
    """`optimizer: rotational`."""

    family: ClassVar[str] = "optimizer"
    kind: Literal["rotational"] = "rotational"
    inner: Inner = Field(default="adamw", description="the rule whose direction is taken")
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate")
    betas: tuple[Share, Share] | None = Field(
        default=None, description="of adamw and lion; null: 0.9, 0.95 and 0.9, 0.99"
    )
    momentum: float | None = Field(default=None, ge=0, lt=1, description="of sgdm; null: 0.9")
    eps: float | None = Field(default=None, gt=0, description="of adamw; null: 1e-8")
    bias_correction: BiasCorrection | None = Field(
        default=None, description="of the inner momentum; null: adam for adamw, else none"
    )

    @model_validator(mode="after")
    def _belongs_to_the_inner_rule(self) -> RotationalConfig:
        check_inner(self.inner, self.betas, self.momentum, self.eps)
        return self

    def build(self, model: nn.Module) -> Rotational:
        """The optimizer over the model's trainable parameters; raises ConfigError (see `rotational_groups`)."""
        optimizer = Rotational(
            rotational_groups(model, self.weight_decay, self.rotate_embeddings),
            self.inner,
            self.learning_rate,
            betas=self.betas,
            momentum=self.momentum,
            eps=self.eps,
            bias_correction=self.bias_correction,
            **self.rotation(),
        )
        return limited(self, optimizer)
