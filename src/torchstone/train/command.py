"""What `torchstone train` asks for: the recipe, and the directory where it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchstone.errors import ConfigError
from torchstone.recipe.fingerprint import recipe_fingerprint
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.train.branch import branch_run


def asked_run(
    recipe: str | None,
    overrides: Sequence[str],
    out: Path | None,
    *,
    branch: str | None = None,
    decay: int | None = None,
    allow: Sequence[str] = (),
    resume: bool = True,
) -> tuple[Recipe, Path]:
    """The recipe to train and where; with a branch after its directory has been made.

    Args:
        recipe: its file; with a branch it may be None, or the first override.
        overrides: `key=value` texts.
        out: run directory; None makes `runs/train-FINGERPRINT`, but not for a branch.
        branch, decay, allow, resume: see `branch_run`.

    Raises:
        ConfigError: something is missing, or does not go together; and what `branch_run` raises.
    """
    if branch is None:
        if recipe is None:
            raise ConfigError("give a recipe: torchstone train RECIPE.")
        if decay is not None:
            raise ConfigError(
                "--decay says how a branch ends; give --branch CHECKPOINT, or schedule=wsd in the recipe."
            )
        loaded = load_recipe(Path(recipe), overrides)
        return loaded, out or Path("runs") / f"train-{recipe_fingerprint(loaded)[:10]}"
    if out is None:
        raise ConfigError("a branch is a run of its own; say with --out where it goes.")
    given = None if recipe is None else Path(recipe)
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        given, overrides = None, [recipe, *overrides]
    return branch_run(branch, out, given, overrides, decay=decay, allow=allow, resume=resume), out
