"""Rates of WSD-S, Warmup-Stable-Decay and cosine cycles against those of Levanter and OLMo-core.

Every case of the file is run, with the keyword arguments that it was made with, through the recipe part.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from torchstone.optim.schedules.wsd_s import WSDSConfig

TOLERANCE = 1e-5  # of the peak


@cache
def vectors(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "wsd-s.npz") as arrays:
        return dict(arrays)


def cases(folder: Path, name: str) -> list[dict[str, Any]]:
    """Keyword arguments of every case of one list."""
    return json.loads(str(vectors(folder)["config"]))[name]


def agrees(expected: np.ndarray, settings: dict[str, Any], steps: int, peak: float) -> None:
    schedule = WSDSConfig(**settings).build(steps, peak)
    found = np.array([schedule.lr(step) for step in range(len(expected))])
    highest = peak * max(settings.get("peaks", ()) or (1.0,))
    worst = np.abs(found - expected).argmax()
    assert np.abs(found - expected)[worst] <= TOLERANCE * highest, f"step {worst}: {found[worst]} and {expected[worst]}"


def test_levanter(reference_folder: Path) -> None:
    for index, case in enumerate(cases(reference_folder, "levanter")):
        expected = vectors(reference_folder)[f"lev_{index}_lr"]
        assert len(expected) == case["n"]
        settings = {
            "warmup": case.get("warmup", 0.01),
            "rewarmup": case.get("rewarmup", 0.0),
            "decay": case.get("decay"),
            "shape": case.get("lr_schedule", "cosine"),
            "final": case.get("min_lr_ratio", 0.1),
            "cycles": listed(case.get("cycles")),
            "cycle_length": listed(case.get("cycle_length")),
        }
        agrees(expected, settings, case["n"], case["learning_rate"])


def listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def olmo(case: dict[str, Any]) -> dict[str, Any]:
    """Settings of a case of OLMo-core; absolute rates become factors of its peak."""
    return {
        "style": "olmo",
        "warmup": amount(case, "warmup", 0.0),
        "decay": amount(case, "decay", 0.1),
        "final": case.get("decay_min_lr", 0.0) / case["lr"],
        "initial": case.get("warmup_min_lr", 0.0) / case["lr"],
    }


def amount(case: dict[str, Any], name: str, default: float) -> float | None:
    """Steps if the case has them, else its fraction; all of a period is None."""
    steps, fraction = case.get(name), case.get(f"{name}_fraction")
    if steps is None and fraction == 1:
        return None
    return next((value for value in (steps, fraction) if value is not None), default)


def test_periods_of_olmo(reference_folder: Path) -> None:
    for index, case in enumerate(cases(reference_folder, "olmo_wsds")):
        expected = vectors(reference_folder)[f"wsds_{index}_lr"]
        assert len(expected) > case["n"] == sum(case["period_lengths"])
        settings = olmo(case) | {"cycle_length": tuple(case["period_lengths"])}
        settings["peaks"] = tuple(case.get("period_lr_multipliers") or ())
        agrees(expected, settings, case["n"], case["lr"])


def test_one_period_is_the_plain_schedule_of_olmo(reference_folder: Path) -> None:
    for index, case in enumerate(cases(reference_folder, "olmo_wsd")):
        expected = vectors(reference_folder)[f"wsd_{index}_lr"]
        assert len(expected) > case["n"]
        agrees(expected, olmo(case), case["n"], case["lr"])
