"""The Rho-1 study on real text: a decoder, a corpus with injected noise, reference runs and stored reference losses.

Once for all seeds: the standard library's files are divided into clean and raw ones by the hash of their names; a tokenizer is
trained on the clean ones; one reference is trained on the clean text and one on the noisy raw text; each scores the raw text,
with and without its noise, into a loss store. A cell then trains one recipe. What counts is the loss on held-out raw text, which
is clean. Not yet run on GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf
import torch

from torchstone.data.batch import IGNORE
from torchstone.data.cache import cache_folder
from torchstone.data.split import held_out
from torchstone.data.stdlib import StdlibConfig
from torchstone.data.text import TextConfig, TextSource
from torchstone.diagnose.adapters import open_subject
from torchstone.evals.scoring import identity, score_data, window_losses
from torchstone.evals.trajectories import categorise
from torchstone.lab.study import Cell, Measurement, Resources
from torchstone.objectives.next_token import NextTokenConfig
from torchstone.recipe.fingerprint import device_class
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.report.result import Series
from torchstone.storage.atomic import atomic_write
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.precision import Compute, choose_compute
from torchstone.train.run import train

CHECKPOINTS = 10
END = "<|endoftext|>"
ROWS = 16  # sequences of a forward pass of measurements
GPU: dict[str, Any] = {
    "recipe": {
        "model": {"kind": "decoder", "width": 384, "depth": 10, "head_dim": 64},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
        "schedule": "cosine",
        "batch": {"sequences": 64},
        "evaluation": {"every": None, "sequences": 64},
    },
    "vocab_size": 4096, "length": 512, "steps": 610, "reference_steps": 150, "ratio": 0.6, "clean_files": 0.5,
    "noise": {"shuffled": 0.2, "random_spans": 0.1, "scanned": 0.02}, "evaluate": 64,
}  # fmt: skip


def prepare(settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Corpora, tokenizer, references and stores, in a folder; finished parts are not made again."""
    directory.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = _corpora(settings, directory)
    plain = _recipe(settings, _text(settings, made, noisy=True), settings["steps"])
    made["compute"] = choose_compute(plain).data()
    made["stores"] = {}
    for name, data in (("clean", _text(settings, made, clean=True)), ("self", _text(settings, made, noisy=True))):
        run = directory / f"reference-{name}"
        recipe = _recipe(settings, data, settings["reference_steps"])
        train(recipe, run, compute=Compute(**made["compute"]))
        subject = open_subject(run, device=device_class())
        for noisy in (True, False):
            source = TextConfig.model_validate(_text(settings, made, noisy=noisy)).build(cache_folder())
            path = directory / f"scores-{name}-{'noisy' if noisy else 'plain'}"
            score_data(source, subject, path, about=identity(subject))
            made["stores"][path.name] = str(path)
    return made


def _corpora(settings: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Two JSON-lines files of different documents, and a tokenizer of the clean ones."""
    sides: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    for document in StdlibConfig().build().documents():
        sides[held_out(f"clean {document.id}", settings["clean_files"])].append(
            {"id": document.id, "text": document.text}
        )
    paths = {name: directory / f"{name}.jsonl" for name in ("clean", "raw")}
    for name, path in paths.items():
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in sides[name == "clean"]))
    tokenizer = directory / "tokenizer.json"
    atomic_write(tokenizer, _tokenizer((row["text"] for row in sides[True]), settings["vocab_size"]))
    return {**{name: str(path) for name, path in paths.items()}, "tokenizer": str(tokenizer)}


def _tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE with a token that ends a document, as JSON."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet, special_tokens=[END]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def _text(
    settings: Mapping[str, Any], made: Mapping[str, Any], *, noisy: bool = False, clean: bool = False
) -> dict[str, Any]:
    """The clean text, or the raw one with or without its noise, as plain data."""
    corpus: dict[str, Any] = {"kind": "files", "paths": made["clean" if clean else "raw"]}
    if noisy:
        corpus = {"kind": "noisy", "corpus": corpus, **settings["noise"]}
    tokenizer = {"kind": "huggingface", "path": made["tokenizer"]}
    return {"kind": "text", "corpus": corpus, "tokenizer": tokenizer, "length": settings["length"]}


def _recipe(
    settings: Mapping[str, Any], data: Mapping[str, Any], steps: int, objective: Any = "next-token", rate: float = 1.0
) -> Recipe:
    every = -(-steps // CHECKPOINTS)  # at most CHECKPOINTS with the one at the end, so that none is dropped
    optimizer = settings["recipe"]["optimizer"]
    optimizer = {**optimizer, "learning_rate": rate * optimizer["learning_rate"]}
    return load_recipe(
        {**settings["recipe"], "optimizer": optimizer, "data": dict(data), "objective": objective, "budget": {"steps": steps},
         "checkpoint": {"every": every, "keep": CHECKPOINTS}}
    )  # fmt: skip


def recipe_of(arm: Mapping[str, Any], settings: Mapping[str, Any], made: Mapping[str, Any]) -> Recipe:
    """What an arm trains."""
    data = _text(settings, made, noisy=arm["noisy"])
    steps = round(settings["steps"] * arm["steps"])
    if arm["reference"]:
        store = f"scores-{arm['reference']}-{'noisy' if arm['noisy'] else 'plain'}"
        data = {"kind": "scored", "source": data, "scores": made["stores"][store]}
    if arm["clean_share"]:
        share = 1 - noisy_share(arm, settings)
        sources = [data, _text(settings, made, clean=True)]
        data = {"kind": "mixture", "sources": sources, "shares": [1 - share, share], "token_ids": "shared"}
        steps += settings["reference_steps"]
    objective: Any = "next-token"
    if arm["score"]:
        objective = {"kind": "selective", "ratio": settings["ratio"], "score": arm["score"]}
    return _recipe(settings, data, steps, objective, arm["rate"])


def noisy_share(arm: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """Share of an arm's training rows that come from the raw text: all, but where the reference's text is mixed in."""
    steps = round(settings["steps"] * arm["steps"])
    return steps / (steps + settings["reference_steps"]) if arm["clean_share"] else 1.0


def measure(cell: Cell) -> Measurement:
    """Train an arm's recipe and take its numbers on the held-out raw text."""
    settings, made, arm = cell.settings, cell.prepared, cell.arm.settings
    recipe = load_recipe(recipe_of(arm, settings, made), [f"seed={cell.seed}"])
    run = cell.directory / "run"
    summary = train(recipe, run, compute=Compute(**made["compute"]), progress=cell.report)
    source = TextConfig.model_validate(_text(settings, made, noisy=arm["noisy"])).build(cache_folder())
    steps = CheckpointStore(run / "checkpoints").steps()
    losses, top1 = zip(*(_held_out(run, step, source, settings["evaluate"]) for step in steps), strict=True)
    shares = categorise(np.stack(losses, axis=1)).shares()
    noise = summary.history["train"].get("selected_noise") or [noisy_share(arm, settings) * _noise_share(source)]
    means = tuple(float(one.mean()) for one in losses)
    referred = 3 * settings["reference_steps"] * recipe.batch.sequences * settings["length"] + summary.tokens
    forward = summary.flops / summary.tokens / 3
    return Measurement(
        metrics={"clean_loss": means[-1], "clean_top1": top1[-1], "noise_selected": float(np.mean(noise))},
        series={"clean loss": Series(axes={"steps": tuple(map(float, steps))}, values=means)},
        extra={
            "categories": {"share": shares},
            "cost": {"own": summary.flops, "reference": forward * referred if arm["reference"] else 0.0},
        },
        tokens=summary.tokens,
        flops=summary.flops,
        peak_bytes=summary.peak_bytes,
    )


@torch.no_grad()
def _held_out(run: Path, step: int, source: TextSource, sequences: int) -> tuple[np.ndarray, float]:
    """Losses of held-out targets at a checkpoint, and top-1."""
    subject = open_subject(run, step=step, device=device_class())
    losses, right, total = [], 0, 0
    objective = NextTokenConfig().build()
    for batch in source.evaluation(ROWS, sequences):
        valid_bt = batch.targets_bt != IGNORE
        losses.append(window_losses(subject, batch).cpu()[valid_bt].numpy())
        correct_bt = objective(subject.model, batch.to(subject.device)).correct_bt
        assert correct_bt is not None
        right, total = right + int(correct_bt.cpu()[valid_bt].sum()), total + int(valid_bt.sum())
    return np.concatenate(losses), right / total


def _noise_share(source: TextSource) -> float:
    return 0.0 if source.shards.train.noise is None else float(source.shards.train.noise.mean())


def resources() -> Resources:
    """One thread on a CPU; the GPUs where there are any."""
    if device_class() != "cuda":
        return Resources()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Resources(devices=tuple(visible.split(",") if visible else map(str, range(torch.cuda.device_count()))))
