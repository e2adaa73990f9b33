"""A study of known numbers, for tests of the runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchstone.lab.runner import RunOptions
from torchstone.lab.study import Arm, Cell, Claim, Measurement, Scale, Study
from torchstone.report.result import Metric


class Coin(Study):
    """Arm `b` is lower than `a` by 1 and a little noise; counts how often each cell runs."""

    slug = "coin"
    title = "Coins"
    question = "Is b lower?"
    baseline = "a"
    metrics = (Metric(name="loss", label="loss"),)
    claims = (Claim(id="b", sentence="b is lower", metric="loss", arm="b", baseline="a"),)
    scales = {"toy": Scale(3, {"shift": 1.0}), "noise": Scale(3, {"shift": 0.0})}

    def __init__(self) -> None:
        self.runs: list[tuple[str, int]] = []
        self.prepared = 0
        self.fail: set[tuple[str, int]] = set()
        self.raises: type[BaseException] = ValueError

    def arms(self, scale: Scale):
        return [Arm("a", "baseline"), Arm("b", settings={"shift": scale.settings["shift"]})]

    def prepare(self, arms, settings, directory):
        self.prepared += 1
        return {"unit": 2.0}

    def measure(self, cell: Cell) -> Measurement:
        self.runs.append((cell.arm.name, cell.seed))
        if (cell.arm.name, cell.seed) in self.fail:
            raise self.raises("planted")
        noise = ((cell.seed * 7919) % 11) / 10
        own = ((cell.seed * 104729) % 7) / 100 if cell.arm.name == "b" else 0.0
        shift = cell.arm.settings.get("shift", 0.0)
        return Measurement({"loss": cell.prepared["unit"] + noise + own - shift}, tokens=10)


def options(path: Path, **changes: Any) -> RunOptions:
    """Run in this process, into `path`."""
    return RunOptions(**{"on": "inline", "out": path, **changes})
