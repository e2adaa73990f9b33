"""Small corpora for the tests of data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from torchstone.data.text import TextConfig, TextSource


@pytest.fixture
def json_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines: json_lines(rows, name="rows.jsonl") -> path."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def story_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 short documents with ids."""
    path = tmp_path_factory.mktemp("stories") / "stories.jsonl"
    cats = [" ".join(f"cat {n * 31 + i} sat." for i in range(n % 7)) for n in range(400)]
    rows = [{"id": f"story-{n}", "text": f"Story {n}: {text} Ünd."} for n, text in enumerate(cats)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def story_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of built data, shared so that the stories are tokenised once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def stories(story_file: Path, story_cache: Path) -> Callable[..., TextSource]:
    """Builds a source of the stories as bytes: stories(length=32, mask_documents=True, …)."""

    def build(**settings: Any) -> TextSource:
        corpus = {"kind": "files", "paths": str(story_file)}
        given = {"corpus": corpus, "tokenizer": "bytes", "length": 32, **settings}
        return TextConfig(**given).build(story_cache)

    return build
