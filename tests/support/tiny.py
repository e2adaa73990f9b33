"""Recipes that train in a second, for tests of the laboratory."""

from __future__ import annotations

from typing import Any


def tiny_recipe(**changes: Any) -> dict[str, Any]:
    """Plain data of a two-layer decoder on in-context recall, three steps."""
    recipe: dict[str, Any] = {
        "model": {
            "kind": "decoder",
            "width": 32,
            "depth": 2,
            "head_dim": 8,
            "block": {
                "mixer": "attention",
                "feedforward": {"kind": "swiglu", "hidden": 64},
                "norm": "rmsnorm",
            },
        },
        "data": {"kind": "recall", "keys": 4, "values": 4, "cells": 8},
        "optimizer": {"kind": "adamw", "learning_rate": 3e-3},
        "schedule": {"kind": "constant"},
        "budget": {"steps": 3},
        "batch": {"sequences": 4},
        "precision": "fp32",
        "compile": False,
        "evaluation": {"every": None, "sequences": 8},
    }
    return recipe | changes
