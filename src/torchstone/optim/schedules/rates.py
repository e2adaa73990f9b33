"""A schedule as torch knows it: sets the rate of every group of any optimizer, with an exact state.

    rates = schedule.torch(optimizer)      after the optimizer is made; its groups have the rate of step 0 at once
    optimizer.step(); rates.step()         once per update, as with every scheduler of torch

A schedule that was built with a peak gives it to all groups. One without takes each group's own rate at this moment as that
group's peak, so that groups may differ. The state holds the number of updates, the peaks and the plan. Loading it under another
plan raises ConfigError if a rate that was used would have been another, with the first such step and both rates; a plan that
differs only in what is to come is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchstone.errors import CheckpointError, ConfigError


class ScheduledRates(LambdaLR):
    """`LambdaLR` of a schedule's factors, which stores its plan and checks it.

    Args:
        optimizer: any optimizer of torch, or one built alike.
        schedule: the plan, a `Schedule`.

    Raises:
        ConfigError: the schedule has a peak, and the groups have different rates.
    """

    def __init__(self, optimizer: Optimizer, schedule: Any) -> None:
        self.schedule = schedule
        if schedule.peak is not None:
            _give_peak(optimizer, schedule.peak)
        super().__init__(optimizer, schedule.factor)

    def state_dict(self) -> dict[str, Any]:
        """Updates done, the peak of every group, and the plan; plain data."""
        peaks = [float(rate) for rate in self.base_lrs]
        return {"done": self.last_epoch, "peaks": peaks, "plan": self.schedule.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where the state was taken; the groups have their rates again at once.

        Raises:
            CheckpointError: the state is of another number of groups, or is none of a schedule.
            ConfigError: an update that was done would have had another rate under this plan.
        """
        if not {"done", "peaks", "plan"} <= set(state_dict):
            raise CheckpointError(
                f"this is no state of a schedule: it holds {', '.join(map(str, state_dict)) or 'nothing'}, and needs done, peaks "
                "and plan."
            )
        done, stored = int(state_dict["done"]), self.schedule.from_state_dict(state_dict["plan"])
        if len(state_dict["peaks"]) != len(self.base_lrs):
            raise CheckpointError(
                f"the state is of {len(state_dict['peaks'])} parameter groups, and the optimizer has {len(self.base_lrs)}; make "
                "it with the same groups."
            )
        for before, now in zip(state_dict["peaks"], self.base_lrs, strict=True):
            replace(stored, peak=before).check_same(replace(self.schedule, peak=float(now)), done)
        self.last_epoch = done
        self._step_count = done + 1
        factor = self.schedule.factor(done)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            _set(group, "lr", base * factor)
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]


def _give_peak(optimizer: Optimizer, peak: float) -> None:
    rates = {float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups}
    if len(rates) > 1:
        shown = ", ".join(f"{rate:g}" for rate in sorted(rates))
        raise ConfigError(
            f"the schedule has the peak {peak:g}, and the optimizer's groups have different rates ({shown}). Build the schedule "
            "without a peak, so that every group keeps its own, or give the groups one rate."
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = peak
        _set(group, "lr", peak)


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    """Capturable optimizers hold their rate as a tensor, which has to stay the same one."""
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value
