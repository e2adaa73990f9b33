"""Lines at the edge of the limit, line numbers in plain text, messages of bounded length, torn files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from torchstone.data.files import FilesConfig
from torchstone.data.rows import Format, Row, reader_of
from torchstone.data.zstd import open_zstandard
from torchstone.errors import DataError, DependencyError

MARK = b"\xef\xbb\xbf"


def rows(name: str, content: bytes, limit: int = 1000) -> list[Row]:
    return list(reader_of(name)(io.BytesIO(content), name, Format("text", limit)))


@given(
    extra=st.integers(-3, 60),
    mark=st.booleans(),
    ending=st.sampled_from([b"\n", b"\r\n", b""]),
    inside=st.sampled_from([b"x", b"\r"]),
)
def test_the_limit_is_exact_with_and_without_a_mark(extra: int, mark: bool, ending: bytes, inside: bytes) -> None:
    """A line of limit bytes is read, one more is not; the next line keeps its number."""
    limit = 30
    line = b'{"text": "x"}' if extra <= 0 else b"x" * limit + inside * (extra - 1) + b"x"
    after = b'\n{"text": "after"}' if ending == b"" else ending + b'{"text": "after"}'
    found = rows("a.jsonl", MARK * mark + line + after, limit)
    assert [row.line for row in found] == [1, 2] and found[1].text == "after"
    if extra > 0:
        assert "bytes, more than max_line_bytes=30" in found[0].reason
        assert ending == b"\r\n" or f"the row has {len(line)} bytes" in found[0].reason
    else:
        assert found[0].text == "x"


def test_a_line_of_exactly_the_limit_is_read_behind_a_mark() -> None:
    line = b'{"text": "abc"}'
    for ending in (b"\n", b"\r\n", b""):
        for mark in (b"", MARK):
            assert [row.text for row in rows("a.jsonl", mark + line + ending, len(line))] == ["abc"]


def test_plain_text_names_the_line_of_the_fault() -> None:
    assert [row.line for row in rows("a.txt", b"one\ntwo\nthr\0ee\n")] == [3]
    assert [row.line for row in rows("a.txt", b"one\nt\xffwo\n")] == [2]
    assert rows("a.txt", b"one\r\ntwo")[0].text == "one\ntwo"
    assert rows("a.txt", MARK)[0].reason == "the file is empty"


def test_a_file_of_blank_lines_is_a_bad_row() -> None:
    for content in (b"\n\n", MARK, b" \r\n"):
        assert [row.reason for row in rows("a.jsonl", content)] == ["the file holds only blank lines"]


def test_a_row_of_many_fields_has_a_short_message(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({f"field {n} " + "x" * 500: n for n in range(5000)}))
    with pytest.raises(DataError, match="it has 5000: field 0") as caught:
        list(FilesConfig(paths=str(path)).build().documents())
    assert len(str(caught.value)) < 3000


def test_parquet_rows_have_the_same_limit_and_typed_faults(tmp_path: Path) -> None:
    raw = pyarrow.array([b"\xff\xfe", b"ok"])
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    path = tmp_path / "a.parquet"
    cases = {
        "a.parquet:1: the row has 100 bytes": {"text": ["x" * 100]},
        "a.parquet:1: invalid UTF-8": {"text": broken},
        "a.parquet:1: invalid UTF-8: invalid start byte": {"text": ["x", "y"], "id": broken},
        "a.parquet:1: field 'text' is binary": {"text": [b"x"]},
        "a.parquet:1: the file has no rows": {"text": pyarrow.array([], pyarrow.string())},
    }
    for reason, columns in cases.items():
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(DataError, match=reason):
            list(FilesConfig(paths=str(path), max_line_bytes=50).build().documents())


@pytest.mark.parametrize(("package", "ending"), [("pyarrow", "parquet"), ("zstandard", "jsonl.zst")])
def test_a_missing_package_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, ending: str
) -> None:
    (tmp_path / f"a.{ending}").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=rf"needs {package}; run: pip install 'torchstone\[data\]'"):
        FilesConfig(paths=str(tmp_path / f"a.{ending}")).build()


TEXT = "".join(json.dumps({"text": f"{n} {n * 7919 % 104729}"}) + "\n" for n in range(30_000)).encode()
PACKED = zstandard.ZstdCompressor().compress(TEXT)


@given(cut=st.integers(1, len(PACKED) - 1))
def test_a_zstandard_file_cut_anywhere_is_an_error(cut: int) -> None:
    with pytest.raises(EOFError, match="ends inside a frame"):
        open_zstandard(io.BytesIO(PACKED[:cut])).read()


def test_a_torn_zstandard_file_is_damage_even_if_bad_rows_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(PACKED[: len(PACKED) // 2])
    corpus = FilesConfig(paths=str(path), skip_bad=True, skip_bad_cap=1.0).build()
    with pytest.raises(DataError, match=r"damaged after line [1-9]\d*: the file ends inside a frame"):
        list(corpus.documents())


def test_zstandard_frames_one_after_the_other_are_one_text() -> None:
    compress = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    content = compress(TEXT[:100]) + compress(b"") + skippable + compress(TEXT[100:])
    assert open_zstandard(io.BytesIO(content)).read() == TEXT
    with pytest.raises(zstandard.ZstdError):
        open_zstandard(io.BytesIO(content + b"other bytes")).read()
