"""Texts from files, and rows of tokens that never cross a text."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import load_texts, token_rows
from torchstone.errors import ConfigError, DataError
from torchstone.models.decoder import DecoderConfig


@pytest.fixture(scope="module")
def subject() -> Subject:
    """A decoder that reads bytes."""
    return open_subject(DecoderConfig(width=16, depth=1, head_dim=8).build(257, 32, 0), tokenizer=ByteTokenizer())


def test_texts_come_from_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("whole\n\nfile")
    (tmp_path / "b.jsonl").write_text('{"text": "one\\ntwo"}\n{"text": "three", "id": 3}\r\n')
    (tmp_path / "c.md").write_text("\ufeff# title")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "packed"}\n')
    given = [tmp_path / "b.jsonl", str(tmp_path / "a.txt"), tmp_path / "c.md", str(tmp_path / "*.gz")]
    assert load_texts(given) == ["one\ntwo", "three", "whole\n\nfile", "# title", "packed"]


def test_without_files_the_standard_library_is_read() -> None:
    texts = load_texts([])
    assert len(texts) > 300 and any("class OrderedDict" in text for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"text", "the ending is not one of"),
        ("a.md", b" \n", "a.md is an empty text"),
        ("a.md", b"\xff\xfe", "cannot be read as UTF-8"),
        ("a.txt", b" \n", "a.txt:1: .*empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', "a.jsonl:2"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_texts([tmp_path / name])


@pytest.mark.parametrize("name", ["missing.txt", "missing.md"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name):
        load_texts([tmp_path / name])


def test_rows_stay_inside_a_text_and_start_with_different_texts(subject: Subject) -> None:
    rows_nt = token_rows(subject, ["abcdefgh", "xy", "ABCDE"], 3)
    assert [bytes(row.tolist()) for row in rows_nt] == [b"abc", b"ABC", b"def"]
    assert rows_nt.dtype == torch.long
    assert [bytes(row.tolist()) for row in token_rows(subject, ["abcdefgh", "ABCDE"], 3, count=2)] == [b"abc", b"ABC"]


def test_rows_begin_with_what_the_tokenizer_puts_before_a_text(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "first_tokens", lambda: [256])
    rows_nt = token_rows(subject, ["abcdefgh", "xy", "ABCDE"], 4)
    assert rows_nt[:, 0].tolist() == [256] * 3
    assert [bytes(row[1:].tolist()) for row in rows_nt] == [b"abc", b"ABC", b"def"]
    with pytest.raises(DataError, match="needs 9 tokens in one text, the longest of 1 has 8"):
        token_rows(subject, ["abcdefgh"], 10)
    assert token_rows(subject, ["abcdefgh"], 2).shape == (8, 2)
    with pytest.raises(ConfigError, match="leaves no room for text"):
        token_rows(subject, ["abcdefgh"], 1)


def test_tokens_that_the_model_does_not_know_are_refused(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "encode", lambda text: [1, 2, 300, 4])
    with pytest.raises(DataError, match=r"token 300, and decoder knows 257 \(0 to 256\)"):
        token_rows(subject, ["text"], 4)
    monkeypatch.setattr(subject, "vocab_size", 3)  # a tokenizer that leaves out ids; the model has their embeddings
    monkeypatch.setattr(subject, "encode", lambda text: [1, 2, 256, 4])
    assert token_rows(subject, ["text"], 4).tolist() == [[1, 2, 256, 4]]


def test_too_little_text_is_refused_with_both_numbers(subject: Subject) -> None:
    with pytest.raises(DataError, match="needs 9 tokens in one text, the longest of 2 has 8"):
        token_rows(subject, ["abcdefgh", "xy"], 9)
    with pytest.raises(DataError, match="needs 3 rows of 4 tokens, the 2 texts have 2"):
        token_rows(subject, ["abcdefgh", "xy"], 4, count=3)


def test_senseless_sizes_are_refused(subject: Subject, family_subject: Any) -> None:
    with pytest.raises(ConfigError, match="length was given as 0"):
        token_rows(subject, ["abc"], 0)
    with pytest.raises(ConfigError, match="count was given as 0"):
        token_rows(subject, ["abc"], 2, count=0)
    with pytest.raises(ConfigError, match="reads at most 64"):
        token_rows(family_subject("Llama"), ["abc"], 65)


def test_rows_beyond_the_context_have_to_be_asked_for(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "max_length", 4)
    with pytest.raises(ConfigError, match="reads at most 4"):
        token_rows(subject, ["abcdefgh"], 6)
    assert token_rows(subject, ["abcdefgh"], 6, beyond_context=True).shape == (1, 6)
