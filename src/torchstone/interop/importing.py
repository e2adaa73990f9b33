"""A folder of transformers as a run directory of step 0, which every command takes that takes a run.

    OUT/tokenizer.json   the checkpoint's tokenizer, with a name for every id of the model
        recipe.yaml      the model as parts; data, optimizer and budget are a start for training on, not history
        run.json         record of the run
        checkpoints/     step 0: the weights

The folder appears whole or not at all. Sizes are compared with the headers of the weights before anything of that size is
built. Only settings and tensors are read. Code that comes with a checkpoint is never run; a folder that brings some beside
its config.json is refused, since its code may mean another model than its `model_type` says, unless the caller vouches for
it.

Known families: the Llama family (`interop.llama`), RecurrentGemma, JetMoE. Whatever a checkpoint has and torchstone's parts
do not is an error that names it.

Pitfalls: weights become fp32. torchstone's tokenizers put nothing before a text, where Llama's and Gemma's put a BOS token:
start a prompt with it where the model expects one. The recipe names the tokenizer file by its absolute path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchstone.errors import ConfigError, DataError, DependencyError
from torchstone.interop import jetmoe, llama, recurrent_gemma
from torchstone.interop.settings import CONFIG, MOST_TOKENS, MOST_VOCABULARY, Settings, read_json
from torchstone.interop.tensors import Source, Weights, fill
from torchstone.interop.tokenizer import FILE, SETTINGS, fill_vocabulary, known_ids
from torchstone.models.decoder import Decoder
from torchstone.nn.attention.multihead import WindowConvention
from torchstone.recipe.fingerprint import fingerprint
from torchstone.recipe.load import load_recipe
from torchstone.recipe.registry import parse_part
from torchstone.recipe.schema import Recipe
from torchstone.recipe.yaml import dump_yaml
from torchstone.storage.atomic import atomic_directory, atomic_write
from torchstone.train.checkpoint import CheckpointStore, Snapshot
from torchstone.train.distributed import World
from torchstone.train.loop import Position
from torchstone.train.names import RECIPE, RECORD
from torchstone.train.precision import Choice, Compute
from torchstone.train.record import start_run
from torchstone.train.resume import training_environment
from torchstone.train.state import optimizer_tensors

DOWNLOADED = ("*.json", "*.safetensors", "merges.txt", "tokenizer.model")
NOT_DOWNLOADED = ("*/*",)  # copies in other forms, in folders
EMBEDDING = "model.embed_tokens.weight"
LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
MOST_LENGTH = 1024  # tokens of a training sequence unless the caller says otherwise
TABLES = (".rotary_emb.inv_freq",)  # computed anew


@dataclass(frozen=True)
class Family:
    """How one model type becomes a decoder.

    Attributes:
        model: plain data of the model from the settings.
        sources: where every tensor of the decoder comes from.
    """

    model: Callable[[Settings], dict[str, Any]]
    sources: Callable[[Decoder], Mapping[str, Source]]


@dataclass(frozen=True)
class Import:
    """What was written.

    Attributes:
        directory: the run directory.
        model_type: of the checkpoint.
        parameters: numbers of values.
        recipe: of the run.
    """

    directory: Path
    model_type: str
    parameters: int
    recipe: Recipe


def import_checkpoint(
    source: str | Path,
    directory: str | Path,
    overrides: Sequence[str] = (),
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    window_convention: WindowConvention | None = None,
) -> Import:
    """Make a run directory of a Hugging Face checkpoint.

    Args:
        source: a folder, or the id of a model on the hub (downloads its settings, tokenizer and safetensors files).
        directory: the run directory to make; it must not exist.
        overrides: `key=value` texts for the recipe, for everything but the model: `data.length=512`.
        revision: commit, tag or branch of a hub id.
        trust_remote_code: accept a folder that brings code; the code is not run, the model is what its type says.
        window_convention: of RecurrentGemma; None takes plus-one, which is what its authors' code computes.

    Raises:
        ConfigError: a model that torchstone's parts cannot be. DataError: files are missing or damaged.
        DependencyError: a hub id needs huggingface_hub.
    """
    directory = Path(directory)
    if directory.exists():
        raise ConfigError(f"{directory} exists already; give a folder that does not, so that nothing is overwritten.")
    folder = _folder(source, revision)
    settings = _settings(folder, trust_remote_code)
    kind = settings.take_text("model_type")
    model, family = _model(kind, settings, window_convention)
    vocab_size = settings.take_int("vocab_size", 1, MOST_VOCABULARY)
    length = min(settings.take_int("max_position_embeddings", 1, MOST_TOKENS, MOST_LENGTH), MOST_LENGTH)
    settings.finish()
    with Weights(folder) as weights:
        _check_sizes(model, vocab_size, weights)
        with atomic_directory(directory) as partial:
            end = _write_tokenizer(folder, partial, vocab_size)
            there = (partial / FILE).is_file()
            staged, recipe = (
                _recipe(model, _data(place / FILE if there else None, end, length), overrides)
                for place in (partial, directory)
            )
            _check_vocabulary(staged, vocab_size)
            decoder = recipe.model.skeleton(vocab_size, recipe.data.sequence_length())
            ignored = [*TABLES, *_tied(decoder, weights)]
            tensors = fill(decoder.state_dict(), family.sources(decoder), weights, ignored)
            decoder.load_state_dict(tensors, assign=True)
            parameters = sum(parameter.numel() for parameter in decoder.parameters())
            _write_run(partial, staged, recipe, decoder)
    return Import(directory, kind, parameters, recipe)


# The checkpoint ----------------------------------------------------------------------------------------


def _folder(source: str | Path, revision: str | None) -> Path:
    """The folder of a checkpoint; a hub id is downloaded."""
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"a revision was given and {source} is a folder; leave it out.")
        return path
    if path.is_file():
        raise ConfigError(f"{source} is a file; give the folder that holds it.")
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ConfigError(f"{source} is no folder and no hub id such as Qwen/Qwen3-0.6B; give one.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DependencyError("a hub id needs huggingface_hub: pip install 'torchstone[hf]'") from error
    try:
        kept, left = list(DOWNLOADED), list(NOT_DOWNLOADED)
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=kept, ignore_patterns=left))
    except Exception as error:  # network and hub errors of several libraries
        first = str(error).strip().split("\n")[0]
        raise DataError(
            f"{source} could not be downloaded ({first}); check the id and the network, or give a folder."
        ) from error


def _settings(folder: Path, trusted: bool) -> Settings:
    """The settings of the folder; raises ConfigError where it brings code and is not trusted."""
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"{folder} holds no {CONFIG}; give the folder of a transformers checkpoint.")
    content = read_json(path)
    code = ["auto_map in config.json"] if content.get("auto_map") else []
    code += sorted(item.name for item in folder.glob("*.py"))
    if code and not trusted:
        raise ConfigError(
            f"{folder} brings its own code ({code[0]}), which torchstone never runs and which may mean another model than "
            f"model_type={content.get('model_type')!r} says. Read it; if the model is the standard one, pass "
            "--trust-remote-code (trust_remote_code=True)."
        )
    settings = Settings(str(path), content)
    settings.only("is_encoder_decoder", False)
    settings.only("add_cross_attention", False)
    return settings


def _model(kind: str, settings: Settings, convention: WindowConvention | None) -> tuple[dict[str, Any], Family]:
    """Plain data of the model, and its family; raises ConfigError for an unknown one."""
    families = {
        name: Family(lambda given, name=name: llama.model_of(name, given), llama.sources_of)  # type: ignore[misc]
        for name in llama.FAMILIES
    }
    chosen = convention or recurrent_gemma.OFFICIAL
    families["recurrent_gemma"] = Family(
        lambda given: recurrent_gemma.model_of(given, chosen), recurrent_gemma.sources_of
    )
    families["jetmoe"] = Family(jetmoe.model_of, jetmoe.sources_of)
    if kind not in families:
        raise ConfigError(
            f"{settings.where} has model_type={kind!r}; torchstone can import {', '.join(sorted(families))}."
        )
    if convention is not None and kind != "recurrent_gemma":
        raise ConfigError(f"a window convention was given and means nothing for model_type={kind!r}; leave it out.")
    return families[kind].model(settings), families[kind]


def _check_sizes(model: Mapping[str, Any], vocab_size: int, weights: Weights) -> None:
    """Raise DataError unless vocabulary, width and depth are those of the tensors, by their headers alone."""
    shape, due = weights.shape(EMBEDDING), [vocab_size, model["width"]]
    if shape != due:
        raise DataError(
            f"{weights.folder}: {EMBEDDING} has shape {shape}, the settings in config.json ask for {due}; the two do not "
            "belong together."
        )
    layers = {int(match[1]) for name in weights.names() if (match := LAYER.match(name))}
    if layers != set(range(model["depth"])):
        raise DataError(
            f"{weights.folder} holds tensors of {len(layers)} layers and config.json has "
            f"num_hidden_layers={model['depth']}; the two do not belong together."
        )


def _tied(decoder: Decoder, weights: Weights) -> list[str]:
    """The output matrix of a tied model, which a checkpoint may hold a second time; raises DataError if it differs."""
    head = "lm_head.weight"
    if not decoder.head.tied or head not in weights.names():
        return []
    second, first = weights.take(head), weights.take(EMBEDDING)
    if second.dtype != first.dtype or not torch.equal(second, first):
        raise DataError(
            f"{weights.folder} holds an {head} of its own although tie_word_embeddings is true; correct the setting."
        )
    return [head]


# The run -----------------------------------------------------------------------------------------------


def _write_tokenizer(folder: Path, directory: Path, vocab_size: int) -> str | None:
    """Write the checkpoint's tokenizer, if it has one, into the directory; the name of the token that ends a text, if known."""
    content = _tokenizer_content(folder)
    if content is None:
        return None
    where = folder / FILE
    fill_vocabulary(content, vocab_size, where)
    atomic_write(directory / FILE, json.dumps(content, ensure_ascii=False) + "\n")
    return _end(folder, known_ids(content, where))


def _data(file: Path | None, end: str | None, length: int) -> dict[str, Any]:
    """Plain data of the recipe's data section, with a tokenizer's file or, where there is none, with bytes."""
    if file is None:  # a data section of the caller's must know the vocabulary
        return {"kind": "text", "tokenizer": {"kind": "bytes"}, "length": length}
    tokenizer = {"kind": "huggingface", "path": str(file.resolve()), "end_of_document": end}
    return {"kind": "text", "tokenizer": tokenizer, "length": length}


def _tokenizer_content(folder: Path) -> dict[str, Any] | None:
    """tokenizer.json, made by transformers where only another form is there; None where there is no tokenizer."""
    if (folder / FILE).is_file():
        return read_json(folder / FILE)
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", SETTINGS)):
        return None
    if (folder / "vocab.json").is_file() and not any(
        (folder / name).is_file() for name in ("merges.txt", "tokenizer.model")
    ):
        raise DataError(f"{folder} holds vocab.json and no merges.txt, which belongs to it; add it, or a {FILE}.")
    if (folder / SETTINGS).is_file() and read_json(folder / SETTINGS).get("auto_map"):
        raise ConfigError(
            f"the tokenizer of {folder} is code of its own (auto_map in {SETTINGS}), which torchstone never runs; add a {FILE} "
            "to the folder."
        )
    from torchstone.diagnose.adapters.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(str(folder), None, False)
    except DataError as error:
        first = str(error.__cause__ or error).strip().split("\n")[0]
        raise DataError(
            f"transformers cannot make a {FILE} of the tokenizer of {folder} ({first}); add one."
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"the tokenizer of {folder} has no {FILE} form; add one to the folder.")
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


def _end(folder: Path, names: Mapping[int, str]) -> str | None:
    """The token that ends a text, as the tokenizer's or the model's settings say; None leaves it to the usual names."""
    files = [folder / name for name in (SETTINGS, "generation_config.json", CONFIG)]
    for found in (read_json(path) for path in files if path.is_file()):
        name = found.get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        if name in names.values():
            return str(name)
        number = found.get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and number in names:
            return names[number]
    return None


def _recipe(model: Mapping[str, Any], data: Mapping[str, Any], overrides: Sequence[str]) -> Recipe:
    """The run's recipe: the imported model, and settings to train on with."""
    start = {
        "model": model,
        "data": data,
        "optimizer": {"kind": "adamw", "learning_rate": 1e-5},
        "schedule": {"kind": "constant"},
        "budget": {"steps": 1000},
        "batch": {"sequences": 8},
        "precision": "fp32",
        "compile": False,
    }
    recipe = load_recipe(start, overrides)
    if recipe.model != parse_part("model", dict(model)):
        raise ConfigError("an override changes the model, which is the checkpoint's; override other sections only.")
    return recipe


def _check_vocabulary(recipe: Recipe, vocab_size: int) -> None:
    """Raise ConfigError unless the data's tokenizer has the model's ids."""
    found = recipe.data.vocabulary()
    if found != vocab_size:
        raise ConfigError(
            f"the model has {vocab_size} token ids and the data's tokenizer {found}. The checkpoint has no tokenizer of its "
            "own: put its tokenizer.json into the folder, or override the data section, for example data.tokenizer=PATH."
        )


def _write_run(directory: Path, staged: Recipe, recipe: Recipe, model: Decoder) -> None:
    """The record and the checkpoint of step 0.

    Args:
        directory: a folder under a partial name.
        staged: the recipe whose tokenizer's file is in that folder.
        recipe: the same with the file where it will be.
        model: with its weights.
    """
    world = World(0, 1, torch.device("cpu"))
    data = staged.data.build(None)
    compute = Compute("fp32" if recipe.precision == "auto" else recipe.precision, recipe.compile is True)
    record = start_run(directory, staged, data.fingerprint, world, lambda: Choice(compute))
    record = replace(record, fingerprint=fingerprint(recipe, data=record.data))
    atomic_write(directory / RECIPE, dump_yaml(recipe))
    atomic_write(directory / RECORD, json.dumps(asdict(record), indent=1) + "\n")
    tensors, plain = optimizer_tensors(recipe.optimizer.build(model))
    content = {
        "position": asdict(Position()),
        "optimizer": plain,
        "fingerprint": record.fingerprint,
        "data": record.data,
        "environment": training_environment(world),
    }
    store = CheckpointStore(directory / "checkpoints", recipe.checkpoint.keep)
    store.save(Snapshot(0, {"model": dict(model.state_dict()), "optimizer": tensors}, content))
