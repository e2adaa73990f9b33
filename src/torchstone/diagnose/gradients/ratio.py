"""By what factor the gradients of one set of examples exceed another's, with an interval over examples.

The factor is that of the geometric means over examples of `Profile.overall`. Examples that both sets have are compared one
by one (clustered bootstrap of log ratios); sets without common examples get Welch's interval with the smaller set's degrees of
freedom, which is cautious.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchstone.diagnose.gradients.comparison import MINIMUM
from torchstone.diagnose.gradients.profile import Profile
from torchstone.stats.bootstrap import clustered_estimate
from torchstone.stats.estimate import t_critical


@dataclass(frozen=True)
class Ratio:
    """A factor with its 95 % interval; ends are None below ten examples. `n` examples (pairs, or of the smaller set)."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    paired: bool

    def words(self) -> str:
        """`×0.43 [0.40, 0.47]`."""
        if self.value is None:
            return "×– (no gradient to compare)"
        ends = "" if self.low is None or self.high is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"×{self.value:.3g}{ends}"


Row = tuple[str, Ratio]


@dataclass(frozen=True)
class Contrast:
    """A condition against the reference.

    Attributes:
        name: of the condition.
        raw, untrained: all scored tokens, in the model and in the untrained one.
        matched, untrained_matched: equally many scored tokens; None where lengths are alike.
        per_loss: divided by the loss, with equally many scored tokens where lengths differ.
    """

    name: str
    raw: Ratio
    untrained: Ratio
    matched: Ratio | None
    untrained_matched: Ratio | None
    per_loss: Ratio

    def rows(self, reference: str) -> list[Row]:
        """Every ratio with its name, controls after what they are controls of."""
        name, like = f"{self.name} / {reference}", "matched tokens, " if self.matched else ""
        rows = [(name, self.raw), (f"{name}, untrained model", self.untrained)]
        rows += [(f"{name}, matched tokens", self.matched)] if self.matched else []
        rows += [(f"{name}, untrained model, matched tokens", self.untrained_matched)] if self.untrained_matched else []
        return [*rows, (f"{name}, {like}divided by loss", self.per_loss)]

    def sentence(self, reference: str) -> str:
        """The contrast in one sentence, with its controls."""
        text = f"Gradients of {self.name} are {self.raw.words()} those of {reference}"
        text += f" (untrained model: {self.untrained.words()})"
        if self.matched is None or self.untrained_matched is None:
            return f"{text}; divided by the loss, {self.per_loss.words()}."
        return (
            f"{text}; with as many scored tokens {self.matched.words()} (untrained model: {self.untrained_matched.words()}), and "
            f"divided by the loss besides, {self.per_loss.words()}."
        )


@dataclass(frozen=True)
class Foreign:
    """Responses that belong to other prompts against a condition's own: raw, in an untrained model, divided by the loss."""

    raw: Ratio
    untrained: Ratio
    per_loss: Ratio

    def rows(self, name: str) -> list[Row]:
        """Every ratio with its name."""
        name = f"{name}: irrelevant / own"
        return [
            (name, self.raw),
            (f"{name}, untrained model", self.untrained),
            (f"{name}, divided by loss", self.per_loss),
        ]

    def words(self) -> str:
        """`×1.4 [1.2, 1.6] (untrained model: ×1; divided by the loss: ×0.9)`."""
        return f"{self.raw.words()} (untrained model: {self.untrained.words()}; divided by the loss: {self.per_loss.words()})"


def ratio_of(numerator: Profile, denominator: Profile, seed: int = 0, name: str = "nuclear") -> Ratio:
    """The factor between two profiles; examples whose gradient is 0 or not finite are left out."""
    above, below = _logs(numerator, name), _logs(denominator, name)
    common = [key for key in above if key in below]
    if common and min(len(common) / len(above), len(common) / len(below)) > 0.5:
        return _paired(np.array([above[key] - below[key] for key in common]), seed)
    return _apart(np.array(list(above.values())), np.array(list(below.values())))


def _logs(profile: Profile, name: str) -> dict[str, float]:
    """ln of every example's number, by id; repeated ids are told apart by their order."""
    size_n: Tensor = profile.overall(name)
    usable_n = size_n.isfinite() & (size_n > 0)
    seen: dict[str, int] = {}
    found = {}
    for key, size, usable in zip(
        profile.ids, torch.where(usable_n, size_n, 1.0).log().tolist(), usable_n.tolist(), strict=True
    ):
        seen[key] = seen.get(key, 0) + 1
        if usable:
            found[key if seen[key] == 1 else f"{key} ({seen[key]})"] = size
    return found


def _paired(differences: np.ndarray, seed: int) -> Ratio:
    found = clustered_estimate(differences, None, np.random.default_rng(seed))
    ends = [None if end is None else math.exp(end) for end in (found.low, found.high)]
    return Ratio(math.exp(found.effect), ends[0], ends[1], len(differences), True)


def _apart(above: np.ndarray, below: np.ndarray) -> Ratio:
    least = min(len(above), len(below))
    if least == 0:
        return Ratio(None, None, None, 0, False)
    effect = float(above.mean() - below.mean())
    if least < MINIMUM:
        return Ratio(math.exp(effect), None, None, least, False)
    error = math.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))
    half = t_critical(least) * error
    return Ratio(math.exp(effect), math.exp(effect - half), math.exp(effect + half), least, False)
