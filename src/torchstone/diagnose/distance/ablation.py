"""What is lost without some heads, next to as many random heads of the same layers.

    report = ablation_report(subject, tokens_bt, heads, mode="mean")
    report.late.percentile            # share of the random draws that hurt late tokens less than `heads` did

Heads that matter for long contexts should cost more on late tokens than random heads do, and no more on early ones. Modes are
those of `Subject.ablate`: `mean` (default: the head's mean output stays), `zero` (out of distribution for the layers
above) and `window` (only what is further away than the window is lost: the cleanest test of long-range use).

Controls: at least 20 draws of the same number of heads per layer, of all sets but the one in question; and the heads of the
lowest score, where they are given.

Shapes: b sequences · t tokens.

Pitfalls: a mean ablation takes the mean over one forward pass, here over as many rows as 8192 tokens hold. Late tokens are
easier than early ones in any case; compare rises, not losses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchstone.diagnose.subject import AblationMode, Head, Subject
from torchstone.errors import ConfigError, DataError

DRAWS = 20
TOKENS_AT_ONCE = 8192  # tokens of one forward pass, over which a mean ablation takes its mean
QUARTER = 4  # early and late tokens are the first and the last quarter


@dataclass(frozen=True)
class Increase:
    """What a number rises by when heads are ablated.

    Attributes:
        plain: the number without ablation.
        chosen: its rise without the heads in question.
        random: its rise for each draw of random heads.
        lowest: its rise without the lowest-scoring heads; None where they were not given.
    """

    plain: float
    chosen: float
    random: tuple[float, ...]
    lowest: float | None

    @property
    def percentile(self) -> float:
        """Share of the random draws that rise less than the heads in question."""
        return float(np.mean(np.asarray(self.random) < self.chosen))

    def quantile(self, share: float) -> float:
        """Quantile of the random draws' rises."""
        return float(np.quantile(np.asarray(self.random), share))


@dataclass(frozen=True)
class AblationReport:
    """Ablation of some heads, its controls, and how it was done.

    Attributes:
        heads, lowest: the heads in question and the lowest-scoring ones.
        mode, window: see `Subject.ablate`.
        early, late: mean loss (nats) over the first and the last quarter of the tokens.
    """

    heads: tuple[Head, ...]
    lowest: tuple[Head, ...]
    mode: AblationMode
    window: int | None
    early: Increase
    late: Increase


def check_heads(subject: Subject, heads: Collection[Head]) -> None:
    """Raise ConfigError for no head at all, or one that does not exist."""
    if not heads:
        raise ConfigError("no heads were given to ablate; give at least one (layer, head).")
    for layer, head in heads:
        if not 0 <= layer < len(subject.layers) or not 0 <= head < subject.layers[layer].heads:
            allowed = f"0 … {subject.layers[layer].heads - 1}" if 0 <= layer < len(subject.layers) else "none"
            raise ConfigError(
                f"head {head} of layer {layer} is out of range: layers are 0 … {len(subject.layers) - 1}, heads of this layer "
                f"{allowed}."
            )


def random_like(subject: Subject, heads: Collection[Head], draws: int, seed: int) -> Iterator[list[Head]]:
    """`draws` sets with as many heads in each layer as `heads` has, all such sets but `heads` itself being equally likely.

    Raises:
        ConfigError: `heads` are all heads of their layers, so that there is no other set.
    """
    counts = Counter(layer for layer, _ in set(heads))
    if all(subject.layers[layer].heads == count for layer, count in counts.items()):
        raise ConfigError(
            f"the {len(set(heads))} heads given are every head of the layers {sorted(counts)}, so that no other heads of these "
            "layers can be drawn as a control; give fewer heads."
        )
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        drawn = set(heads)
        while drawn == set(heads):
            drawn = {
                (layer, int(head))
                for layer, count in counts.items()
                for head in generator.choice(subject.layers[layer].heads, count, replace=False)
            }
        yield sorted(drawn)


def increases(
    subject: Subject,
    measure: Callable[[], dict[str, float]],
    heads: Sequence[Head],
    *,
    lowest: Sequence[Head] = (),
    mode: AblationMode = "mean",
    window: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Increase]:
    """Rise of every number that `measure` gives, for the heads in question and their controls.

    Args:
        measure: evaluates the subject as it is at the moment: name → number.
        heads, lowest: sets of heads to take out; `lowest` may be empty.
        draws: sets of random heads, at least 20.
        seed: of the draws.

    Raises:
        ConfigError: no or unknown heads, too few draws, a window given or missing wrongly.
        DataError: a number is infinite or undefined.
    """
    check_heads(subject, heads)
    if draws < DRAWS:
        raise ConfigError(
            f"{draws} random draws were asked for; at least {DRAWS} are needed to say what is beyond chance."
        )

    def without(ablated: Sequence[Head]) -> dict[str, float]:
        with subject.ablate(ablated, mode, window=window):
            found = _finite(measure(), f"without the heads {', '.join(f'{layer}.{head}' for layer, head in ablated)}")
        return {name: found[name] - plain[name] for name in plain}

    plain = _finite(measure(), "without any ablation")
    chosen = without(heads)
    random = [without(drawn) for drawn in random_like(subject, heads, draws, seed)]
    low = without(lowest) if lowest else None
    return {
        name: Increase(plain[name], chosen[name], tuple(r[name] for r in random), None if low is None else low[name])
        for name in plain
    }


def _finite(found: dict[str, float], when: str) -> dict[str, float]:
    """The numbers; raises DataError for one that is infinite or undefined."""
    for name, value in found.items():
        if not math.isfinite(value):
            raise DataError(
                f"the measurement {name!r} is {value} {when}, so that no rise can be told; load the model in float32, or "
                "look for damaged weights."
            )
    return found


def ablation_report(
    subject: Subject,
    tokens_bt: Tensor,
    heads: Sequence[Head],
    *,
    lowest: Sequence[Head] = (),
    mode: AblationMode = "mean",
    window: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> AblationReport:
    """Loss on early and late tokens with heads taken out; arguments and errors as in `increases`."""

    def measure() -> dict[str, float]:
        rows = max(1, TOKENS_AT_ONCE // tokens_bt.shape[1])
        losses_bt = torch.cat([subject.losses(rows_bt) for rows_bt in tokens_bt.split(rows)])
        quarter = max(1, losses_bt.shape[1] // QUARTER)
        return {"early": float(losses_bt[:, :quarter].mean()), "late": float(losses_bt[:, -quarter:].mean())}

    found = increases(subject, measure, heads, lowest=lowest, mode=mode, window=window, draws=draws, seed=seed)
    return AblationReport(tuple(heads), tuple(lowest), mode, window, found["early"], found["late"])
