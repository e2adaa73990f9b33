"""Names of files in a run directory, and how a directory without a run is refused."""

from __future__ import annotations

from pathlib import Path

from torchstone.errors import ConfigError

RECORD, RECIPE, GROWTH = "run.json", "recipe.yaml", "growth.json"


def require_run(directory: Path, said: str = "", give: str = "the directory that `torchstone train` wrote") -> None:
    """Raise ConfigError unless a directory holds a run.

    Args:
        directory: to look into.
        said: how the message begins; empty: with the directory.
        give: what the message asks for.
    """
    if not (directory / RECIPE).is_file():
        raise ConfigError(f"{said or directory} holds no run (no {RECIPE}); give {give}.")


def require_outside(directory: Path) -> None:
    """Raise ConfigError if a new run would lie inside the directory of another one."""
    inside = next((folder for folder in directory.resolve().parents if (folder / RECORD).is_file()), None)
    if inside is not None:
        raise ConfigError(f"{directory} lies inside the run directory {inside}; choose another --out, beside it.")
