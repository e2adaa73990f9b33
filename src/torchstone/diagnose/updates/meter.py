"""UpdateMeter: how large the updates of a training run are, by every measure, for any torch optimizer.

    meter = UpdateMeter(model, optimizer, every=10)
    …                                              # train as before: optimizer.step() is measured through torch's own hooks
    meter.summary()["angle"].ratio                 # early updates over late ones
    meter.records[-1]["matrices"]["blocks.0.mixer.q.weight"]["rrc"]

Measures: `l2` (with rms and relative size), `angle` and `rrc` (see `metrics`), each of the whole matrix and as the
mean over neurons; `snr` (see `snr`) with the critical batch size and the cosine of gradient and momentum. Matrices
are the trained parameters of two or more dimensions that the optimizer updates; a tensor of several names (tied
weights) is one matrix under its first name. Numbers of all matrices together: l2 is the norm of all of Δ, rms and
relative likewise; angle and rrc are means over matrices; signal and noise are summed before their ratio is taken.

Cost. The weights are copied on measured steps only, and the copy is dropped after the update: memory of one copy of
the matrices, and of `rows` inputs of every linear layer. `snr` adds one norm of every gradient to every step, and
where the optimizer keeps no average of its own, one fp32 copy of the matrices and its update. Nothing of model,
optimizer or random streams is changed.

Pitfalls
  compile      a compiled model does not call hooks; give `probe`, which runs it uncompiled on a few rows.
  accumulation inputs come from the first micro-batch, gradients are those of the whole update.
  bf16         a change below the resolution of the weights is no change: measured is what happened to the stored weights.
               An optimizer that keeps fp32 copies elsewhere must have written the weights back when its `step` returns.
  scaling      a GradScaler that has not unscaled yet makes gradients, and so Φ across changes of its scale, meaningless.
  limiter      what changes weights in a hook after the step (the RRC limit on a torch optimizer) is measured only if it was
               attached before the meter, because hooks run in the order of their attachment.
  shards       sharded weights (FSDP) are refused: a shard's angle is not the matrix's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchstone.diagnose.updates.inputs import LayerInputs, is_transposed, linear_layers
from torchstone.diagnose.updates.metrics import Change, change_of
from torchstone.diagnose.updates.series import EARLY, EarlyLate, curve, early_late
from torchstone.diagnose.updates.snr import GradientMoments, Noise
from torchstone.errors import ConfigError

METRICS = ("l2", "angle", "rrc", "snr")
ROWS, MOST_ROWS = 256, 4096


class UpdateMeter:
    """Measures the updates that an optimizer makes; attached when made, until `close`.

    Args:
        model: what is trained.
        optimizer: any torch optimizer that trains it.
        every: steps between measured ones; the first step is measured.
        metrics: among `l2`, `angle`, `rrc`, `snr`.
        early: first steps that are all measured.
        rows: inputs of a linear layer on which its response is measured, at most 4096.
        beta: decay of the gradient average behind `snr`; None: the optimizer's own, see `GradientMoments`.
        batch_size: samples of an update, for the critical batch size in samples; None: it is given in batches.
        step: updates made before, when a run is resumed.
        probe: runs the model uncompiled on a few rows; called on measured steps, without gradients and with torch's
            random streams put back. None: inputs are those of the training pass.

    Attributes:
        records: one for each measured step, see `series`.
        neurons: angle [o] and rrc [o] of every neuron at the last measured step, by matrix.

    Raises:
        ConfigError: an unknown metric, a count out of range, sharded weights, or an optimizer of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int = 10,
        metrics: Collection[str] = METRICS,
        *,
        early: int = EARLY,
        rows: int = ROWS,
        beta: float | None = None,
        batch_size: float | None = None,
        step: int = 0,
        probe: Callable[[], object] | None = None,
    ) -> None:
        self.every, self.metrics, self.early, self.batch_size, self.probe = (
            every,
            tuple(metrics),
            early,
            batch_size,
            probe,
        )
        self._check(rows, beta, step)
        self.optimizer, self.step = optimizer, step
        self.matrices = _matrices(model, optimizer)
        layers = linear_layers(model, self.matrices.values())
        self._transposed = {key for key, layer in layers.items() if is_transposed(layer)}
        self._inputs = LayerInputs(model, layers if "rrc" in self.metrics else {}, rows)
        self._moments = GradientMoments(self.matrices, optimizer, beta, step) if "snr" in self.metrics else None
        self.records: list[dict[str, Any]] = []
        self.neurons: dict[str, dict[str, Tensor]] = {}
        self._before: dict[str, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._prepare()

    def _check(self, rows: int, beta: float | None, step: int) -> None:
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise ConfigError(f"metrics are {', '.join(METRICS)}; given {', '.join(unknown) or 'none'}.")
        if self.every < 1 or self.early < 0 or step < 0 or not 1 <= rows <= MOST_ROWS:
            raise ConfigError(
                f"a meter needs every >= 1, early >= 0, step >= 0 and 1 to {MOST_ROWS} rows; given every={self.every}, "
                f"early={self.early}, step={step}, rows={rows}."
            )
        if beta is not None and not 0 <= beta < 1 or self.batch_size is not None and not self.batch_size > 0:
            raise ConfigError(
                f"beta lies in [0, 1) and batch_size is above 0, or None; given beta={beta}, batch_size={self.batch_size}."
            )

    def close(self) -> None:
        """Stop measuring; the records stay."""
        for handle in self._handles:
            handle.remove()
        self._inputs.end()
        self._inputs.clear()
        self._before = {}

    def measures(self, step: int) -> bool:
        """Whether update number `step` (the first is 1) is measured."""
        return step <= self.early or (step - 1) % self.every == 0

    def _prepare(self) -> None:
        """Look at the inputs of the next update if it is measured."""
        if self.probe is None and self.measures(self.step + 1):
            self._inputs.begin()

    def _before_step(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        self.step += 1
        measured = self.measures(self.step)
        if self._moments is not None:
            if any(value is not None for value in (*arguments[1:], keywords.get("closure"))):
                raise ConfigError(
                    "an optimizer that is given a closure computes gradients inside its step, where signal and noise are "
                    "not seen; leave out the metric snr."
                )
            self._moments.observe(measured)
        if not measured:
            return
        if self.probe is not None:
            self._probe()
        self._inputs.end()
        self._before = {name: value.detach().clone() for name, value in self.matrices.items()}

    def _probe(self) -> None:
        everywhere = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        assert self.probe is not None
        with torch.random.fork_rng(devices=everywhere), torch.no_grad(), self._inputs.capturing():
            self.probe()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        if self._before:
            device = next(iter(self.matrices.values())).device
            with torch.autocast(device.type, enabled=False):
                self.records.append(self._measure())
            self._before = {}
            self._inputs.clear()
        self._prepare()

    def _measure(self) -> dict[str, Any]:
        found: dict[str, dict[str, float | None]] = {name: {} for name in self.matrices}
        changes: dict[str, Change] = {}
        self.neurons = {}
        if set(self.metrics) - {"snr"}:
            changes = {name: self._change(name) for name in self.matrices}
            for name, change in changes.items():
                found[name] |= self._sizes(name, change)
        noises = {} if self._moments is None else self._moments.noises()
        for name, noise in noises.items():
            found[name] |= self._noise(noise)
        together = self._together(changes, found) | self._noise(sum(noises.values(), Noise()))
        rate = float(self.optimizer.param_groups[0]["lr"])
        matrices = {name: _finite(numbers) for name, numbers in found.items()}
        return {"step": self.step, "rate": rate, **_finite(together), "matrices": matrices}

    def _change(self, name: str) -> Change:
        value, before = self.matrices[name].detach(), self._before.pop(name)
        inputs_ni = self._inputs.of(self.matrices[name])
        if id(self.matrices[name]) in self._transposed:
            value, before = value.T, before.T
        return change_of(before, value, inputs_ni)

    def _sizes(self, name: str, change: Change) -> dict[str, float | None]:
        """Numbers of one matrix; its neurons' are kept aside."""
        found: dict[str, float | None] = {}
        if "l2" in self.metrics:
            found |= _lengths(change.moved, change.square, change.numbers)
        if "angle" in self.metrics:
            angles_o = change.neuron_angles_o
            self.neurons.setdefault(name, {})["angle"] = angles_o
            found |= {"angle": change.angle, "neuron_angle": float(angles_o.nanmean())}
        rrcs_o = change.neuron_rrcs_o
        if "rrc" in self.metrics and rrcs_o is not None:
            self.neurons.setdefault(name, {})["rrc"] = rrcs_o
            found |= {"rrc": change.rrc, "neuron_rrc": float(rrcs_o.nanmean())}
        return found

    def _together(
        self, changes: Mapping[str, Change], found: Mapping[str, Mapping[str, float | None]]
    ) -> dict[str, float | None]:
        """Numbers of all matrices."""
        together: dict[str, float | None] = {}
        if "l2" in self.metrics:
            parts = [(change.moved, change.square, change.numbers) for change in changes.values()]
            moved, square, numbers = (sum(column) for column in zip(*parts, strict=True))
            together |= _lengths(moved, square, int(numbers))
        for name in ("angle", "neuron_angle", "rrc", "neuron_rrc"):
            given = [one.get(name) for one in found.values()]
            values = [value for value in given if value is not None and math.isfinite(value)]
            if values:
                together[name] = sum(values) / len(values)
        return together

    def _noise(self, noise: Noise) -> dict[str, float | None]:
        snr = noise.snr
        found = {"snr": snr, "alignment": noise.alignment}
        if snr:
            found["critical_batch"] = (self.batch_size or 1.0) / snr
        return found

    def series(self, name: str, matrix: str | None = None) -> dict[str, list[float]]:
        """`steps` and `values` of one number, of all matrices together or of one."""
        steps, values = curve(self.records, name, matrix)
        return {"steps": [float(step) for step in steps], "values": values}

    def summary(self) -> dict[str, EarlyLate]:
        """Every number early and late (see `series`); those that lack either are left out."""
        names = {name for record in self.records for name in record} - {"step", "rate", "matrices"}
        last = self.records[-1]["step"] if self.records else 0
        found = {name: early_late(*curve(self.records, name), last) for name in sorted(names)}
        return {name: both for name, both in found.items() if both is not None}


def _matrices(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    updated = {id(value) for group in optimizer.param_groups for value in group["params"]}
    found: dict[str, Tensor] = {
        name: value
        for name, value in model.named_parameters()
        if value.dim() >= 2 and value.requires_grad and id(value) in updated
    }
    if not found:
        raise ConfigError(
            f"the optimizer updates no matrix of {type(model).__name__}; give the model and the optimizer that trains it "
            "(after both were prepared, where a library wraps them)."
        )
    sharded = [name for name, value in found.items() if isinstance(value, DTensor)]
    if sharded:
        raise ConfigError(f"{sharded[0]} is sharded over processes; measure a run whose processes hold whole weights.")
    return found


def _lengths(moved: float, square: float, numbers: int) -> dict[str, float | None]:
    return {
        "l2": moved**0.5,
        "rms": (moved / numbers) ** 0.5,
        "relative": (moved / square) ** 0.5 if square else None,
    }


def _finite(numbers: Mapping[str, float | None]) -> dict[str, float]:
    """Numbers that exist, with nine digits."""
    return {
        name: float(f"{value:.9g}") for name, value in numbers.items() if value is not None and math.isfinite(value)
    }
