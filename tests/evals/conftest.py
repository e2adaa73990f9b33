"""Runs on a small text, for evaluations that need checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def small_recipe(corpus: Path, **changes: Any) -> dict[str, Any]:
    """Plain data of a tiny decoder on the bytes of a JSON-lines file."""
    given = {"steps": 3, "every": None, "keep": 2, "seed": 0, "width": 32, **changes}
    return {
        "model": {"kind": "decoder", "width": given["width"], "depth": 1, "head_dim": 8},
        "data": {
            "kind": "text",
            "corpus": {"kind": "files", "paths": str(corpus)},
            "tokenizer": "bytes",
            "length": 32,
            "mask_documents": given.get("masked", False),
        },
        "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
        "schedule": "constant",
        "budget": {"steps": given["steps"]},
        "batch": {"sequences": 8},
        "precision": "fp32",
        "compile": False,
        "evaluation": {"every": None, "sequences": 8},
        "checkpoint": {"every": given["every"], "keep": given["keep"]},
        "seed": given["seed"],
    }


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 short documents."""
    path = tmp_path_factory.mktemp("corpus") / "stories.jsonl"
    rows = [
        {"id": f"s{n}", "text": f"Story {n}. " + " ".join(f"cat {n * i} sat" for i in range(9))} for n in range(300)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def story_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of built data."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def text_recipe(text_corpus: Path, story_cache: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Recipes by what they change: text_recipe(steps=12, every=3, keep=4); their data is built in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHSTONE_CACHE", str(story_cache))
        yield lambda **changes: small_recipe(text_corpus, **changes)
