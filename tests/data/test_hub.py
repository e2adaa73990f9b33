"""Hub data sets through a stand-in for the `datasets` library."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from torchstone.data.hub import HuggingFaceConfig
from torchstone.errors import DataError, DependencyError


class Rows(list):
    column_names = ("text", "id")
    _fingerprint = "abc"


def library(rows: Rows | Exception, calls: list[Any]) -> ModuleType:
    module = ModuleType("datasets")

    def load_dataset(*args: Any, **settings: Any) -> Rows:
        calls.append((args, settings))
        if isinstance(rows, Exception):
            raise rows
        return rows

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    return module


def test_rows_become_documents_and_no_code_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    rows = Rows([{"text": "one"}, {"text": " "}, {"text": "two"}])
    monkeypatch.setitem(sys.modules, "datasets", library(rows, calls))
    config = HuggingFaceConfig(name="owner/set", subset="en", split="train[:1%]", revision="1234")
    corpus = config.build()
    assert [(d.id, d.text) for d in corpus.documents()] == [("owner/set:0", "one"), ("owner/set:2", "two")]
    assert calls == [(("owner/set", "en"), {"split": "train[:1%]", "revision": "1234"})]
    assert corpus.fingerprint == config.build().fingerprint
    assert corpus.fingerprint != config.model_copy(update={"revision": "5678"}).build().fingerprint


def test_faults_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = HuggingFaceConfig(name="owner/set")
    monkeypatch.setitem(sys.modules, "datasets", library(Rows([{"text": "one"}, {"text": None}]), []))
    with pytest.raises(DataError, match=r"owner/set:1: column 'text' holds NoneType"):
        list(config.build().documents())
    with pytest.raises(DataError, match="no column 'body'; its columns: text, id"):
        config.model_copy(update={"text_field": "body"}).build()
    monkeypatch.setitem(sys.modules, "datasets", library(ValueError("Unknown split"), []))
    with pytest.raises(DataError, match="cannot be loaded: Unknown split"):
        config.build()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"needs datasets; run: pip install 'torchstone\[hf\]'"):
        config.build()
