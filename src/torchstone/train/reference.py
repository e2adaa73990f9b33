"""The reference model of an objective: a run whose frozen model scores the same tokens.

An objective names it as a run directory (`reference_run`), and the recipe's field for it, where that is not `reference`
(`reference_field`). Its tokens must be those of the run that it serves. A run takes the newest checkpoint when it starts and is
bound to it: `run.json` keeps its step and its hash, a resume loads that very step, and the reference may go on meanwhile. The
hash joins the fingerprint of the data.

Pitfall: a reference that goes on deletes old checkpoints (`checkpoint.keep`); a run that is bound to one of them then cannot be
resumed. Take a finished run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchstone.errors import ConfigError
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.storage.hashing import bytes_hash, fingerprint_of
from torchstone.train.budget import data_of
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.manifest import MANIFEST
from torchstone.train.names import RECIPE, require_run
from torchstone.train.state import restore_model


@dataclass(frozen=True)
class Bound:
    """The checkpoint of a reference that a run is bound to: its step, and the hash of its manifest."""

    step: int
    fingerprint: str

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Bound:
        """From plain data; raises ValueError or TypeError if it is none."""
        found = cls(**stored)
        if type(found.step) is not int or not isinstance(found.fingerprint, str):
            raise ValueError("its reference is none that torchstone wrote")
        return found


@dataclass(frozen=True, eq=False)
class Reference:
    """A frozen model in evaluation mode, and the checkpoint that it is from."""

    model: Any
    bound: Bound

    def with_data(self, data: str) -> str:
        """Fingerprint of data that this reference scores."""
        return fingerprint_of(["reference", data, self.bound.fingerprint])


def open_reference(recipe: Recipe, data: Any, bound: Bound | None = None) -> Reference | None:
    """The reference that the recipe's objective names, on the CPU; None if it names none.

    Args:
        recipe: of the run that it serves.
        data: the data source of that run.
        bound: the checkpoint that the run is bound to; None takes the newest.

    Raises:
        ConfigError: the directory holds no run, a model of other tokens, or no longer what the run is bound to.
            CheckpointError: its checkpoint is missing or damaged.
    """
    objective = recipe.objective.build()
    named = getattr(objective, "reference_run", None)
    if named is None:
        return None
    directory = Path(named)
    said = f"objective.{getattr(objective, 'reference_field', 'reference')} is {directory}"
    require_run(directory, f"{said}, which", "the directory that `torchstone train` wrote for the reference model")
    theirs = load_recipe(directory / RECIPE)
    source = data_of(theirs)
    _check_tokens(directory, source, data)
    store = CheckpointStore(directory / "checkpoints")
    if bound is not None:
        _check_bound(store, bound, said)
    model = theirs.model.build(source.vocab_size, source.length, theirs.seed)
    snapshot = store.load(bound.step if bound else None)
    restore_model(model, snapshot.tensors["model"])
    return Reference(model.eval().requires_grad_(False), Bound(snapshot.step, _hash(store, snapshot.step)))


def _hash(store: CheckpointStore, step: int) -> str:
    return bytes_hash((store.path(step) / MANIFEST).read_bytes())


def _check_bound(store: CheckpointStore, bound: Bound, said: str) -> None:
    """Raise ConfigError unless the checkpoint that a run is bound to is there as it was."""
    advice = "Restore it, or train into another directory, which takes the newest checkpoint."
    if bound.step not in store.steps():
        there = ", ".join(map(str, store.steps())) or "none"
        raise ConfigError(
            f"{said}, and this run was started with its checkpoint of step {bound.step}, which is gone (there: {there}). {advice}"
        )
    if (store.path(bound.step) / MANIFEST).is_file() and _hash(store, bound.step) != bound.fingerprint:
        raise ConfigError(
            f"{said}, and its checkpoint of step {bound.step} is another one than this run was started with. {advice}"
        )


def _check_tokens(directory: Path, theirs: Any, ours: Any) -> None:
    """Raise ConfigError unless ids mean the same to both."""
    if theirs.vocab_size != ours.vocab_size:
        raise ConfigError(
            f"reference vocab {theirs.vocab_size} ≠ model vocab {ours.vocab_size}: the run in {directory} was trained on other "
            "tokens. Train the reference with this recipe's tokenizer, or compare texts by spans (torchstone eval longppl)."
        )
    names = [getattr(source.tokenizer, "fingerprint", None) for source in (theirs, ours)]
    if names[0] != names[1]:
        raise ConfigError(
            f"the reference in {directory} has another tokenizer than this recipe (fingerprints {names[0]} and {names[1]}), "
            "though as many tokens; train the reference with this recipe's tokenizer (a trained one, bpe, differs from "
            "corpus to corpus)."
        )
