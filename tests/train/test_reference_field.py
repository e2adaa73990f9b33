"""A missing reference run is named by the field that the recipe has for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchstone.errors import ConfigError
from torchstone.recipe.load import load_recipe
from torchstone.train.budget import data_of
from torchstone.train.reference import open_reference


@pytest.mark.parametrize("kind, field", [("selective", "reference"), ("long-context", "scorer")])
def test_the_message_names_the_field(tmp_path: Path, kind: str, field: str) -> None:
    data = {"kind": "recall", "keys": 4, "values": 4, "cells": 8}
    model = {"kind": "decoder", "width": 16, "depth": 1, "head_dim": 8}
    objective = {"kind": kind, field: str(tmp_path)}
    recipe = load_recipe({"model": model, "data": data, "objective": objective, "budget": {"steps": 1}})
    with pytest.raises(ConfigError, match=rf"objective\.{field} is .*holds no run"):
        open_reference(recipe, data_of(recipe))
