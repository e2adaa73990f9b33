"""F12: bad rows. Without `skip_bad` the first stops with file, line and reason; with it counts are exact.

Token ids out of range are in tests/data/test_text.py, torn containers in tests/data/test_files.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from torchstone.data.corpus import Rejected
from torchstone.data.files import FilesConfig
from torchstone.data.text import TextConfig
from torchstone.errors import DataError

GOOD = [json.dumps({"text": f"a good row {n}"}).encode() + b"\n" for n in range(300)]
BAD = {
    "invalid JSON": (b'{"text": "open\n', "invalid JSON"),
    "not an object": (b'["text"]\n', "an array instead of an object"),
    "wrong type": (b'{"text": 5}\n', "field 'text' is a number instead of a string"),
    "null": (b'{"text": null}\n', "field 'text' is null instead of a string"),
    "truth value": (b'{"text": true}\n', "field 'text' is a truth value instead of a string"),
    "missing key": (b'{"txt": "x"}\n', "no field 'text'; it has 1: txt"),
    "empty text": (b'{"text": " "}\n', "the text is empty"),
    "huge line": (b'{"text": "' + b"x" * 3000 + b'"}\n', "3012 bytes, more than max_line_bytes=2000"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}\n', "invalid UTF-8: invalid start byte at byte 10"),
    "NUL": (b'{"text": "a\\u0000b"}\n', "a NUL character at character 1"),
    "raw NUL": (b'{"text": "a\x00b"}\n', "invalid JSON"),
    "lone surrogate": (b'{"text": "ab\\ud800"}\n', "a lone surrogate at character 2"),
    "deep": (b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}\n", "an array instead of a string"),
    "UTF-16": ('{"text": "x"}\n'.encode("utf-16"), "invalid UTF-8"),
}


def config(path: Path, **settings: object) -> FilesConfig:
    return FilesConfig.model_validate({"paths": str(path), "max_line_bytes": 2000, **settings})


@pytest.mark.parametrize("case", BAD)
def test_the_first_bad_row_stops_with_file_line_and_reason(tmp_path: Path, case: str) -> None:
    line, reason = BAD[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join([*GOOD[:4], line, *GOOD[4:9]]))
    with pytest.raises(DataError) as caught:
        list(config(path).build().documents())
    message = str(caught.value)
    assert message.startswith(f"{path}:5: ") and reason in message and "skip_bad=true" in message
    assert caught.value.exit_code == 3 and "\n" not in message and len(message) < 1000


def test_skipping_counts_exactly_and_keeps_the_rest(tmp_path: Path) -> None:
    """One of each kind of bad row among good ones."""
    path, lines, expected = tmp_path / "rows.jsonl", list(GOOD), []
    cases = [case for case in BAD if case != "UTF-16"]  # that one has more than one line
    for number, case in enumerate(cases):
        at = 7 + 13 * number
        lines.insert(at, BAD[case][0])
        expected.append((f"rows.jsonl:{at + 1}", BAD[case][1]))
    path.write_bytes(b"".join(lines))
    rejected: list[Rejected] = []
    corpus = config(path, skip_bad=True, skip_bad_cap=0.1).build()
    texts = [document.text for document in corpus.documents(rejected.append)]
    assert texts == [json.loads(line)["text"] for line in GOOD]
    assert [item.location for item in rejected] == [location for location, _ in expected]
    for item, (_, reason) in zip(rejected, expected, strict=True):
        assert reason in item.reason and len(item.excerpt) <= 80


@pytest.mark.parametrize(("bad", "stops"), [(3, False), (4, True)])
def test_more_than_the_cap_stops(tmp_path: Path, bad: int, stops: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join([*GOOD, *[b"{}\n"] * bad]))
    corpus = config(path, skip_bad=True).build()  # a hundredth of 303 is 3.03
    if not stops:
        assert len(list(corpus.documents())) == 300
        return
    with pytest.raises(DataError, match=r"^4 of 304 rows are bad, .*=0.01 allows.*jsonl:304: no field"):
        list(corpus.documents())


def test_the_quarantine_is_stored_with_the_tokens(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join([*GOOD[:200], b'{"text": 1}\n', *GOOD[200:]]))
    corpus = {"kind": "files", "paths": str(path), "skip_bad": True}
    for _ in range(2):  # built, then read from the cache
        shards = TextConfig(corpus=corpus, tokenizer="bytes", length=8).build(tmp_path / "cache").shards
        assert shards.rejected == 1 and len(shards.train.ends) + len(shards.validation.ends) == 300
        reason = "field 'text' is a number instead of a string"
        assert shards.quarantine() == [Rejected("rows.jsonl:201", reason, '{"text": 1}\n')]
    strict = {**corpus, "skip_bad_cap": 0.001}  # a cap that is lowered holds for what is cached, too
    with pytest.raises(DataError, match="1 of 301 rows are bad"):
        TextConfig(corpus=strict, tokenizer="bytes", length=8).build(tmp_path / "cache")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
def test_an_empty_file_is_a_bad_row(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}:1: the file is empty"):
        list(config(tmp_path / name).build().documents())
    (tmp_path / "good.jsonl").write_bytes(b"".join(GOOD))
    both = FilesConfig(paths=(str(tmp_path / "good.jsonl"), str(tmp_path / name)), skip_bad=True)
    assert len(list(both.build().documents())) == 300


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a\x00b", "NUL character at character 1"),
        (b"ab\xff", "invalid UTF-8"),
        (b" \n", "the text is empty"),
        (b"ok\n" + b"x" * 2001, "the row has 2001 bytes"),
    ],
)
def test_plain_text_is_checked_too(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a.txt:\d: .*{reason}"):
        list(config(tmp_path / "a.txt").build().documents())


def test_parquet_rows_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["good", None, "a\0b", ""]}), path)
    with pytest.raises(DataError, match=r"rows.parquet:2: field 'text' is null instead of a string"):
        list(config(path).build().documents())
    rejected: list[Rejected] = []
    corpus = config(path, skip_bad=True, skip_bad_cap=0.75).build()
    assert [document.text for document in corpus.documents(rejected.append)] == ["good"]
    assert [item.location for item in rejected] == [f"rows.parquet:{n}" for n in (2, 3, 4)]
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match=r"rows.parquet:1: field 'text' is a number instead of a string"):
        list(config(path).build().documents())


def test_byte_order_mark_line_ends_and_blank_lines_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "one\\r\\n"}\r\n\r\n\n{"text": "two"}')
    documents = list(config(path).build().documents())
    assert [(d.text, d.location) for d in documents] == [("one\r\n", "rows.jsonl:1"), ("two", "rows.jsonl:4")]


def test_a_message_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"\x1b[2J\u202etxt": "\x1b[31mred"}\n'.replace("\x1b", "\\u001b").encode())
    with pytest.raises(DataError) as caught:
        list(config(path).build().documents())
    assert "\x1b" not in str(caught.value) and "\u202e" not in str(caught.value)
