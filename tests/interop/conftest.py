"""Small decoders, runs and folders of checkpoints, and libraries that do not look at the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the libraries are imported

import pytest
import torch
import transformers

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.interop.tokenizer import write_tokenizer
from torchstone.recipe.registry import parse_part
from torchstone.train.run import train

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
VOCABULARY, LENGTH = 257, 64


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Built data in a folder of the session's own."""
    before = os.environ.get("TORCHSTONE_CACHE")
    os.environ["TORCHSTONE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("TORCHSTONE_CACHE")
    if before is not None:
        os.environ["TORCHSTONE_CACHE"] = before


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of forty short texts."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"the {number} cats sat on the mat and ate {number} fish. " * 20)
    return folder


@pytest.fixture(scope="session")
def data_words(corpus):
    """Overrides of a recipe's data section: the corpus, in short sequences."""
    return ["data.corpus.kind=files", f"data.corpus.paths={corpus}/*.txt", "data.length=32"]


@pytest.fixture(scope="session")
def decoder():
    """Makes a decoder with weights far from zero; `block` and other keys replace the default parts."""

    def make(mixer=None, block=None, seed=0, **model):
        mixer = {"kind": "attention"} if mixer is None else mixer
        parts = {"mixer": mixer, "feedforward": {"kind": "swiglu", "hidden": 48}, **(block or {})}
        start = {"kind": "normal", "std": 0.15}
        settings = {"kind": "decoder", "width": 32, "depth": 2, "head_dim": 8, "block": parts, "initialisation": start}
        made = parse_part("model", {**settings, **model}).build(VOCABULARY, LENGTH, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:  # gains and biases start equal, which hides mistakes
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return made.eval()

    return make


@pytest.fixture(scope="session")
def tokens():
    """Token ids [2, 40]."""
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def logits():
    """Logits of a decoder."""

    @torch.no_grad()
    def of(model, tokens_bt):
        return model.logits(model(tokens_bt).hidden_btd)

    return of


@pytest.fixture
def saved(tmp_path):
    """Writes a model of transformers, with weights far from zero and a byte tokenizer, into a folder; returns both."""

    def save(model, **settings):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        folder = tmp_path / "checkpoint"
        model.eval().save_pretrained(folder, **settings)
        write_tokenizer(ByteTokenizer(), folder, LENGTH)
        return model, folder

    return save


@pytest.fixture(scope="session")
def run(tmp_path_factory, corpus):
    """Trains a tiny decoder on the corpus; returns the run directory."""

    def make(mixer="attention", tokenizer="bytes", **model):
        recipe = {
            "model": {"kind": "decoder", "width": 32, "depth": 2, "head_dim": 8, "block": {"mixer": mixer}, **model},
            "data": {
                "kind": "text",
                "corpus": {"kind": "files", "paths": f"{corpus}/*.txt"},
                "tokenizer": tokenizer,
                "length": 32,
            },
            "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
            "schedule": {"kind": "constant"},
            "budget": {"steps": 25},
            "batch": {"sequences": 8},
            "precision": "fp32",
            "compile": False,
            "evaluation": {"every": None, "sequences": 4},
        }
        directory = tmp_path_factory.mktemp("runs") / "run"
        train(recipe, directory, progress=lambda state: None)
        return directory

    return make
