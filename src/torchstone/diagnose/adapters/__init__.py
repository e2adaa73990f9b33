"""Adapters: torchstone's models and Hugging Face models behind one interface (`torchstone.diagnose.subject`).

open_subject("runs/mine")                      a run directory of `torchstone train`
open_subject("models/SmolLM2-135M")            a Hugging Face folder
open_subject("EleutherAI/pythia-160m", revision="step1000")
open_subject(decoder), open_subject(llama)     models in memory
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchstone.diagnose.adapters.loading import CONFIG, import_transformers, load_model, load_tokenizer, usable_device
from torchstone.diagnose.adapters.text_codec import TextCodec
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder
from torchstone.train.names import RECIPE

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
NAMED = frozenset({"q", "k", "v", "o", "qkv"})  # projections whose modules may be named


def open_subject(
    source: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    step: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    names: Mapping[str, str] | None = None,
) -> Subject:
    """A model to analyse.

    Args:
        source: a run directory, a folder or hub id of a Hugging Face model, a `Decoder`, or a `PreTrainedModel`.
        tokenizer: path, hub id or tokenizer in place of the model's own.
        revision: commit, tag or branch of a hub id.
        step: checkpoint of a run directory; None takes the newest.
        device: cpu or a GPU that is there; None leaves the model where it is, which is the CPU for one that is loaded here
            (`usable_device(None)` is the first GPU where there is one).
        dtype: None means float32 for a model that is loaded here, and the type that a model in memory has.
        trust_remote_code: run the code that comes with a Hugging Face model.
        names: regular expressions for modules of unknown name: {"q": "my_queries", …}, see `adapters.projections`.

    Raises:
        ConfigError: nothing that can be analysed, an option that the source cannot honour, or no such device.
        DataError, CheckpointError: files are missing or damaged. DependencyError: transformers is not installed.

    A model in memory is put into evaluation mode and moved to `device`.
    """
    options = {"revision": revision, "step": step, "trust_remote_code": trust_remote_code or None, "names": names}
    kind = _kind(source)
    _refuse(source, options, _HONOURED[kind])
    device = None if device is None else usable_device(device)
    if isinstance(source, nn.Module):
        if dtype is not None and next(source.parameters()).dtype != dtype:
            raise ConfigError(
                f"dtype={dtype} was given for a model in memory that has another; convert it with model.to({dtype})."
            )
        return _in_memory(source if device is None else source.to(device), tokenizer, names or {})
    if kind == "run":
        return _run(Path(source), step, tokenizer, device, dtype or torch.float32)
    model = load_model(str(source), revision, dtype or torch.float32, trust_remote_code)
    model = model if device is None else model.to(device)
    return _huggingface(model, str(source), tokenizer, revision, trust_remote_code, names or {})


_HONOURED: dict[str, tuple[str, ...]] = {
    "decoder": (),
    "pretrained": ("names",),
    "run": ("step",),
    "folder": ("trust_remote_code", "names"),
    "hub id": ("revision", "trust_remote_code", "names"),
}


def _kind(source: str | Path | nn.Module) -> str:
    if isinstance(source, Decoder):
        return "decoder"
    if isinstance(source, nn.Module):
        if isinstance(source, import_transformers().PreTrainedModel):
            return "pretrained"
        raise ConfigError(
            f"{type(source).__name__} is neither a torchstone Decoder nor a PreTrainedModel of transformers; give one."
        )
    path = Path(source)
    if (path / RECIPE).is_file():
        return "run"
    if (path / CONFIG).is_file():
        return "folder"
    if path.exists() or isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        state = "holds neither" if path.exists() else "does not exist, so there is neither"
        raise ConfigError(
            f"{source} {state} {RECIPE} (a run of `torchstone train`) nor {CONFIG} (a Hugging Face model); give the folder "
            "of one, or a hub id such as EleutherAI/pythia-160m."
        )
    return "hub id"


def _refuse(source: Any, options: Mapping[str, Any], honoured: tuple[str, ...]) -> None:
    """Raise for options that would be ignored, and for names of no projection."""
    idle = [name for name, value in options.items() if value is not None and name not in honoured]
    if idle:
        raise ConfigError(f"{idle[0]} was given and has no meaning for {_short(source)}; leave it out.")
    unknown = set(options["names"] or {}) - NAMED
    if unknown:
        raise ConfigError(f"names has {sorted(unknown)[0]!r}; known are {', '.join(sorted(NAMED))}.")


def _short(source: Any) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)


def _in_memory(model: nn.Module, tokenizer: Any, names: Mapping[str, str]) -> Subject:
    if isinstance(model, Decoder):
        from torchstone.diagnose.adapters.torchstone import TorchstoneSubject

        return TorchstoneSubject(model, "decoder", _codec(tokenizer, "the decoder"))
    from torchstone.diagnose.adapters.huggingface import HuggingFaceSubject

    name = getattr(model, "name_or_path", "") or type(model).__name__
    return HuggingFaceSubject(model, name, _codec(tokenizer, name), names)


def _run(
    directory: Path, step: int | None, tokenizer: Any, device: torch.device | str | None, dtype: torch.dtype
) -> Subject:
    from torchstone.diagnose.adapters.torchstone import TorchstoneSubject
    from torchstone.train.run import load_run

    _, model, data = load_run(directory, step)
    codec = _codec(data.tokenizer if tokenizer is None else tokenizer, str(directory))
    return TorchstoneSubject(model.to(device, dtype), str(directory), codec)


def _huggingface(
    model: Any, source: str, tokenizer: Any, revision: str | None, trust: bool, names: Mapping[str, str]
) -> Subject:
    from torchstone.diagnose.adapters.huggingface import HuggingFaceSubject

    if tokenizer is None:
        codec = TextCodec(lambda: load_tokenizer(source, revision, trust), source)
    else:
        codec = _codec(tokenizer, source)
    return HuggingFaceSubject(model, source, codec, names)


def _codec(tokenizer: Any, name: str) -> TextCodec:
    """A codec of a tokenizer, of a path to one, or of none."""
    if isinstance(tokenizer, str | Path):
        return TextCodec(lambda: load_tokenizer(str(tokenizer), None, False), name)
    return TextCodec(lambda: tokenizer, name)
