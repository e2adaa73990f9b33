"""A/A comparisons of trained arms: how often does an arm beat its own twin?

    python benchmarks/a_a.py [--comparisons 40] [--seeds 3] [--out runs/a-a] [--json PATH]

Each comparison trains two arms of the same recipe on real text that differ in name and in their streams of random numbers,
and judges "the twin's validation loss is lower". With two-sided 95 % intervals 2.5 % of them should hold and 2.5 % fail.
Prints the counts with their exact binomial intervals, and the spread of the differences. Continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from torchstone.lab.comparison import METRICS, Comparison
from torchstone.lab.runnable import Runnable
from torchstone.lab.study import Claim, Scale
from torchstone.lab.training import TrainingStudy, Variant
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe

OVERRIDES = (
    "model.width=32", "model.depth=2", "model.head_dim=8", "data.length=64", "batch.sequences=8", "budget.steps=120",
    "evaluation={every: null, sequences: 128}", "precision=fp32", "compile=false",
)  # fmt: skip


class Twins(TrainingStudy):
    """`count` pairs of equal arms, each arm with a stream of its own."""

    title = "A/A comparisons"
    question = "Does an arm beat its twin?"
    baseline = "a00"
    metrics = (METRICS["validation_loss"],)

    def __init__(self, count: int, seeds: int) -> None:
        self.count, self.scales = count, {"toy": Scale(seeds)}
        self.claims = tuple(
            Claim(f"twin {i}", f"b{i:02d} is lower", "validation_loss", f"b{i:02d}", f"a{i:02d}") for i in range(count)
        )

    def base(self, scale: Scale) -> Recipe:
        """The tiny recipe, made tinier."""
        return load_recipe("recipes/tiny.yaml", OVERRIDES)

    def variants(self, scale: Scale) -> Sequence[Variant]:
        """Twins; nothing differs but the stream."""
        return [
            Variant(f"{side}{i:02d}", stream=2 * i + index)
            for i in range(self.count)
            for index, side in enumerate("ab")
        ]

    def reference(self) -> dict[str, Any]:
        """A worker needs only to train; an empty comparison does that."""
        return Comparison(self.base(self.scales["toy"]), [], None, "validation_loss", 0.0, 1).reference()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/a-a"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    finished = Runnable(Twins(options.comparisons, options.seeds)).run("toy", out=options.out)
    counts = Counter(verdict.status for verdict in finished.verdicts)
    differences = np.array([pair.contrast for verdict in finished.verdicts for pair in verdict.pairs])
    covered = sum(v.interval is not None and v.interval.low <= 0 <= v.interval.high for v in finished.verdicts)
    summary: dict[str, Any] = {
        "comparisons": options.comparisons,
        "seeds": options.seeds,
        "sd": float(differences.std(ddof=1)),
    }
    for name, number in (("holds", counts["holds"]), ("fails", counts["fails"]), ("covers 0", covered)):
        interval = binomtest(number, options.comparisons).proportion_ci()
        summary[name] = {
            "count": number,
            "share": number / options.comparisons,
            "low": interval.low,
            "high": interval.high,
        }
        print(f"{name}: {number} of {options.comparisons} ({interval.low:.1%} to {interval.high:.1%})")
    print(f"standard deviation of a difference between twins: {summary['sd']:.4f} nats/token")
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
