"""Settings that the recipe parts of our optimizers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field

from torchstone.optim.momentum import MomentumOptimizer
from torchstone.optim.rrc import RRCLimiter
from torchstone.optim.settings import carried_over
from torchstone.optim.weight_decay import WeightDecay
from torchstone.recipe.part import Part

Share = Annotated[float, Field(ge=0, lt=1)]
Built = TypeVar("Built", bound=MomentumOptimizer)


class MomentumSettings(Part):
    """Decay, clipping, and the limit on relative representation change."""

    weight_decay: WeightDecay = Field(
        default=WeightDecay(), description="decay of matrices, for all or by role; vectors are not decayed"
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        description="largest global gradient norm; null: no clipping. The size of the updates does not follow the gradients' "
        "size here (SGDM's plain steps do), so that clipping changes only how gradients mix in the momentum",
    )
    rrc_batch_size: int | None = Field(
        default=None,
        ge=2,
        description="independent samples of a batch (batch.sequences): scales every layer's rate by what its signal-to-noise "
        "ratio allows (optim.rrc); null: off",
    )

    @classmethod
    def inherit(cls, previous: Mapping[str, Any]) -> dict[str, Any]:
        """Decay and limit, and the rate among optimizers whose rates have AdamW's scale (see `carried_over`)."""
        return carried_over(cls.model_fields, cls.model_fields["kind"].default, previous)


def limited(settings: MomentumSettings, optimizer: Built) -> Built:
    """The optimizer, with the limiter attached where the settings ask for it."""
    if settings.rrc_batch_size is not None:
        RRCLimiter(optimizer, settings.rrc_batch_size)
    return optimizer
