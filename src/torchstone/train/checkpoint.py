"""Checkpoints: a directory per step, complete or absent, with every byte accounted for.

    checkpoints/step-00000100/model.safetensors      one file per group of tensors
                              optimizer.safetensors manifest.json          step, tokens, seeds, environment;
                              sizes and hashes; written last
    checkpoints/latest                               name of the newest, with a check

Protocol: everything is written into a partial folder, flushed, and renamed (`storage.atomic`); then
`latest` is replaced; then old steps are deleted, manifest first, so that a half-deleted step is never taken
for a complete one. A crash at any instant leaves the previous checkpoint or the new one. Order is by step,
never by a clock.

Damage: sizes and hashes are checked before a tensor is handed out (`train.manifest`). Nothing is deleted or
repaired. An older step is used only if asked for, and what is damaged is set aside under another name once
the run has gone on from the older one.

This module knows nothing of models or optimizers: it stores named groups of tensors and plain data.
"""

from __future__ import annotations

import errno
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchstone.errors import CheckpointError
from torchstone.storage import atomic
from torchstone.storage.hashing import bytes_hash
from torchstone.storage.names import safe_text
from torchstone.train.manifest import (
    GROUP,
    MANIFEST,
    check_files,
    check_header,
    manifest_bytes,
    read_manifest,
    refuse_foreign,
)

LATEST = "latest"
RETRIES, RETRY_SECONDS = 2, 0.5
_STEP = re.compile(r"step-(\d{8,18})")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds.

    Attributes:
        step: updates done so far.
        tensors: groups of named tensors, one file each; a group's name is a lower-case word (`model`).
        data: plain JSON data (counters, seeds, fingerprints, environment); it is kept in the manifest.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    data: Mapping[str, Any]


def say_on_stderr(text: str) -> None:
    """The default of `say`: a line that nobody misses."""
    print(safe_text(text), file=sys.stderr, flush=True)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: holds one folder per step; made with the first save.
        keep: complete checkpoints to keep, at least one; older ones are deleted after a save.
        say: receives warnings.
        protected: steps that are never deleted, beside the `keep` newest (ends of cycles, `Schedule.checkpoints`).
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int = 2,
        say: Callable[[str], None] = say_on_stderr,
        protected: Iterable[int] = (),
    ) -> None:
        assert keep >= 1, "a run without a checkpoint cannot be resumed"
        self.directory = Path(directory)
        self.keep = keep
        self.say = say
        self.protected = frozenset(protected)

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.directory / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that `load` takes into account, in order; whether they are damaged is not checked here.

        A folder without a manifest that is older than a complete one is the rest of a deletion and does not
        count; a newer one is damaged and does, and so does a step that `latest` names and that is not
        there.

        Raises:
            CheckpointError: there is no folder of a step, but a damaged `latest`.
        """
        folders = self._folders()
        newest_complete = max((step for step, path in folders.items() if _complete(path)), default=-1)
        found = {step for step, path in folders.items() if _complete(path) or step > newest_complete}
        try:
            named = self._named()
        except CheckpointError:
            if not found:
                raise
            named = None
        if named is not None and named > max(found, default=-1):
            found.add(named)
        return sorted(found)

    def latest(self) -> int | None:
        """The newest step that `load` would take, or None if nothing was ever saved."""
        return max(self.steps(), default=None)

    def check_space(self, bytes_per_checkpoint: int) -> None:
        """Raise CheckpointError unless the disk has room for every checkpoint that will be kept and one being saved."""
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        complete = [step for step, path in self._folders().items() if _complete(path)]
        newest = max(complete, default=0)
        # steps that are past and not there will not come any more, such as those before a branch's beginning
        ends = sum(step in complete or step > newest for step in self.protected)
        kept = self.keep + max(0, ends - 1)  # the last one is the end, one of the newest
        needed = bytes_per_checkpoint * (kept + 1 - min(len(complete), kept))
        if free < needed:
            cycles = f" ({self.keep} and {ends - 1} ends of decays or cycles)" if kept > self.keep else ""
            raise CheckpointError(
                f"{self.directory} has {free / 1e9:.3g} GB free; keeping {kept} checkpoints{cycles} of "
                f"{bytes_per_checkpoint / 1e9:.3g} GB, and one more while saving, needs {needed / 1e9:.3g} "
                f"GB. Free space, choose another directory, or {'plan fewer cycles' if cycles else 'lower checkpoint.keep'}."
            )

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint; returns its folder.

        A step that is there already and intact is left as it is. Steps beyond this one, left by a run that
        went on from an older checkpoint, are set aside under another name.

        Raises:
            CheckpointError: the disk is full (after retries) or cannot be written, or the data is too large
            to be read later; earlier checkpoints are intact.
        """
        for group in snapshot.tensors:
            assert GROUP.fullmatch(group), f"{group!r} cannot name a group of tensors"
        for attempt in range(RETRIES + 1):
            try:
                return self._save(snapshot)
            except (OSError, SafetensorError) as error:
                if attempt < RETRIES and _disk_full(error):
                    time.sleep(RETRY_SECONDS)
                    continue
                raise CheckpointError(self._failure(snapshot.step, error)) from error
        raise AssertionError("unreachable")

    def _save(self, snapshot: Snapshot) -> Path:
        target = self.path(snapshot.step)
        if not self._is_intact(snapshot.step):
            self._set_aside(target)
            self._write(target, snapshot)
        atomic.atomic_write(self.directory / LATEST, _pointer(target.name))
        atomic.stage_hook("latest moved")
        for step, path in self._folders().items():
            if step > snapshot.step:
                self._set_aside(path)
        self._prune()
        return target

    def _write(self, target: Path, snapshot: Snapshot) -> None:
        with atomic.atomic_directory(target) as folder:
            for group, tensors in snapshot.tensors.items():
                save_file(_storable(tensors), folder / f"{group}.safetensors")
                check_header(folder / f"{group}.safetensors")  # what is written must be read later
                atomic.stage_hook(f"{group} written")
            (folder / MANIFEST).write_bytes(manifest_bytes(folder, snapshot.step, snapshot.data))
            atomic.stage_hook("manifest written")

    def _failure(self, step: int, error: Exception) -> str:
        complete = [step for step, path in self._folders().items() if _complete(path)]
        left = f"Earlier checkpoints are intact (newest: step {max(complete)})" if complete else "There is none yet"
        what = "free space" if _disk_full(error) else "mend this"
        return f"cannot save step {step} in {self.directory}: {error}. {left}; {what} and run the same command again."

    def _is_intact(self, step: int) -> bool:
        """True if the step is there and passes every check."""
        try:
            read_checkpoint(self.path(step))
        except CheckpointError:
            return False
        return True

    def _set_aside(self, path: Path) -> None:
        """Give a folder that is in the way another name; nothing is deleted."""
        if path.exists():
            aside = path.with_name(f"{path.name}.set-aside-{secrets.token_hex(4)}")
            path.rename(aside)
            self.say(f"WARNING: {path} is damaged or belongs to a run that was left; it is now {aside.name}.")

    def _prune(self) -> None:
        """Delete steps beyond `keep` that are not protected, and what crashes left behind."""
        folders = self._folders()
        complete = sorted(step for step, path in folders.items() if _complete(path))
        for step in (step for step in complete[: -self.keep] if step not in self.protected):
            (folders[step] / MANIFEST).unlink()
            atomic.stage_hook("old manifest deleted")
            shutil.rmtree(folders[step], ignore_errors=True)
            atomic.stage_hook("old step deleted")
        for step, path in folders.items():
            if step < complete[-1] and not _complete(path):
                shutil.rmtree(path, ignore_errors=True)
        for item in self.directory.iterdir():
            if atomic.PARTIAL in item.name and not atomic.partial_owner_lives(item.name):
                shutil.rmtree(item, ignore_errors=True) if item.is_dir() else item.unlink(missing_ok=True)

    def load(
        self, step: int | None = None, *, fallback: bool = False, say: Callable[[str], None] | None = None
    ) -> Snapshot:
        """Read and verify a checkpoint.

        Args:
            step: which; None takes the newest.
            fallback: if the newest is damaged, use the newest that is not; each that is passed over is told
                to `say`.
            say: receives warnings; None takes the store's.

        Returns:
            the snapshot, its tensors on the CPU.

        Raises:
            CheckpointError: there is none, it is damaged, hostile, or written by another schema. Nothing is
            changed.
        """
        say = say or self.say
        steps = self.steps()
        if step is not None and step not in steps:
            listed = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"{self.directory} has no checkpoint of step {step}; there: {listed}.")
        if not steps:
            raise CheckpointError(f"{self.directory} has no checkpoint.")
        if step is not None:
            return read_checkpoint(self.path(step))
        try:
            self._named()
        except CheckpointError as error:
            if not fallback:
                raise CheckpointError(f"{error} Delete it, or use --fallback, to take step {steps[-1]}.") from error
            say(f"WARNING: {error} Taking the newest step instead.")
        return self._newest_intact(steps[::-1], fallback, say)

    def _newest_intact(self, candidates: list[int], fallback: bool, say: Callable[[str], None]) -> Snapshot:
        for number, candidate in enumerate(candidates, start=1):
            older = ", ".join(map(str, candidates[number:]))
            try:
                return read_checkpoint(self.path(candidate))
            except CheckpointError as error:
                if not older:
                    raise CheckpointError(
                        f"{error} No other checkpoint is left; to start again, use another directory."
                    ) from error
                if not fallback:
                    raise CheckpointError(
                        f"{error} Older checkpoints: {older}; --fallback uses the newest intact one."
                    ) from error
                say(f"WARNING: {error} Falling back to step {candidates[number]}; later steps are done again.")
        raise AssertionError("unreachable")

    def _folders(self) -> dict[int, Path]:
        """Folders of steps, complete or not, in order."""
        if not self.directory.is_dir():
            return {}
        found = ((_STEP.fullmatch(item.name), item) for item in self.directory.iterdir())
        return dict(sorted((int(match[1]), item) for match, item in found if match))

    def _named(self) -> int | None:
        """The step that `latest` names, or None without that file; CheckpointError if it is damaged."""
        path = self.directory / LATEST
        try:
            with open(path, "rb") as file:
                content = file.read(200)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        name = content.split(b" ")[0].decode(errors="replace")
        match = _STEP.fullmatch(name)
        if match is None or content != _pointer(name):
            raise CheckpointError(f"{path} is damaged: it does not name a step as torchstone writes it.")
        return int(match[1])


def read_checkpoint(folder: Path) -> Snapshot:
    """Verify one checkpoint folder and read it; raises CheckpointError naming the file that is wrong."""
    refuse_foreign(folder)
    manifest = read_manifest(folder)
    if folder.name != f"step-{manifest['step']:08d}":
        raise CheckpointError(f"{folder / MANIFEST} is of step {manifest['step']}, its folder of another; refused.")
    tensors = {}
    try:
        check_files(folder, manifest["files"])
        for name in manifest["files"]:
            tensors[name.removesuffix(".safetensors")] = load_file(folder / name)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / name} is no valid safetensors file: {error}; refused.") from error
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from error
    return Snapshot(manifest["step"], tensors, manifest["data"])


def _complete(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _pointer(name: str) -> bytes:
    return f"{name} {bytes_hash(name.encode())}\n".encode()


def _disk_full(error: Exception) -> bool:
    """True if the disk, a quota or a file-size limit is exhausted (safetensors says so in its text)."""
    codes = (f"os error {code})" for code in _FULL)
    return getattr(error, "errno", None) in _FULL or any(code in str(error) for code in codes)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory (tied weights are stored twice)."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return found
