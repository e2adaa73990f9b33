"""The sizes of updates while transformers' Trainer trains.

    callback = update_callback(every=10, path="out/updates.jsonl")
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()
    callback.meter.summary()

The numbers are those of `torchstone.diagnose.updates.UpdateMeter`, with any optimizer that the Trainer uses, gradient
accumulation included. On a measured step they also join the logs that other callbacks get, as `updates/angle` and so
on.

Pitfalls: under `torch_compile` the inputs of layers are not seen, so leave `rrc` out of `metrics`. Sharded weights
(FSDP, DeepSpeed stage 3) are refused. With several processes the first one measures."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from torchstone.diagnose.updates.meter import METRICS, ROWS, UpdateMeter
from torchstone.diagnose.updates.series import EARLY, NAMES
from torchstone.diagnose.updates.watch import PREFIX
from torchstone.errors import ConfigError, DependencyError
from torchstone.storage.journal import Journal


def update_callback(
    every: int = 10,
    metrics: Collection[str] = METRICS,
    *,
    early: int = EARLY,
    rows: int = ROWS,
    beta: float | None = None,
    path: str | Path | None = None,
) -> Any:
    """A `TrainerCallback` with a `meter` once training has begun.

    Args:
        every, metrics, early, rows, beta: see `UpdateMeter`; the critical batch size is in sequences.
        path: file to which each record is appended; None keeps them in `meter.records` alone.

    Raises:
        DependencyError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise DependencyError("callbacks of the Trainer need transformers: pip install 'torchstone[hf]'") from error
    settings = {"every": every, "metrics": tuple(metrics), "early": early, "rows": rows, "beta": beta}
    return _callback_class(TrainerCallback)(settings, None if path is None else Journal(path))


def _callback_class(base: type) -> Any:
    class UpdateCallback(base):
        """Attaches an `UpdateMeter` to the Trainer's optimizer."""

        def __init__(self, settings: dict[str, Any], journal: Journal | None) -> None:
            self.settings, self.journal = settings, journal
            self.meter: UpdateMeter | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Attach the meter; a resumed run continues the count of steps."""
            if not state.is_world_process_zero:
                return
            if "rrc" in self.settings["metrics"] and getattr(args, "torch_compile", False):
                raise ConfigError("a compiled model does not show the inputs of its layers; leave rrc out of metrics.")
            batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            optimizer = _inner(given["optimizer"])
            self.meter = UpdateMeter(
                given["model"], optimizer, batch_size=batch, step=state.global_step, **self.settings
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Write the record of a measured step."""
            record = self._record(state.global_step)
            if record is not None and self.journal is not None:
                self.journal.append(record)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **given: Any) -> None:
            """Add the numbers of this step, if it was measured, to what other callbacks log."""
            record = self._record(state.global_step)
            if record is not None and logs is not None:
                logs |= {f"{PREFIX}{name}": value for name, value in record.items() if name in NAMES}

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Take the meter off; its records stay."""
            if self.meter is not None:
                self.meter.close()

        def _record(self, step: int) -> dict[str, Any] | None:
            records = self.meter.records if self.meter is not None else []
            return records[-1] if records and records[-1]["step"] == step else None

    return UpdateCallback


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers such as accelerate's."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
