"""What an optimizer of a recipe takes over from another kind: every ordered pair."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from torchstone.recipe.load import load_recipe
from torchstone.recipe.registry import kinds, part_class

TINY = Path(__file__).parents[2] / "recipes" / "tiny.yaml"
ALIKE = {"adamw", "liona", "lionar", "rotational"}
PARTS: list[dict[str, Any]] = [{"kind": kind} for kind in kinds("optimizer")] + [
    {"kind": "rotational", "inner": inner} for inner in ("sgdm", "lion")
]


PAIRS = [pair for pair in itertools.permutations(PARTS, 2) if pair[0]["kind"] != pair[1]["kind"]]


@pytest.mark.parametrize("old, new", PAIRS, ids=str)
def test_decay_carries_over_and_the_rate_within_one_scale(old: dict[str, Any], new: dict[str, Any]) -> None:
    given = {**old, "learning_rate": 0.0123, "weight_decay": 0.07, "clip": 0.5}
    start = load_recipe(TINY, [f"optimizer={json.dumps(given)}"])
    made = load_recipe(start, [f"optimizer={json.dumps(new)}"]).optimizer
    fresh: Any = part_class("optimizer", new["kind"]).model_validate(new)
    alike = {old["kind"], new["kind"]} <= ALIKE and old.get("inner", "adamw") == "adamw"
    rate = 0.0123 if alike else fresh.learning_rate
    assert made == fresh.model_copy(update={"learning_rate": rate, "weight_decay": start.optimizer.weight_decay})
