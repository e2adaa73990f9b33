"""What a checkpoint folder must look like before anything in it is believed.

`manifest.json` is canonical JSON (so that only one text stands for its content) with a hash of itself, and
names
size and hash of every other file: one flipped byte anywhere is found. It also holds the plain data of the
    run, for people and for resuming.

A damaged folder and a hostile one look alike, so both are refused before a tensor exists: sizes first, then
bounded headers, then hashes. File names come from a fixed pattern, nothing is followed out of the folder,
and formats that run code when they are read (pickle, `torch.distributed.checkpoint`) are refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchstone.errors import CheckpointError
from torchstone.recipe.fingerprint import torch_version
from torchstone.storage.hashing import bytes_hash, canonical_json, file_hash
from torchstone.version import __version__

SCHEMA = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 4 << 20
SMALLEST_HEADER, LARGEST_HEADER = 2, 16 << 20  # `{}` is the smallest
MOST_TENSORS = 100_000
GROUP = re.compile(r"[a-z][a-z0-9_]{0,40}")
_FILE = re.compile(rf"{GROUP.pattern}\.safetensors")


def manifest_bytes(folder: Path, step: int, data: Mapping[str, Any]) -> bytes:
    """The manifest of a folder whose other files are complete.

    Args:
        folder: holds the safetensors files; they are read once more for their hashes.
        step: of the checkpoint.
        data: plain data of the run (tokens, seeds, fingerprints, environment).

    Raises:
        CheckpointError: the data is so large that `read_manifest` would refuse it.
    """
    files = {path.name: {"bytes": path.stat().st_size, "xxh3": file_hash(path)} for path in sorted(folder.iterdir())}
    body = {
        "schema": SCHEMA,
        "torchstone": __version__,
        "torch": torch_version(),
        "step": step,
        "files": files,
        "data": dict(data),
    }
    content = canonical_json({**body, "self": bytes_hash(canonical_json(body))}) + b"\n"
    if len(content) > LARGEST_MANIFEST:
        raise CheckpointError(
            f"the plain data of step {step} makes a manifest of {len(content)} bytes, more than {LARGEST_MANIFEST}; "
            "keep large things as tensors."
        )
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, after checking that it is byte for byte what torchstone wrote.

    Raises:
        CheckpointError: it is missing, damaged, of another schema, or lists what no checkpoint has.
    """
    path = folder / MANIFEST
    content = _bounded_bytes(path)
    try:
        manifest = json.loads(content)
        intact = isinstance(manifest, dict) and "self" in manifest and _is_canonical(manifest, content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not match its own hash.")
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {manifest.get('schema')!r}, written by torchstone "
            f"{manifest.get('torchstone')!r}; this version ({__version__}) reads schema {SCHEMA}. Use that "
            "version to continue or to export it."
        )
    _check_form(path, manifest)
    return manifest


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare a folder with its manifest's list; raises CheckpointError naming the file that is wrong."""
    present = {item.name for item in folder.iterdir()} - {MANIFEST}
    if missing := sorted(set(files) - present):
        raise CheckpointError(f"{folder / missing[0]} is missing.")
    if extra := sorted(present - set(files)):
        raise CheckpointError(
            f"{folder / extra[0]} does not belong to the checkpoint (it is not in the manifest); remove it."
        )
    for name, entry in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is not a regular file; refused.")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path} is damaged: {size} bytes, the manifest says {entry['bytes']}.")
    for name, entry in files.items():
        if file_hash(folder / name) != entry["xxh3"]:
            raise CheckpointError(f"{folder / name} is damaged: its content does not match its hash.")
        check_header(folder / name)


def check_header(path: Path) -> None:
    """Bound the header of a safetensors file before a library parses it; raises CheckpointError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start, first = file.read(8), file.read(1)
        # a header's length may begin with the bytes of a pickle; what follows it tells them apart
        if first != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
            raise CheckpointError(f"{path} looks like a pickle, which can run code when it is read; refused.")
        length = int.from_bytes(start, "little")
        if size < 8 or not SMALLEST_HEADER <= length <= min(LARGEST_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is no valid safetensors file: a header of {length} bytes in {size} bytes; refused."
            )
        entries = (first + file.read(length - 1)).count(b"{") - 1  # one opens the header, one each tensor
    if entries > MOST_TENSORS:
        raise CheckpointError(
            f"{path} is no valid safetensors file: a header of more than {MOST_TENSORS} tensors; refused."
        )


def refuse_foreign(folder: Path) -> None:
    """Raise CheckpointError if a folder is missing or was written by `torch.distributed.checkpoint`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing.")
    for item in folder.iterdir():
        if item.name == ".metadata" or item.suffix == ".distcp":
            raise CheckpointError(
                f"{item} was written by torch.distributed.checkpoint, whose metadata can run code when "
                "it is read; refused. Convert it where you trust it."
            )


def _is_canonical(manifest: Mapping[str, Any], content: bytes) -> bool:
    """True if `content` is the one text of the manifest and the manifest's hash of itself is right."""
    body = {key: value for key, value in manifest.items() if key != "self"}
    whole = canonical_json(manifest) + b"\n" == content
    return whole and manifest["self"] == bytes_hash(canonical_json(body))


def _bounded_bytes(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint is not complete.")
    size = path.stat().st_size
    if size > LARGEST_MANIFEST:
        raise CheckpointError(f"{path} has {size} bytes, more than any manifest of torchstone; refused.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _check_form(path: Path, manifest: Mapping[str, Any]) -> None:
    """A manifest whose hash is right may still come from somebody else."""
    files, step = manifest.get("files"), manifest.get("step")
    fits = isinstance(files, dict) and isinstance(manifest.get("data"), dict) and type(step) is int
    if not fits or not all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("xxh3"), str)
        for entry in files.values()  # type: ignore[union-attr]
    ):
        raise CheckpointError(f"{path} is not a manifest that torchstone wrote; refused.")
    if bad := [name for name in files if not _FILE.fullmatch(name)]:  # type: ignore[union-attr]
        raise CheckpointError(f"{path} lists {bad[0]!r}, which no checkpoint of torchstone holds; refused.")
