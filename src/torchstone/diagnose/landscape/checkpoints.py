"""Checkpoints to compare with a model under analysis: other steps of its run, or other runs.

STEP            a step of the run that the model came from
RUN, RUN@STEP   another run's newest checkpoint, or the one after a step; RUN may be any model that `open_subject` reads
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.landscape.states import require_alike, state_of
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.names import RECIPE
from torchstone.train.run import load_run


def run_of(subject: Subject) -> Path | None:
    """The run directory that a subject came from; None where it is no run."""
    path = Path(subject.name)
    return path if (path / RECIPE).is_file() else None


def steps_of(directory: Path) -> list[int]:
    """Steps of a run's complete checkpoints, ascending."""
    return sorted(CheckpointStore(directory / "checkpoints").steps())


def checkpoint_of(subject: Subject, where: str) -> dict[str, Tensor]:
    """The weights at `where`, on the subject's device and in its types.

    A Hugging Face model is opened with the module names of the subject, and with the code that comes with it if the subject was
    opened so; a revision is the subject's own, the other model is the newest. Types become those of the subject.

    Raises:
        ConfigError: a step without a run, no such run or checkpoint, or a model of another architecture.
    """
    name, at, step = where.rpartition("@")
    if where.isdecimal():
        directory = _own_run(subject, where)
        return fitted(subject, state_of(load_run(directory, _there(directory, int(where)))[1]))
    if at and step.isdecimal():
        if not (Path(name) / RECIPE).is_file():
            raise ConfigError(
                f"{where} names a step of a run, and there is no run at {name}; give the folder of a run."
            )
        return fitted(subject, state_of(load_run(Path(name), _there(Path(name), int(step)))[1]))
    if (Path(where) / RECIPE).is_file():
        return fitted(subject, state_of(load_run(Path(where))[1]))
    trusted = type(subject.model).__module__.startswith("transformers_modules")
    names = getattr(subject, "_names", None)
    return fitted(subject, state_of(open_subject(where, trust_remote_code=trusted, names=names or None).model))


def trajectory(subject: Subject) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Every checkpoint that the subject's run kept, one at a time; nothing where it is no run."""
    directory = run_of(subject)
    if directory is None:
        return
    for step in steps_of(directory):
        yield step, fitted(subject, state_of(load_run(directory, step)[1]))


def earliest(subject: Subject) -> str:
    """The first checkpoint that the subject's run kept and that is not the subject itself.

    Raises:
        ConfigError: no run, or one checkpoint only.
    """
    directory = run_of(subject)
    steps = [] if directory is None else steps_of(directory)
    if directory is not None and len(steps) > 1:
        first = fitted(subject, state_of(load_run(directory, steps[0])[1]))
        own = subject.model.state_dict()
        if all(bool(torch.equal(value, own[name])) for name, value in first.items()):
            return str(steps[1])
    if len(steps) < 2:
        raise ConfigError(
            f"{subject.name} has {len(steps)} checkpoint(s) of a run, and a line needs two. Name the other one with "
            "against=STEP, RUN or RUN@STEP, or train with checkpoint.every and a larger checkpoint.keep."
        )
    return str(steps[0])


def fitted(subject: Subject, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state in the subject's own types and on its device; raises ConfigError for another architecture."""
    own = subject.model.state_dict()
    require_alike(own, state)
    return {name: value.to(own[name].device, own[name].dtype) for name, value in state.items()}


def _own_run(subject: Subject, step: str) -> Path:
    directory = run_of(subject)
    if directory is None:
        raise ConfigError(f"{step} is a step, and {subject.name} is no run directory; give RUN@STEP, or another model.")
    return directory


def _there(directory: Path, step: int) -> int:
    steps = steps_of(directory)
    if step not in steps:
        raise ConfigError(
            f"{directory} has no checkpoint of step {step}; it kept {', '.join(map(str, steps)) or 'none'} "
            "(checkpoint.every and checkpoint.keep say which are kept)."
        )
    return step
