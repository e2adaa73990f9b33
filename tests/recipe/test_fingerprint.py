"""Fingerprints: equal exactly when what matters is equal (P12)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from torchstone.recipe.fingerprint import code_fingerprint, fingerprint, recipe_fingerprint, torch_version
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.recipe.yaml import dump_yaml


def test_spelling_does_not_matter(base: Recipe, base_yaml: str) -> None:
    assert recipe_fingerprint(load_recipe(dump_yaml(base))) == recipe_fingerprint(load_recipe(base_yaml))


@pytest.mark.parametrize("override", ["checkpoint.every=10", "checkpoint.keep=9", "sinks=[tensorboard]"])
def test_operational_keys_do_not_matter(base: Recipe, override: str) -> None:
    assert fingerprint(load_recipe(base, [override]), device="cpu") == fingerprint(base, device="cpu")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "model.width=65",
        "budget.steps=3",
        "precision=fp32",
        "evaluation.every=7",
        "batch.micro=2",
        "model.block.mixer=t-beta",
    ],
)
def test_everything_else_matters(base: Recipe, override: str) -> None:
    assert recipe_fingerprint(load_recipe(base, [override])) != recipe_fingerprint(base)


def test_data_device_and_code_matter(base: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fingerprint(base, device="cpu", data="aa")
    assert plain == fingerprint(base, device="cpu", data="aa")
    assert plain != fingerprint(base, device="cuda", data="aa")
    assert plain != fingerprint(base, device="cpu", data="ab")
    monkeypatch.setattr("torchstone.recipe.fingerprint.code_fingerprint", lambda: "other code")
    assert plain != fingerprint(base, device="cpu", data="aa")


def test_another_process_gives_the_same_code_fingerprint() -> None:
    script = "from torchstone.recipe.fingerprint import code_fingerprint as f; print(f())"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == code_fingerprint()


def test_torch_version_is_the_one_that_runs() -> None:
    import torch

    assert torch_version() == torch.__version__
