"""Checkpoints: a directory per step, complete or absent, with every byte accounted for.

    checkpoints/step-00000100/model.safetensors      one file per group of tensors
                              optimizer.safetensors
                              state.json             plain data: step, tokens, data cursor, seeds, environment
                              manifest.json          sizes and hashes of all of them, written last
    checkpoints/latest                               name of the newest, for people

Protocol: everything is written into a partial folder, flushed, and renamed (`storage.atomic`); then `latest` is replaced;
then old steps are deleted, manifest first, so that a half-deleted step is never taken for a complete one. A crash at any
instant leaves the previous checkpoint or the new one. Loading takes the newest complete step, whatever `latest` says.

Damage: sizes and hashes are checked before a tensor is handed out, and the manifest is canonical JSON with a hash of
itself, so that one flipped byte anywhere is found. Nothing is deleted or repaired; an older step is used only if asked
for.

Safety: safetensors and JSON hold no code. Headers are bounded before they are parsed, file names in a manifest come
from a fixed pattern, and a directory of `torch.distributed.checkpoint` (which runs code when read) is refused.

This module knows nothing of models or optimizers: it stores named groups of tensors and plain data.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, no_grad

from torchstone import __version__
from torchstone.errors import CheckpointError
from torchstone.recipe.fingerprint import torch_version
from torchstone.storage import atomic
from torchstone.storage.hashing import bytes_hash, canonical_json, file_hash

SCHEMA = 1
MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
LARGEST_HEADER = 16 << 20
MOST_TENSORS = 100_000
LARGEST_JSON = 64 << 20
_STEP = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"[a-z][a-z0-9_]{0,40}\.(safetensors|json)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RETRIES, RETRY_SECONDS = 2, 0.5


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: a step, groups of named tensors, and plain JSON data."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    data: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: holds one folder per step.
        keep: complete checkpoints to keep; older ones are deleted after a save.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        self.directory = Path(directory)
        self.keep = keep

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.directory / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a manifest, in order (complete; not yet checked for damage)."""
        if not self.directory.is_dir():
            return []
        found = [(_STEP.fullmatch(item.name), item) for item in self.directory.iterdir()]
        return sorted(int(match[1]) for match, item in found if match and (item / MANIFEST).is_file())

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def check_space(self, bytes_per_checkpoint: int) -> None:
        """Raise CheckpointError unless the disk has room for one checkpoint more than are kept."""
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        needed = bytes_per_checkpoint * (self.keep + 1)
        if free < needed:
            raise CheckpointError(
                f"{self.directory} has {free / 1e9:.2f} GB free; keeping {self.keep} checkpoints of "
                f"{bytes_per_checkpoint / 1e9:.2f} GB needs {needed / 1e9:.2f} GB. Free space, choose another directory, or lower "
                "checkpoint.keep."
            )

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint; returns its folder. A step that is there already is left as it is.

        Raises:
            CheckpointError: the disk is full (after retries) or cannot be written; earlier checkpoints are intact.
        """
        target = self.path(snapshot.step)
        if (target / MANIFEST).is_file():
            return target
        for attempt in range(RETRIES + 1):
            try:
                self._write(target, snapshot)
                break
            except (OSError, SafetensorError) as error:
                full = getattr(error, "errno", None) in _FULL or "os error 28" in str(error).lower()
                if full and attempt < RETRIES:
                    time.sleep(RETRY_SECONDS)
                    continue
                raise CheckpointError(
                    f"cannot save {target}: {error}. Earlier checkpoints are intact"
                    f"{f' (newest: step {self.latest()})' if self.steps() else ''}; free space and run the same command again."
                ) from error
        self._prune()
        return target

    def _write(self, target: Path, snapshot: Snapshot) -> None:
        if target.exists():  # left over from a deletion that was cut short
            shutil.rmtree(target)
        with atomic.atomic_directory(target) as folder:
            for group, tensors in snapshot.tensors.items():
                with no_grad():
                    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / f"{group}.safetensors")
                atomic.stage_hook(f"{group} written")
            (folder / STATE).write_bytes(canonical_json({"step": snapshot.step, "data": dict(snapshot.data)}))
            atomic.stage_hook("state written")
            (folder / MANIFEST).write_bytes(_manifest(folder, snapshot.step))
            atomic.stage_hook("manifest written")
        atomic.atomic_write(self.directory / LATEST, target.name + "\n")
        atomic.stage_hook("latest moved")

    def _prune(self) -> None:
        """Delete steps beyond `keep`, and folders that crashes left behind."""
        complete = self.steps()
        for step in complete[: -self.keep]:
            (self.path(step) / MANIFEST).unlink()
            atomic.stage_hook("old manifest deleted")
            shutil.rmtree(self.path(step))
        for item in self.directory.iterdir():
            unfinished = _STEP.fullmatch(item.name) and not (item / MANIFEST).exists()
            if unfinished or (atomic.PARTIAL in item.name and not _alive(item.name)):
                shutil.rmtree(item, ignore_errors=True) if item.is_dir() else item.unlink(missing_ok=True)

    def load(
        self, step: int | None = None, *, fallback: bool = False, say: Callable[[str], None] = lambda text: None
    ) -> Snapshot:
        """Read and verify a checkpoint.

        Args:
            step: which; None takes the newest.
            fallback: if the newest is damaged, use the newest that is not; `say` is told of each that was passed over.
            say: receives warnings.

        Raises:
            CheckpointError: there is none, it is damaged, hostile, or written by a newer version.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} has no complete checkpoint of step {step}; complete: {steps or 'none'}.")
        if not steps:
            raise CheckpointError(f"{self.directory} has no complete checkpoint.")
        candidates = [step] if step is not None else steps[::-1]
        for number, candidate in enumerate(candidates):
            try:
                return read_checkpoint(self.path(candidate))
            except CheckpointError as error:
                if not fallback or number + 1 == len(candidates):
                    older = f" Older checkpoints: {', '.join(map(str, candidates[number + 1 :]))}; --fallback uses the newest intact one." if candidates[number + 1 :] else ""
                    raise CheckpointError(f"{error}{older}") from error
                say(f"WARNING: {error} Falling back to step {candidates[number + 1]}.")
        raise AssertionError("unreachable")


def read_checkpoint(folder: Path) -> Snapshot:
    """Verify one checkpoint folder and read it; raises CheckpointError naming the file that is wrong."""
    manifest = _read_manifest(folder)
    _check_files(folder, manifest["files"])
    tensors = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            _check_header(folder / name)
            try:
                tensors[name.removesuffix(".safetensors")] = load_file(folder / name)
            except (SafetensorError, OSError, ValueError, TypeError) as error:
                raise CheckpointError(f"{folder / name} is no valid safetensors file: {error}.") from error
    state = _read_json(folder / STATE)
    return Snapshot(int(state["step"]), tensors, state["data"])


def _manifest(folder: Path, step: int) -> bytes:
    files = {path.name: {"bytes": path.stat().st_size, "xxh3": file_hash(path)} for path in sorted(folder.iterdir())}
    body = {"schema": SCHEMA, "torchstone": __version__, "torch": torch_version(), "step": step, "files": files}
    return canonical_json({**body, "self": bytes_hash(canonical_json(body))}) + b"\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, more than any checkpoint of torchstone; refused.")
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it holds no mapping.")
    return data


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after checking that it is byte for byte what torchstone wrote."""
    path = folder / MANIFEST
    manifest = _read_json(path)
    schema = manifest.get("schema")
    body = {key: value for key, value in manifest.items() if key != "self"}
    intact = path.read_bytes() == canonical_json(manifest) + b"\n" and manifest.get("self") == bytes_hash(canonical_json(body))
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not match its own hash.")
    if schema != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {schema!r}, written by torchstone {manifest.get('torchstone')!r}; this version ({__version__}) reads "
            f"schema {SCHEMA}. Load it with that version and export it."
        )
    files = manifest.get("files")
    fits = isinstance(files, dict) and STATE in files and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("xxh3"), str) for entry in files.values()
    )
    bad = [name for name in files if not _FILE.fullmatch(name)] if fits else []
    if not fits or bad:
        raise CheckpointError(f"{path} lists {bad[:3] if bad else 'no valid files'}: not a checkpoint that torchstone wrote; refused.")
    return manifest


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    present = {item.name for item in folder.iterdir()} - {MANIFEST}
    if any(name == ".metadata" or name.endswith(".distcp") for name in present):
        raise CheckpointError(
            f"{folder} holds files of torch.distributed.checkpoint, whose metadata can run code when it is read; refused."
        )
    if missing := sorted(set(files) - present):
        raise CheckpointError(f"{folder / missing[0]} is missing.")
    if extra := sorted(present - set(files)):
        raise CheckpointError(f"{folder / extra[0]} does not belong to the checkpoint (its manifest does not list it); remove it.")
    for name, entry in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is not a regular file; refused.")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path} is damaged: {path.stat().st_size} bytes, the manifest says {entry['bytes']}.")
        if file_hash(path) != entry["xxh3"]:
            raise CheckpointError(f"{path} is damaged: its content does not match its hash.")


def _check_header(path: Path) -> None:
    """Bound the header of a safetensors file before any library parses it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise CheckpointError(f"{path} is no valid safetensors file: a header of {length} bytes in a file of {size}.")
        header = file.read(length)
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid safetensors file: its header is no JSON ({error}).") from error
    if not isinstance(entries, dict) or len(entries) > MOST_TENSORS:
        raise CheckpointError(f"{path} is no valid safetensors file: its header lists no tensors, or more than {MOST_TENSORS}.")


def _alive(name: str) -> bool:
    """True if the process that owns a partial folder still runs on this machine."""
    pid = name.rpartition(atomic.PARTIAL)[2].partition("-")[0]
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True
