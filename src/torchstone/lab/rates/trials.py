"""Short runs of one recipe at several rates, each ended as soon as it has diverged, as a study without claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchstone.errors import NonFiniteError
from torchstone.lab.rates.divergence import Diverged, DivergenceWatch
from torchstone.lab.study import Cell, Measurement, Scale
from torchstone.lab.training import TrainingStudy, Variant
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.report.result import Metric
from torchstone.train.loop import Callback

SCALE = "rates"


class RateTrials(TrainingStudy):
    """One recipe at several rates, as a study without claims."""

    claims = ()
    matching = None
    title, question = "Learning rates", ""
    metrics = (Metric(name="validation_loss", label="validation loss", unit="nats/token"),)

    def __init__(self, recipe: Recipe, rates: Sequence[float]) -> None:
        self.recipe, self.rates = recipe, tuple(rates)
        self.baseline = rate_name(self.rates[0])
        self.scales = {SCALE: Scale(1)}
        self._watch = DivergenceWatch()

    def base(self, scale: Scale) -> Recipe:
        """The recipe at the first rate."""
        return load_recipe(self.recipe, [f"optimizer.learning_rate={self.rates[0]!r}"])

    def variants(self, scale: Scale) -> Sequence[Variant]:
        """One arm for each rate."""
        return [Variant(rate_name(rate), (f"optimizer.learning_rate={rate!r}",)) for rate in self.rates]

    def callbacks(self, cell: Cell) -> Sequence[Callback]:
        """Ends what has diverged."""
        self._watch = DivergenceWatch()
        return [self._watch]

    def measure(self, cell: Cell) -> Measurement:
        """A run's held-out loss, or `diverged` with the update at which it was seen."""
        try:
            found = super().measure(cell)
        except Diverged as seen:
            return Measurement({"diverged": float(seen.step)})
        except NonFiniteError:
            return Measurement({"diverged": float(self._watch.steps)})
        first = found.series["train loss"].values[0]
        assert first is not None, "a training record has the loss of every step"
        metrics = {"validation_loss": found.metrics["validation_loss"], "first_loss": first}
        return Measurement(metrics, tokens=found.tokens, flops=found.flops)

    def reference(self) -> dict[str, Any]:
        """What `from_spec` reads; the rates are not in it, so that a cell is the same in every round."""
        return {"rates": {"recipe": self.recipe.data_dict()}}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> RateTrials:
        """The study that `reference` described, in a worker, where the cell says which rate."""
        return cls(load_recipe(spec["recipe"]), [1.0])


def rate_name(rate: float) -> str:
    """Name of the arm at a rate."""
    return f"rate-{rate:.6g}"
