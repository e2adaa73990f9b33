"""What `torchstone score` does: open the models, score, and write the report or the store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import get_args

import torch

from torchstone.data.cache import cache_folder
from torchstone.data.loss_store import LossStore, Precision
from torchstone.data.scored import require_windows
from torchstone.data.text import TextSource
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.adapters.loading import usable_device
from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import load_texts
from torchstone.errors import ConfigError
from torchstone.evals.scoring import Report, identity, quiet, score_data
from torchstone.evals.scoring_finding import LOSSES, score_finding, score_texts, write_records
from torchstone.recipe.load import load_recipe
from torchstone.report.finding import Finding
from torchstone.report.finding_write import write
from torchstone.report.stamp import stamped
from torchstone.storage.hashing import fingerprint_of
from torchstone.train.record import RECIPE


@dataclass(frozen=True)
class Loading:
    """How models are opened, beside their name, checkpoint and revision.

    Attributes:
        device: None: the first GPU, else the CPU.
        dtype: type of weights and passes.
        tokenizer: in place of the models' own.
        trust_remote_code: run code that comes with a Hugging Face model.
    """

    device: str | None = None
    dtype: str = "float32"
    tokenizer: str | None = None
    trust_remote_code: bool = False

    def check(self, *sources: str) -> None:
        """Raise ConfigError for what cannot be honoured with these models."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}.")
        if self.trust_remote_code and all(map(_is_run, sources)):
            raise ConfigError(
                f"trust_remote_code was given and has no meaning for {' and '.join(sources)}; leave it out."
            )

    def open(self, source: str, step: int | None = None, revision: str | None = None) -> Subject:
        """A model; raises what `open_subject` raises."""
        return open_subject(
            source,
            step=step,
            revision=revision,
            tokenizer=self.tokenizer,
            device=usable_device(self.device),
            dtype=getattr(torch, self.dtype),
            trust_remote_code=self.trust_remote_code and not _is_run(source),
        )


DTYPES = ("float32", "bfloat16", "float16")


def _is_run(source: str) -> bool:
    return (Path(source) / RECIPE).is_file()


@dataclass(frozen=True)
class Asked:
    """What is scored, with which models, as on the command line."""

    files: tuple[str, ...]
    model: str
    reference: str
    ratio: float = 0.6
    window: int | None = None
    stride: int | None = None
    step: int | None = None
    reference_step: int | None = None
    revision: str | None = None
    reference_revision: str | None = None
    loading: Loading = Loading()

    def folder(self) -> Path:
        """`runs/score-MODEL-FINGERPRINT`: one folder for everything that gives the same numbers on the same device."""
        asked = asdict(self) | {"files": [_place(file) for file in self.files]}
        del asked["loading"]["device"]
        asked["loading"]["tokenizer"] = self.loading.tokenizer and _place(self.loading.tokenizer)
        asked |= {"model": _place(self.model), "reference": _place(self.reference)}
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.model).name).strip("-.") or "model"
        return Path("runs") / f"score-{stem[:60]}-{fingerprint_of(asked)[:10]}"

    def words(self) -> list[str]:
        """The command that asks for the same, word by word."""
        words = ["torchstone", "score", "text", *self.files, "--model", self.model, "--reference", self.reference]
        for given in (self, self.loading):
            for one in fields(given):
                value = getattr(given, one.name)
                if one.default is MISSING or value == one.default or one.name == "loading":
                    continue
                flag = f"--{one.name.replace('_', '-')}"
                words += [flag] if value is True else [flag, str(value)]
        return words


def _place(name: str) -> str:
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def score_files(
    asked: Asked, out: Path | None = None, report: Report = quiet, environment: dict[str, str] | None = None
) -> tuple[Path, Finding]:
    """Score texts of files with two models and write the report; returns its page and the finding.

    Args:
        asked: what, and with which models.
        out: folder of the report; None: `asked.folder()`.
        report: receives progress.
        environment: machine and versions, for the report.

    Raises:
        ConfigError, DataError, CheckpointError, DependencyError: see `score_texts`, `open_subject` and `load_texts`.
    """
    asked.loading.check(asked.model, asked.reference)
    out = asked.folder() if out is None else out
    texts = [
        (file if len(found) == 1 else f"{file}, text {number}", text)
        for file in asked.files
        for found in [load_texts([file])]
        for number, text in enumerate(found, start=1)
    ]
    model = asked.loading.open(asked.model, asked.step, asked.revision)
    reference = asked.loading.open(asked.reference, asked.reference_step, asked.reference_revision)
    scored = score_texts(
        model, reference, texts, ratio=asked.ratio, window=asked.window, stride=asked.stride, kept=out / LOSSES, report=report
    )  # fmt: skip
    finding = stamped(score_finding(model, reference, scored, asked.ratio), asked.words(), environment or {})
    write_records(scored, out)
    return write(finding, out), finding


def score_recipe(
    recipe: Path,
    overrides: Sequence[str],
    reference: str,
    store: Path,
    precision: str = "float16",
    step: int | None = None,
    revision: str | None = None,
    loading: Loading | None = None,
    report: Report = quiet,
) -> LossStore:
    """Write or continue the loss store of a recipe's training data.

    Args:
        recipe, overrides: whose training data.
        reference, step, revision, loading: the model, and how it is opened.
        store: folder.
        precision: of the stored losses.
        report: receives progress.

    Raises:
        ConfigError: data whose rows have no number of their own, an unknown precision, and what `score_data` refuses.
    """
    stored = next((one for one in get_args(Precision) if one == precision), None)
    if stored is None:
        raise ConfigError(f"precision is {precision!r}; allowed: {', '.join(get_args(Precision))}.")
    loading = loading or Loading()
    loading.check(reference)
    part = load_recipe(recipe, overrides).data
    require_windows(part.kind)
    source = part.build(cache_folder())
    assert isinstance(source, TextSource)
    subject = loading.open(reference, step, revision)
    about = identity(subject, step)
    return score_data(source, subject, store, about=about, precision=stored, report=report)
