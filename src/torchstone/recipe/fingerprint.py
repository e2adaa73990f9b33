"""Fingerprints: which recipe, run by which code, on which kind of machine (promise P12).

A fingerprint is a hash of canonical JSON, so equal content gives equal text on every machine. It covers

- the resolved recipe, complete with every default, without its operational keys (`checkpoint`, `sinks`),
  which change what is stored and not what is computed;
- the code that computes: torchstone's version and a hash of the source of the packages that matter;
- the torch version, the device class, and the data fingerprint where the caller has built the data.

Pitfall: results of different fingerprints are never mixed. Editing any file of the hashed packages starts
afresh.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Any, Literal

from torchstone.errors import DependencyError
from torchstone.recipe.schema import Recipe
from torchstone.storage.hashing import file_hash, fingerprint_of
from torchstone.version import __version__

OPERATIONAL = ("checkpoint", "sinks")
HASHED_PACKAGES = ("nn", "models", "objectives", "optim", "data", "train", "llm", "evals", "diagnose", "lab", "studies")


def identity(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides the computation: its complete plain data without operational keys."""
    return {key: value for key, value in recipe.data_dict().items() if key not in OPERATIONAL}


def recipe_fingerprint(recipe: Recipe) -> str:
    """Fingerprint of the recipe alone: equal settings give equal fingerprints under any code version."""
    return fingerprint_of(identity(recipe))


def fingerprint(recipe: Recipe, *, data: str | None = None, device: str | None = None) -> str:
    """Fingerprint of one training run.

    Args:
        recipe: the recipe, its seed included.
        data: fingerprint of the built data (`DataSource.fingerprint`), where it is known.
        device: device class, `cpu` or `cuda`; None asks torch what this machine has.

    Returns:
        hexadecimal text, equal exactly when everything that matters is equal.
    """
    return fingerprint_of(
        {
            "recipe": identity(recipe),
            "code": code_fingerprint(),
            "torch": torch_version(),
            "device": device or device_class(),
            "data": data,
        }
    )


@cache
def code_fingerprint() -> str:
    """Fingerprint of torchstone's version and of the source of every module that computes."""
    root = Path(__file__).resolve().parent.parent
    files = sorted(path for package in HASHED_PACKAGES for path in (root / package).rglob("*.py"))
    sources = {path.relative_to(root).as_posix(): file_hash(path) for path in files}
    return fingerprint_of({"version": __version__, "sources": sources})


@cache
def torch_version() -> str:
    """The installed torch version with its build tag, without importing torch; raises DependencyError."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError as error:
        raise DependencyError("torch is not installed; run: pip install torch>=2.11") from error


def device_class() -> Literal["cpu", "cuda"]:
    """`cuda` if torch can use a GPU here, else `cpu`. Imports torch."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
