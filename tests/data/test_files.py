"""Files of every format give the same documents; paths, globs and URLs; the published books."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from torchstone.data.files import FilesConfig
from torchstone.data.text import TextConfig
from torchstone.errors import DataError, DependencyError

ROWS = [{"id": f"r{n}", "text": f"text {n} é\nsecond line", "other": n} for n in range(20)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path: Path) -> Path:
    """ROWS in the format of the path's ending."""
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=7)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES[:200]) + gzip.compress(LINES[200:]))
    elif path.name.endswith(".zst"):
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(LINES[:200]) + compress(LINES[200:]))
    else:
        path.write_bytes(LINES)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_all_formats_hold_the_same_documents(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"rows.{ending}")
    documents = list(FilesConfig(paths=str(path)).build().documents())
    assert [(d.id, d.text) for d in documents] == [(row["id"], row["text"]) for row in ROWS]
    assert [d.location for d in documents] == [f"rows.{ending}:{n}" for n in range(1, 21)]


def test_text_files_globs_and_lists_keep_their_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "a/3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo " + name.encode())
    glob = FilesConfig(paths=str(tmp_path / "*" / "*.txt")).build()
    assert [d.id for d in glob.documents()] == ["a/1.txt:1", "a/3.txt:1", "b/2.txt:1"]
    assert next(glob.documents()).text == "one\ntwo a/1.txt"
    paths = (str(tmp_path / "b" / "2.txt"), str(tmp_path / "a" / "*.txt"), str(tmp_path / "b" / "2.txt"))
    listed = FilesConfig(paths=paths).build()
    assert [d.id for d in listed.documents()] == ["b/2.txt:1", "a/1.txt:1", "a/3.txt:1"]


def test_urls_are_read_through_fsspec() -> None:
    with fsspec.open("memory://files-test/rows.jsonl", "wb") as file:
        file.write(LINES)
    corpus = FilesConfig(paths="memory://files-test/rows.jsonl").build()
    assert len(list(corpus.documents())) == 20
    assert corpus.fingerprint == FilesConfig(paths="memory://files-test/*.jsonl").build().fingerprint


def test_what_cannot_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no file matches"):
        FilesConfig(paths=str(tmp_path / "*.jsonl")).build()
    with pytest.raises(DataError, match="no file matches .*absent.jsonl"):
        FilesConfig(paths=str(tmp_path / "absent.jsonl")).build()
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a.csv: the ending is not one of .txt, .jsonl"):
        FilesConfig(paths=str(tmp_path / "a.csv")).build()
    with pytest.raises(DataError, match="paths is empty"):
        FilesConfig(paths=()).build()
    parquet = FilesConfig(paths=str(write(tmp_path / "x.parquet")), text_field="txt").build()
    with pytest.raises(DataError, match="no column 'txt'; its columns: id, text, other"):
        list(parquet.documents())
    for module, ending in (("pyarrow", "parquet"), ("zstandard", "jsonl.zst")):
        path = write(tmp_path / f"y.{ending}")
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(DependencyError, match=rf"needs {module}; run: .*torchstone\[data\]"):
                list(FilesConfig(paths=str(path)).build().documents())


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("damage", ["torn", "foreign"])
def test_damaged_containers_are_never_skipped(tmp_path: Path, ending: str, damage: str) -> None:
    path = write(tmp_path / f"rows.{ending}")
    path.write_bytes(path.read_bytes()[:-30] if damage == "torn" else b"this is something else\n" * 9)
    corpus = FilesConfig(paths=str(path), skip_bad=True, skip_bad_cap=1.0).build()
    with pytest.raises(DataError, match=rf"rows.{ending}(: the compressed file is damaged| is not a read)"):
        list(corpus.documents())


def test_no_more_than_the_limit_of_a_line_is_held(tmp_path: Path) -> None:
    """A line of 50 MB without an end is passed over in small reads."""
    asked: list[int] = []

    class Watched(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            asked.append(size or -1)
            return super().readline(size)

    from torchstone.data.rows import Format, reader_of

    file = Watched(b"x" * 50_000_000 + b"\n" + LINES)
    rows = list(reader_of("x.jsonl")(file, "x.jsonl", Format("text", 1_000_000)))
    assert "50000000 bytes, more than max_line_bytes=1000000" in rows[0].reason and len(rows) == 21
    assert max(asked) < 1_000_010 and rows[1].line == 2 and not rows[1].reason


def test_the_published_books_become_training_data(data_folder: Path, tmp_path: Path) -> None:
    path = data_folder / "corpora" / "books.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the published books are not at {path}; set TORCHSTONE_DATA")
    corpus = {"kind": "files", "paths": str(path)}
    source = TextConfig(corpus=corpus, tokenizer="bytes", length=64).build(tmp_path)
    shards = source.shards
    assert len(shards.train.ends) + len(shards.validation.ends) == 2009
    assert len(shards.validation.tokens) / len(shards.train.tokens) == pytest.approx(0.05, abs=0.03)
    assert "chapter" in source.documents(0, 0, 1)[0][0].id
