"""Watch the sizes of updates while a recipe trains.

    train(recipe, directory, callbacks=[UpdateWatch(every=10)])
    torchstone train recipe.yaml --updates 10

The numbers of all matrices together join the training record of a measured step as `updates/angle`, `updates/rrc` and
so on, for dashboards; the whole records go to `updates.jsonl` in the run directory, which `read_updates` and
`torchstone diagnose updates` read. A resumed run continues the file; which steps are measured depends on their number
alone.

Training does not notice: nothing of the model is changed and no random number is drawn. Of several processes the
leading one measures. A compiled model is run uncompiled on a few rows of the step's own batch, to see the inputs of
its layers.

Pitfall: averages of gradients begin anew on resume, so that the signal-to-noise ratio differs for about 1/(1 - β)
updates from that of an uninterrupted run; the other numbers do not."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from torchstone.diagnose.updates.meter import METRICS, ROWS, UpdateMeter
from torchstone.diagnose.updates.series import EARLY, NAMES, UPDATES
from torchstone.storage.journal import Journal
from torchstone.train.loop import Callback, RunView

PREFIX = "updates/"


class UpdateWatch(Callback):
    """Measures updates of a run.

    Args:
        every, metrics, early, rows, beta: see `UpdateMeter`; the critical batch size is in sequences.
    """

    def __init__(
        self,
        every: int = 10,
        metrics: Collection[str] = METRICS,
        *,
        early: int = EARLY,
        rows: int = ROWS,
        beta: float | None = None,
    ) -> None:
        self.every, self.metrics, self.early, self.rows, self.beta = every, metrics, early, rows, beta
        self.meter: UpdateMeter | None = None
        self.journal: Journal | None = None

    def on_start(self, view: RunView) -> None:
        """Attach a meter to the optimizer; raises ConfigError (see `UpdateMeter`)."""
        self.close()
        if os.environ.get("RANK", "0") != "0":
            return
        self.journal = Journal(view.directory / UPDATES)
        self.meter = UpdateMeter(
            view.model,
            view.optimizer,
            self.every,
            self.metrics,
            early=self.early,
            rows=self.rows,
            beta=self.beta,
            batch_size=view.recipe.batch.sequences,
            step=view.position.step,
            probe=(lambda: self._run(view)) if view.compute.compile else None,
        )

    def on_step(self, view: RunView) -> Mapping[str, float] | None:
        """Write the record of a measured step, and return its numbers for the training record."""
        if (
            self.meter is None
            or self.journal is None
            or not self.meter.records
            or self.meter.records[-1]["step"] != view.position.step
        ):
            return None
        record = self.meter.records[-1]
        self.meter.records = [record]  # the file holds the others
        self.journal.append(record)
        return {f"{PREFIX}{name}": value for name, value in record.items() if name in NAMES}

    def close(self) -> None:
        """Take the meter off the optimizer."""
        if self.meter is not None:
            self.meter.close()
            self.meter = None

    def _run(self, view: RunView) -> None:
        """The uncompiled model on enough rows of the batch of this step."""
        recipe = view.recipe
        size = recipe.batch.sequences
        sequences = min(size, -(-self.rows // view.data.length))
        batch = view.data.batch(recipe.seed, view.position.step, size, 0, sequences)
        device = next(view.model.parameters()).device
        with view.compute.autocast(device):
            view.model(batch.tokens_bt.to(device))
