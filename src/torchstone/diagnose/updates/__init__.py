"""Sizes of updates, for any torch optimizer: in length, in angle, in what layers compute, and against gradient noise."""

from torchstone.diagnose.updates.meter import UpdateMeter
from torchstone.diagnose.updates.suggest import suggest_warmup
from torchstone.diagnose.updates.watch import UpdateWatch

__all__ = ["UpdateMeter", "UpdateWatch", "suggest_warmup"]
