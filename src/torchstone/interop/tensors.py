"""Tensors of a checkpoint folder, read one at a time from safetensors files.

    model.safetensors                                       one file
    model.safetensors.index.json, model-00001-of-0000N…     several, with an index

A file is mapped into memory, so that a tensor costs memory only once it is taken; its shape stands in the file's header,
which costs none. Weights are f16, bf16, f32 or f64; other kinds (quantised ones) and pickles (`.bin`, `.pt`) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchstone.errors import DataError
from torchstone.interop.settings import read_json
from torchstone.train.manifest import check_header

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.pkl")
KINDS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
WHOLE = re.compile(r"[IU]\d+")  # kinds of whole numbers


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from: names in the checkpoint, and how they become one tensor."""

    names: tuple[str, ...]
    make: Callable[..., Tensor] = _alone


class Weights:
    """The tensors of a folder by name; use in `with`.

    Args:
        folder: of the checkpoint.

    Raises:
        DataError: no safetensors files, only pickles, or a damaged index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._stack, self._files = folder, ExitStack(), _files(folder)
        self._open: dict[str, Any] = {}
        self._place: dict[str, str] = {}

    def __enter__(self) -> Weights:
        for name in self._files:
            path = self.folder / name
            check_header(path)
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise DataError(f"{path} is no valid safetensors file: {error}.") from error
            self._open[name] = file
            self._place |= dict.fromkeys(file.keys(), name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._place)

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor, from the header alone; raises DataError where it is missing."""
        return [int(size) for size in self._slice(name).get_shape()]

    def take(self, name: str) -> Tensor:
        """One tensor; raises DataError where it is missing or of a kind that weights do not have."""
        kind = str(self._slice(name).get_dtype())
        if WHOLE.fullmatch(kind):
            raise DataError(
                f"{self.folder}: {name} holds whole numbers ({kind}), which are no weights but perhaps quantised ones; give "
                "the checkpoint before its quantisation."
            )
        if kind not in KINDS:
            raise DataError(
                f"{self.folder}: {name} is of type {kind}; torchstone reads {', '.join(KINDS.values())}. Convert the "
                "checkpoint with what wrote it."
            )
        tensor: Tensor = self._open[self._place[name]].get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        if name not in self._place:
            raise DataError(f"{self.folder} lacks the tensor {name}; give the complete checkpoint.")
        return self._open[self._place[name]].get_slice(name)


def fill(
    expected: Mapping[str, Tensor], sources: Mapping[str, Source], weights: Weights, ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Tensors of a model from a checkpoint, each converted once and held once.

    Args:
        expected: name → tensor of the right form (on the meta device).
        sources: where each comes from.
        weights: of the checkpoint.
        ignored: endings of names that may be left over (tables that are computed anew).

    Raises:
        DataError: a tensor is missing, of another shape or kind, not finite, or left over.
    """
    found, used = {}, set()
    for name, form in expected.items():
        source = sources[name]
        tensor = source.make(*map(weights.take, source.names))
        used |= set(source.names)
        if tensor.shape != form.shape:
            raise DataError(
                f"{weights.folder}: {' and '.join(source.names)} has shape {list(tensor.shape)}, the settings in config.json "
                f"ask for {list(form.shape)}; the two do not belong together."
            )
        found[name] = tensor.to(form.dtype).contiguous()
        if not torch.isfinite(found[name]).all():
            raise DataError(
                f"{weights.folder}: {' and '.join(source.names)} holds values that are not finite as {form.dtype}."
            )
    left = sorted(name for name in weights.names() - used if not name.endswith(tuple(ignored)))
    if left:
        raise DataError(
            f"{weights.folder} holds {len(left)} tensors that config.json does not account for, the first is {left[0]}; they "
            "would be lost. Give a checkpoint whose config.json describes it."
        )
    return found


def _files(folder: Path) -> list[str]:
    """Names of the safetensors files."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        table = read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise DataError(f"{folder / INDEX} holds no weight_map; restore it.")
        files = sorted(set(table.values()))
        for name in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise DataError(f"{folder / INDEX} names the file {name!r}, which no checkpoint has; refused.")
            if not (folder / name).is_file():
                raise DataError(f"{folder / name} is missing; {INDEX} names it.")
        return files
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        raise DataError(
            f"{folder} holds its weights as a pickle ({pickled[0]}), which can run code when it is read; refused. Convert it "
            "where you trust it: load it with transformers and call save_pretrained, which writes safetensors."
        )
    raise DataError(f"{folder} holds no {WEIGHTS} and no {INDEX}; give the folder of a complete checkpoint.")
