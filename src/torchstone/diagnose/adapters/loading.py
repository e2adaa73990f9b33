"""Loading a causal language model and its tokenizer through transformers.

Code that comes with a model is not run unless `trust_remote_code` is given. A folder that carries such code for a family
that transformers knows itself is loaded with transformers' own class.

Pitfall: transformers fills weights that a checkpoint lacks with random numbers and goes on; here that is an error.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from torchstone.errors import ConfigError, DataError, DependencyError
from torchstone.train.precision import default_device

CONFIG = "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "vocab.txt")
_FAILURES = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError)


def import_transformers() -> Any:
    """The package; raises DependencyError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise DependencyError("Hugging Face models need transformers: pip install 'torchstone[hf]'") from error
    return transformers


def usable_device(given: torch.device | str | None) -> torch.device:
    """A device by its name; None is the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: no name of a device, or of one that is not here. Analyses need fp64, which the CPU and CUDA have.
    """
    if given is None:
        return default_device()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device: torch.device | None = None
    with suppress(RuntimeError):  # no name of a device that torch knows
        device = torch.device(given)
    if device is not None and (device.index or 0) < {"cpu": 1, "cuda": gpus}.get(device.type, 0):
        return device
    there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(gpus))])
    raise ConfigError(f"there is no device {str(given)!r} for an analysis; this machine has: {there}.")


def load_model(source: str, revision: str | None, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model of a folder or a hub id, on the CPU.

    Raises:
        DependencyError: transformers is not installed. ConfigError: no causal language model, or code that was not
            trusted. DataError: files are missing or damaged.
    """
    transformers = import_transformers()
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        where["revision"] = revision
    _require_trust(transformers, source, trust_remote_code)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **where)
        loader = _loader(transformers, config, source)
        model, report = loader.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True, **where)
    except ConfigError:
        raise
    except Exception as error:  # damaged files raise whatever their reader raises
        if not isinstance(error, _FAILURES) and type(error).__module__.split(".")[0] not in (
            "safetensors",
            "safetensors_rust",
        ):
            raise
        first = str(error).strip().split("\n")[0]
        raise DataError(
            f"{source} could not be loaded by transformers {transformers.__version__} ({first}); give a complete folder "
            "with config.json and weights, or the id of a public model."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise DataError(
            f"{source} lacks {len(missing)} of the model's weights, the first is {missing[0]}; transformers would fill them "
            "with random numbers. Give the complete checkpoint of a causal language model."
        )
    return model


def load_tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> Any | None:
    """The tokenizer of a folder or hub id; None where a folder has none."""
    transformers = import_transformers()
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    where = {} if revision is None else {"revision": revision}
    try:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **where)
    except _FAILURES as error:
        raise DataError(
            f"the tokenizer of {source} could not be loaded ({error}); give another: tokenizer=PATH."
        ) from error


def _loader(transformers: Any, config: Any, source: str) -> Any:
    """The automatic class that makes a model with a language-model head."""
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{source} has an encoder and a decoder; give a causal language model.")
    loaders = (
        (transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
        (transformers.AutoModelForImageTextToText, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    )
    own = getattr(config, "auto_map", None) or {}
    for loader, known in loaders:
        if type(config) in known or loader.__name__ in own:
            return loader
    raise ConfigError(f"{source} ({type(config).__name__}) is no causal language model; give one.")


def _require_trust(transformers: Any, source: str, trust_remote_code: bool) -> None:
    """Refuse a folder whose model only its own code can build."""
    path = Path(source) / CONFIG
    if trust_remote_code or not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); restore it.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise DataError(f"{path} names no model_type; give the folder of a transformers model.")
    if config.get("auto_map") and config["model_type"] not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"{source} brings its own code (auto_map in {CONFIG}), which is not run; read that code, and if you trust it pass "
            "trust_remote_code=True."
        )
