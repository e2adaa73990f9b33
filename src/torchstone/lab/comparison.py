"""The study behind `torchstone compare`: a recipe, arms as overrides, and one claim for each arm.

It is built from plain data and describes itself as plain data, so that a worker process can make it again.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torchstone.lab.decode_cost import KEY, RECALL, decoding_numbers, decoding_table, recall, recalls
from torchstone.lab.study import Cell, Claim, Measurement, Scale, Summary
from torchstone.lab.training import Matching, Probe, Trained, TrainingStudy, Tuned, Variant
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.report.result import Metric

# Standard deviation of the difference between twins that share no seed, from the 40 A/A comparisons in docs/statistics.md; for
# the minimum detectable effect before a run. Paired arms of longer runs vary less.
ASSUMED_SD = {"validation_loss": 0.1}
BASELINE = "baseline"
SCALE = "compare"
METRICS = {
    "validation_loss": Metric(name="validation_loss", label="validation loss", unit="nats/token", better="lower"),
    "accuracy": Metric(name="accuracy", label="answer accuracy", better="higher"),
}


class Comparison(TrainingStudy):
    """The study behind `torchstone compare`. Built from plain data, so that a worker can make it again."""

    def __init__(
        self,
        recipe: Recipe,
        variants: Sequence[Variant],
        matching: Matching | None,
        metric: str,
        margin: float,
        seeds: int,
        tuned: Tuned | None = None,
    ) -> None:
        self.recipe, self.arms_given, self.matching, self.seeds = recipe, tuple(variants), matching, seeds
        self.baseline = BASELINE
        self.title = "Compare: " + ", ".join(variant.name for variant in variants)
        decisive = METRICS[metric]
        word = "lower" if decisive.better == "lower" else "higher"
        self.question = f"Does the arm reach a {word} {decisive.label} than the baseline, at equal {self._equal()}?"
        self.metrics = (decisive, *self._shown(decisive))
        self.margin, self.tuned = margin, tuned
        self.claims = tuple(self._claim(variant.name, decisive) for variant in variants)
        self.scales = {SCALE: Scale(seeds)}

    def _shown(self, decisive: Metric) -> list[Metric]:
        """What the report shows of every arm beside the metric that decides."""
        if self.recipe.data.kind != "text":  # a task has exact answers
            return [metric for metric in METRICS.values() if metric is not decisive]
        loss = METRICS["validation_loss"]
        return ([loss] if decisive is not loss else []) + ([RECALL] if recalls(self.recipe) else [])

    def _equal(self) -> str:
        names = {"params": "parameters and tokens", "flops": "training FLOPs"}
        return names[self.matching.on] if self.matching else "recipe (sizes not matched)"

    def _claim(self, arm: str, metric: Metric) -> Claim:
        lower = metric.better == "lower"
        beyond = f" by more than {self.margin:g}" if self.margin else ""
        return Claim(
            id=arm,
            sentence=f"{arm} has a {'lower' if lower else 'higher'} {metric.label} than the baseline{beyond}.",
            metric=metric.name,
            arm=arm,
            baseline=BASELINE,
            direction="less" if lower else "greater",
            margin=0.0 - self.margin if lower else self.margin,
            assumed_sd=ASSUMED_SD.get(metric.name),
        )

    def base(self, scale: Scale) -> Recipe:
        """The recipe as given."""
        return self.recipe

    def variants(self, scale: Scale) -> Sequence[Variant]:
        """The baseline and the arms."""
        return [Variant(BASELINE, role="baseline"), *self.arms_given]

    def probe(self, trained: Trained) -> Probe:
        """Recall on held-out text, and what a token costs to generate."""
        recalled = recall(trained.recipe, trained.model, trained.data)
        return Probe(recalled, extra={KEY: decoding_numbers(trained.model)})

    def reference(self) -> dict[str, Any]:
        """The specification that `from_spec` reads."""
        return {
            "comparison": {
                "recipe": self.recipe.data_dict(),
                "variants": [asdict(variant) for variant in self.arms_given],
                "matching": asdict(self.matching) if self.matching else None,
                "metric": self.metrics[0].name,
                "margin": self.margin,
            }
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Comparison:
        """The comparison that `reference` described."""
        variants = [Variant(**{**variant, "overrides": tuple(variant["overrides"])}) for variant in spec["variants"]]
        matching = Matching(**spec["matching"]) if spec["matching"] else None
        return cls(load_recipe(spec["recipe"]), variants, matching, spec["metric"], spec["margin"], seeds=1)

    def summarise(self, cells: Sequence[tuple[Cell, Measurement]]) -> Summary:
        """What generation costs each arm, and the tuning table, if rates were tuned."""
        tuning = (self.tuned.table,) if self.tuned else ()
        return Summary(tables=(*decoding_table(cells, self.baseline), *tuning))

    def command(self, scale: str, seeds: int | None, max_seeds: int | None) -> str:
        """The command line that makes the same comparison from the recipe in the report."""
        words = ["torchstone", "compare", "recipe.yaml"]
        for variant in self.arms_given:
            words += ["--arm", f"{variant.name}:{','.join(variant.overrides)}"]
        words += ["--seeds", str(self.seeds)]
        if max_seeds is not None:
            words += ["--until-decided", "--max-seeds", str(max_seeds)]
        if self.matching is None:
            words += ["--match", "none"]
        else:
            given = self.matching
            words += ["--match", given.on, "--free", given.free, "--tolerance", f"{given.tolerance:g}"]
        if self.tuned is not None:
            words += ["--tune", "--tune-seeds", str(self.tuned.seeds)]
            words += ["--grid", ",".join(f"{rate:g}" for rate in self.tuned.grid)] if self.tuned.grid else []
        words += ["--metric", self.metrics[0].name, "--margin", f"{self.margin:g}"]
        return shlex.join(words)
