"""Python's help topics as a corpus."""

from __future__ import annotations

import sys

import pytest

from torchstone.data.python_help import PythonHelpConfig, PythonHelpCorpus
from torchstone.data.stdlib import StdlibConfig
from torchstone.data.text import TextConfig
from torchstone.errors import DataError


def test_it_is_prose_in_order_and_no_part_of_the_standard_library_corpus() -> None:
    documents = list(PythonHelpConfig().build().documents())
    names = [document.id for document in documents]
    assert names == sorted(set(names)) and {"for", "lambda"} <= set(names)
    assert sum(len(document.text) for document in documents) > 200_000
    passages = [passage for document in documents for passage in document.text.split("\n\n")]
    assert len(passages) == len(set(passages)) > 2000
    assert not any("pydoc_data" in document.id for document in StdlibConfig().build().documents())


def test_the_fingerprint_is_of_names_and_texts() -> None:
    one = PythonHelpCorpus({"b": "two", "a": "one"})
    assert one.fingerprint == PythonHelpCorpus({"a": "one", "b": "two"}).fingerprint
    assert one.fingerprint != PythonHelpCorpus({"a": "one", "b": "three"}).fingerprint
    assert [document.text for document in one.documents()] == ["one", "two"]


def test_it_makes_rows_of_training_and_held_out_text() -> None:
    settings = {"corpus": "python-help", "tokenizer": "bytes", "length": 64, "validation_fraction": 0.2}
    source = TextConfig.model_validate(settings).build(None)
    assert source.batch(0, 0, 4).tokens_bt.shape == (4, 64)
    assert next(iter(source.evaluation(4, 4))).tokens_bt.shape == (4, 64)


def test_a_python_without_topics_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="no help topics"):
        PythonHelpConfig().build()
