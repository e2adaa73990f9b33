"""When a run has diverged, seen as early as its training losses show it.

With m_t the median of the last 10 losses, a the first such median and b the lowest one so far, a run has diverged once

    m_t > b + max(½, ½ (a − b))   nats

so once it has lost half of what it had learned, and at least half a nat. A single bad batch moves a median of 10 little, and
a run that only learns slowly never crosses the line. Losses that are not numbers end a run by themselves (`NonFiniteError`).

Pitfall: a rate so high that the model settles at the frequencies of the tokens has not diverged by this rule; its loss says so.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from torchstone.errors import TorchstoneError
from torchstone.train.loop import Callback, RunView

WINDOW = 10
LEAST_RISE = 0.5  # nats
SHARE = 0.5


class Diverged(TorchstoneError):
    """A run was ended because its loss went up and did not come back; `step` updates had been done."""

    def __init__(self, step: int, loss: float, lowest: float) -> None:
        super().__init__(f"after {step} updates the loss is {loss:.3f}, and it had been {lowest:.3f}")
        self.step = step


class DivergenceRule:
    """The rule on a stream of losses."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._first: float | None = None
        self.lowest = float("inf")
        self.now = float("inf")

    def diverged(self, loss: float) -> bool:
        """Take one more loss; True if the run has diverged."""
        self._last.append(loss)
        if len(self._last) < WINDOW:
            return False
        self.now = median(self._last)
        self._first = self.now if self._first is None else self._first
        self.lowest = min(self.lowest, self.now)
        return self.now > self.lowest + max(LEAST_RISE, SHARE * (self._first - self.lowest))


class DivergenceWatch(Callback):
    """Ends a run that has diverged; raises Diverged. `steps` are the updates that it has seen."""

    def __init__(self) -> None:
        self._rule = DivergenceRule()
        self.steps = 0

    def on_step(self, view: RunView) -> None:
        """Look at the loss of the step."""
        self.steps = view.position.step
        if self._rule.diverged(view.metrics["loss"]):
            raise Diverged(view.position.step, self._rule.now, self._rule.lowest)
