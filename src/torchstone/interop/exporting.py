"""A run directory as a folder that transformers loads.

    config.json              the family and its settings, or torchstone's own type
    generation_config.json   the token that ends a text
    model.safetensors        weights
    tokenizer.json, …        the tokenizer, where the run was trained on text

A plain decoder becomes a checkpoint of a family that transformers has itself (`torchstone.interop.llama`), so that everything
that reads Llama, Mistral, Qwen2 or Qwen3 reads it. Every other decoder keeps its recipe's model section under the type
`torchstone`; AutoModelForCausalLM loads it after `import torchstone.interop.huggingface`. No code is written into the folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from torchstone.data.tokenizer import Tokenizer
from torchstone.errors import ConfigError
from torchstone.interop.llama import config_of, family_of, tensors_of
from torchstone.interop.settings import CONFIG
from torchstone.interop.tensors import WEIGHTS
from torchstone.interop.tokenizer import tokenizer_json, write_tokenizer
from torchstone.models.decoder import Decoder
from torchstone.storage.atomic import atomic_directory
from torchstone.train.run import load_run
from torchstone.version import __version__

OWN_TYPE, OWN_CLASS = "torchstone", "TorchstoneForCausalLM"
PREFIX = "decoder."  # of tensors in torchstone's own form
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        directory: the folder.
        model_type: of transformers, or `torchstone`.
        reason: why no family of transformers holds the model; empty if one does.
        files: names of the files.
        parameters: numbers of values.
    """

    directory: Path
    model_type: str
    reason: str
    files: tuple[str, ...]
    parameters: int


def export_run(run: str | Path, directory: str | Path, step: int | None = None) -> Export:
    """Write the model of a run directory as a Hugging Face checkpoint.

    Args:
        run: what `train` left.
        directory: the folder to make; it must not exist.
        step: which checkpoint; None takes the newest.

    Raises:
        ConfigError: no run, no decoder, or the folder exists. CheckpointError: the run's checkpoint is damaged.
    """
    _, model, data = load_run(run, step)
    return export_model(model, getattr(data, "tokenizer", None), directory)


def export_model(model: Decoder, tokenizer: Tokenizer | None, directory: str | Path) -> Export:
    """Write a decoder, and its tokenizer if it has one, as a Hugging Face checkpoint; see `export_run`."""
    directory = Path(directory)
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"a {type(model).__name__} has no form of transformers; export a run whose model is a decoder."
        )
    if directory.exists():
        raise ConfigError(f"{directory} exists already; give a folder that does not, so that nothing is overwritten.")
    family, reason = family_of(model, _is_nfc(tokenizer))
    config = config_of(model, family) if family else own_config(model)
    tensors = dict(tensors_of(model, family)) if family else own_tensors(model)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    end = None if tokenizer is None else tokenizer.end_of_document
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    with atomic_directory(directory) as folder:
        files = [CONFIG, GENERATION, WEIGHTS]
        _write(folder / CONFIG, {**config, **ids, "dtype": dtype, "torch_dtype": dtype})
        _write(folder / GENERATION, ids)
        save_file(_contiguous(tensors), folder / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            files += write_tokenizer(tokenizer, folder, model.length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Export(directory, family or OWN_TYPE, reason, tuple(files), parameters)


def own_config(model: Decoder) -> dict[str, Any]:
    """config.json of torchstone's own form: the model section of the recipe, and what it was built for."""
    return {
        "architectures": [OWN_CLASS],
        "model_type": OWN_TYPE,
        "model": model.config.model_dump(mode="json"),
        "vocab_size": model.vocab_size,
        "length": model.length,
        "torchstone_version": __version__,
    }


def own_tensors(model: Decoder) -> dict[str, Tensor]:
    """Tensors of torchstone's own form."""
    return {f"{PREFIX}{name}": tensor for name, tensor in model.state_dict().items()}


def _is_nfc(tokenizer: Tokenizer | None) -> bool:
    """Whether Qwen2's tokenizer class, which normalises to NFC, may take this tokenizer's place."""
    if tokenizer is None:
        return True
    try:
        normalizer = tokenizer_json(tokenizer)[0].get("normalizer")
    except ConfigError:
        return False
    return isinstance(normalizer, dict) and normalizer.get("type") == "NFC"


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
