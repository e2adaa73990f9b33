"""The standard library as a corpus, and the default text data made from it."""

from __future__ import annotations

import shutil
import sysconfig
import time
from pathlib import Path

import pytest

from torchstone.data.stdlib import StdlibConfig, StdlibCorpus
from torchstone.data.text import TextConfig, TextSource
from torchstone.errors import DataError

ROOT = Path(sysconfig.get_paths()["stdlib"])


def test_it_is_large_ordered_and_without_tests_or_packages() -> None:
    documents = list(StdlibConfig().build().documents())
    names = [document.id for document in documents]
    assert len(names) > 300 and sum(len(document.text) for document in documents) > 5_000_000
    assert names == sorted(set(names)) and {"argparse.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert parts.isdisjoint({"test", "tests", "site-packages", "__pycache__", "tkinter", "lib2to3"})
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert all(document.text.strip() and "\0" not in document.text for document in documents)


def test_the_fingerprint_is_of_sources_and_not_of_the_place(tmp_path: Path) -> None:
    for name in ("json", "email"):
        shutil.copytree(ROOT / name, tmp_path / "one" / name)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = (StdlibCorpus(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    for extra in ("test/test_x.py", "site-packages/p.py", "json/__pycache__/x.py", "_sysconfigdata_x.py"):
        path = tmp_path / "two" / extra
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n")
    assert StdlibCorpus(tmp_path / "two").fingerprint == one.fingerprint
    (tmp_path / "two" / "json" / "tool.py").write_text("changed = True\n")
    assert StdlibCorpus(tmp_path / "two").fingerprint != one.fingerprint
    assert [d.id for d in one.documents()] == [d.id for d in two.documents()]


def test_a_python_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no standard-library sources"):
        StdlibCorpus(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextSource, float, Path]:
    cache = tmp_path_factory.mktemp("stdlib")
    start = time.process_time()
    return TextConfig().build(cache), time.process_time() - start, cache


def test_the_default_data_is_built_within_seconds(built: tuple[TextSource, float, Path]) -> None:
    source, seconds, _ = built
    assert source.vocab_size == TextConfig().vocabulary() == 1024 and source.length == 128
    assert source.windows > 10_000 and 2 < source.bytes_per_token < 4
    assert len(list(source.evaluation(32, 64))) == 2
    assert seconds < 60  # processor seconds; about ten on one core


def test_a_second_build_reads_the_cache(built: tuple[TextSource, float, Path]) -> None:
    source, _, cache = built
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    again = TextConfig().build(cache)
    assert again.fingerprint == source.fingerprint
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before


def test_tokens_decode_to_the_source_text(built: tuple[TextSource, float, Path]) -> None:
    source = built[0]
    shard = source.shards.train
    labels = shard.labels()
    for number in (0, 7, len(labels) - 1):
        start = int(shard.ends[number - 1]) if number else 0
        tokens = shard.read(start, int(shard.ends[number])).tolist()
        with open(ROOT / labels[number][0], encoding="utf-8") as file:
            assert source.tokenizer.decode(tokens) == file.read()
