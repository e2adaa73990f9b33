"""Pairs: what is read from files and texts, and which responses are irrelevant."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from subjects import byte_subject

from torchstone.diagnose.gradients.layer_gradients import layer_gradients_finding
from torchstone.diagnose.gradients.pairs import Example, Pair, halved, matched, read_pairs, rotated
from torchstone.diagnose.texts import load_texts
from torchstone.errors import ConfigError, DataError


def _answers(*responses: str) -> list[Pair]:
    return [Pair(f"question {i}?", response, str(i)) for i, response in enumerate(responses)]


def test_an_irrelevant_response_is_another_one() -> None:
    given = _answers("yes", "yes", " yes", "no", "no", "maybe")
    found = rotated(given)
    assert [pair.response for pair in found] == ["no", "no", "no", "maybe", "maybe", "yes"]
    assert [(pair.prompt, pair.id) for pair in found] == [(pair.prompt, pair.id) for pair in given]
    assert rotated(_answers("yes", "yes ", "yes")) == rotated(_answers("yes")) == rotated([]) == []


def test_examples_without_another_response_are_counted() -> None:
    finding = layer_gradients_finding(byte_subject(), pairs=_answers(" yes", " yes", " yes"))
    assert any("all pairs: 3 of 3 examples have no irrelevant response" in note for note in finding.notes)
    assert [row[1] for row in finding.tables[0].rows] == ["own", "own, untrained model"]
    mixed = layer_gradients_finding(byte_subject(), pairs=_answers(" yes", " yes", " no"))
    assert not any("irrelevant response" in note for note in mixed.notes)


def test_separators_within_json_strings_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    response = "one\u2028two\u0085three\x0bfour"
    rows = [{"prompt": "a\u2029", "response": response}, {"prompt": "b", "response": "c"}]
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig", newline="\r\n"
    )
    assert [(pair.prompt, pair.response) for pair in read_pairs(path)] == [("a\u2029", response), ("b", "c")]


def test_a_column_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a", "response": "b", "style": "x"}, {"prompt": "a", "response": "c", "kind": None, "id": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ConfigError, match="no row .* has a column 'stlye'; its columns are prompt, response, style, kind, id"
    ):
        read_pairs(path, "stlye")
    assert [pair.condition for pair in read_pairs(path, "kind")] == ["", ""]  # null is no condition
    assert [pair.condition for pair in read_pairs(path, "style")] == ["x", ""]
    assert [pair.condition for pair in read_pairs(path)] == ["", ""] and read_pairs(path)[1].id == "2"


def test_settings_that_nothing_would_read_are_refused(tmp_path: Path) -> None:
    subject, pairs = byte_subject(), _answers(" yes", " no")
    with pytest.raises(ConfigError, match="2 texts and pairs were given"):
        layer_gradients_finding(subject, ["a text of words", "another one"], pairs=pairs)
    with pytest.raises(ConfigError, match="conditions='style' names a column of a file"):
        layer_gradients_finding(subject, pairs=pairs, conditions="style")
    with pytest.raises(ConfigError, match="conditions='style' names a column of a file"):
        layer_gradients_finding(subject, ["a text of words"], conditions="style")
    embedded = layer_gradients_finding(subject, load_texts([])[:2], pairs=pairs)  # what the command line gives unasked
    assert embedded == layer_gradients_finding(subject, pairs=pairs)


def test_matched_scores_fewer_of_the_same_tokens() -> None:
    example = Example.of(range(20), 5, "x")
    fewer = matched(example, 4, np.random.default_rng(0))
    assert len(fewer.scored) == 4 and set(fewer.scored) < set(example.scored) and fewer.tokens == example.tokens
    assert matched(example, 40, np.random.default_rng(0)) is example


def test_pairs_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"id": 7, "prompt": "a", "response": "b", "style": "fast"},
        {"text": "question answer", "response": "answer", "style": "slow"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_pairs(path, "style") == [Pair("a", "b", "7", "fast"), Pair("question ", "answer", "2", "slow")]
    assert [pair.response for pair in rotated(read_pairs(path))] == ["answer", "b"]
    for line, message in (
        ("{", "is not JSON"),
        ("[1]", "this one is list"),
        ('{"prompt": "a"}', "found the fields prompt"),
        ('{"text": "a", "response": "b"}', "is not found in the text"),
        ('{"text": "a", "response": ""}', "is not found in the text"),
    ):
        path.write_text('{"prompt": "a", "response": "b"}\n' + line)
        with pytest.raises(DataError, match=message) as error:
            read_pairs(path)
        assert f"{path}:2" in str(error.value)
    path.write_text("")
    with pytest.raises(DataError, match="holds no pairs"):
        read_pairs(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(tmp_path / "absent.jsonl")


def test_texts_are_parted_at_a_space() -> None:
    assert halved(["one two three four", "single"]) == [Pair("one two", " three four", "0")]
    many = halved(["a " * 900] * 100)
    assert len(many) == 64 and len((many[0].prompt + many[0].response).split()) == 200
    with pytest.raises(DataError, match="two words"):
        halved(["single"])
