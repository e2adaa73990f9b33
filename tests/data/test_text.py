"""Windows of text: pure order, exact epochs, packing that can be undone, document masks, held-out items."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from torchstone.data.batch import IGNORE
from torchstone.data.shards import open_or_build, open_shards, verify
from torchstone.data.source import DataSource
from torchstone.data.split import held_out
from torchstone.data.text import TextConfig, TextSource
from torchstone.errors import DataError

Build = Callable[..., TextSource]
END = 256


def texts_of(path: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row["text"] for row in rows}


def test_any_division_of_a_batch_gives_the_same_rows(stories: Build) -> None:
    source = stories(mask_documents=True)
    whole = source.batch(1, 4, 12)
    for ways in (2, 3, 4, 12):
        each = 12 // ways
        parts = [source.batch(1, 4, 12, rank * each, (rank + 1) * each) for rank in reversed(range(ways))]
        for name in ("tokens_bt", "targets_bt", "positions_bt", "documents_bt"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts[::-1]]), getattr(whole, name))
        assert sum((part.rows for part in parts[::-1]), ()) == whole.rows


def test_batches_do_not_depend_on_those_before(stories: Build) -> None:
    source, again = stories(), stories()
    steps = [9, 0, 3, 9]
    assert all(torch.equal(source.batch(2, step, 4).tokens_bt, again.batch(2, step, 4).tokens_bt) for step in steps)
    assert not torch.equal(source.batch(2, 9, 4).tokens_bt, source.batch(3, 9, 4).tokens_bt)


def test_an_epoch_holds_every_window_once_and_targets_are_one_further(stories: Build) -> None:
    source = stories()
    batch = source.batch(0, 0, source.windows)
    stream = source.shards.train.read(0, source.windows * 32 + 1)
    order = {tuple(window): number for number, window in enumerate(stream[:-1].reshape(-1, 32).tolist())}
    found = [order[tuple(row)] for row in batch.tokens_bt.tolist()]
    assert sorted(found) == list(range(source.windows)) and found != sorted(found)
    assert torch.equal(batch.tokens_bt[:, 1:], batch.targets_bt[:, :-1])
    assert batch.targets_bt[:, -1].tolist() == [stream[(number + 1) * 32] for number in found]


def test_the_packed_stream_gives_back_every_document(stories: Build, story_file: Path) -> None:
    shards = stories().shards
    texts, found = texts_of(story_file), {}
    for shard in (shards.train, shards.validation):
        tokens, start = shard.read(0, len(shard.tokens)), 0
        for (name, location), end in zip(shard.labels(), shard.ends, strict=True):
            assert tokens[end - 1] == END and END not in tokens[start : end - 1]
            assert held_out(name, 0.05) == (shard.name == "validation")
            line = int(name.removeprefix("story-")) + 1
            assert location == f"stories.jsonl:{line}"
            found[name] = bytes(tokens[start : end - 1].tolist()).decode()
            start = int(end)
        assert start == len(tokens)
        assert shard.text_bytes == sum(len(found[name].encode()) for name, _ in shard.labels())
    assert found == texts


def test_documents_say_what_is_in_each_row(stories: Build, story_file: Path) -> None:
    source, texts = stories(), texts_of(story_file)
    batch = source.batch(3, 5, 8)
    for row, spans in zip(batch.tokens_bt.tolist(), source.documents(3, 5, 8), strict=True):
        assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
        assert spans[-1].stop == 32
        for span in spans:
            piece = bytes(token for token in row[span.start : span.stop] if token != END)
            assert piece in texts[span.id].encode()
            assert span.stop == 32 or row[span.stop - 1] == END


def test_masked_documents_restart_and_are_never_asked_across_a_border(stories: Build) -> None:
    plain, masked = stories().batch(0, 0, 50), stories(mask_documents=True).batch(0, 0, 50)
    assert plain.documents_bt is None and plain.positions_bt is None
    assert torch.equal(plain.tokens_bt, masked.tokens_bt)
    assert masked.documents_bt is not None and masked.positions_bt is not None
    borders = 0
    for b, row in enumerate(masked.tokens_bt.tolist()):
        document = position = 0
        for t, token in enumerate(row):
            assert masked.documents_bt[b, t] == document and masked.positions_bt[b, t] == position
            ends = token == END
            assert masked.targets_bt[b, t] == (IGNORE if ends else plain.targets_bt[b, t])
            document, position, borders = document + ends, 0 if ends else position + 1, borders + ends
    assert borders > 10


def test_held_out_windows_are_fixed_spread_and_never_trained_on(stories: Build) -> None:
    source = stories(length=8)
    whole = torch.cat([batch.tokens_bt for batch in source.evaluation(7, 20)])
    source.batch(0, 3, 4)
    again = [batch for batch in source.evaluation(20, 20)]
    assert torch.equal(whole, again[0].tokens_bt) and again[0].rows == tuple(range(20))
    stream = source.shards.validation.tokens
    windows = (len(stream) - 1) // 8
    begins = [number * windows // 20 * 8 for number in range(20)]
    assert whole.tolist() == [stream[begin : begin + 8].tolist() for begin in begins]
    assert len(set(begins)) == 20 and begins[-1] > 0.9 * len(stream) - 16
    train = {name for name, _ in source.shards.train.labels()}
    assert train.isdisjoint(name for name, _ in source.shards.validation.labels())


def test_too_little_held_out_text_is_an_error(stories: Build) -> None:
    source = stories()
    with pytest.raises(DataError, match=r"held-out text has \d+ sequences of 32 tokens, but 9999 are asked"):
        next(source.evaluation(4, 9999))
    with pytest.raises(DataError, match="validation split has .* too few for one sequence of 5000"):
        stories(length=5000)


def test_bytes_per_token_is_that_of_the_held_out_text(stories: Build) -> None:
    source = stories()
    shard = source.shards.validation
    assert source.bytes_per_token == pytest.approx(1 - len(shard.ends) / len(shard.tokens))
    assert isinstance(source, DataSource)


def test_one_long_file_is_divided_at_the_end_of_a_line(tmp_path: Path) -> None:
    text = "".join(f"line number {n}\n" for n in range(1000))
    (tmp_path / "one.txt").write_text(text)
    corpus = {"kind": "files", "paths": str(tmp_path / "*.txt")}
    shards = TextConfig(corpus=corpus, tokenizer="bytes", length=16).build(tmp_path / "cache").shards
    both = shards.train, shards.validation
    train, validation = (bytes(shard.tokens[:-1].tolist()).decode() for shard in both)
    assert train + validation == text and train.endswith("\n")
    assert len(validation) / len(text) == pytest.approx(0.05, abs=0.01)
    assert shards.validation.labels() == [("one.txt:1#end", "one.txt:1")]


def test_fingerprints_depend_on_content_and_settings_only(stories: Build, story_file: Path, tmp_path: Path) -> None:
    base = stories().fingerprint
    prints = [base, stories(length=31).fingerprint, stories(mask_documents=True).fingerprint]
    prints.append(stories(validation_fraction=0.06).fingerprint)
    assert len(set(prints)) == 4
    elsewhere = tmp_path / "other" / "stories.jsonl"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(story_file.read_bytes())
    corpus = {"kind": "files", "paths": [str(elsewhere)]}
    moved = TextConfig(corpus=corpus, tokenizer="bytes", length=32).build(tmp_path)
    assert moved.fingerprint == base
    elsewhere.write_bytes(story_file.read_bytes().replace(b"cat", b"dog", 1))
    changed = TextConfig(corpus=corpus, tokenizer="bytes", length=32).build(tmp_path)
    assert changed.fingerprint != base


def test_two_processes_that_build_at_once_agree(story_file: Path, tmp_path: Path, stories: Build) -> None:
    code = (
        "import sys; from pathlib import Path; from torchstone.data.text import TextConfig as T; "
        "sys.stdin.read(1); "
        "c = {'kind': 'files', 'paths': sys.argv[1]}; "
        "s = T(corpus=c, tokenizer='bytes', length=32).build(Path(sys.argv[2])); "
        "print(s.fingerprint, s.batch(1, 2, 3).tokens_bt.sum().item())"
    )
    command = [sys.executable, "-c", code, str(story_file), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    both = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = {process.communicate()[0].strip() for process in both}
    source = stories()
    assert answers == {f"{source.fingerprint} {source.batch(1, 2, 3).tokens_bt.sum().item()}"}
    assert len(list((tmp_path / "shards").iterdir())) == 1


def test_damage_is_found(stories: Build, story_file: Path, tmp_path: Path) -> None:
    source = stories()
    corpus = TextConfig(corpus={"kind": "files", "paths": str(story_file)}).corpus.build()
    shards = open_or_build(corpus, source.tokenizer, 0.05, tmp_path)
    verify(shards)
    path = shards.folder / "train.tokens"
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff\xff" + content[102:])
    with pytest.raises(DataError, match="train.tokens does not have the content"):
        verify(shards)
    with pytest.raises(DataError, match="holds the id 65535 .* vocabulary has 257 ids"):
        open_shards(shards.folder).train.read(0, 100)
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match="train.tokens has .* bytes instead of"):
        open_shards(shards.folder)
    (shards.folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is damaged: .* Delete the folder"):
        open_shards(shards.folder)


def test_a_build_that_fails_leaves_nothing(story_file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(story_file.read_bytes() + b"{\n")
    config = TextConfig(corpus={"kind": "files", "paths": str(tmp_path / "bad.jsonl")}, tokenizer="bytes")
    with pytest.raises(DataError, match="bad.jsonl:401: invalid JSON"):
        config.build(tmp_path / "cache")
    assert list((tmp_path / "cache" / "shards").iterdir()) == []


def test_large_vocabularies_get_wider_files(tmp_path: Path, story_file: Path) -> None:
    class Wide:
        vocab_size = 70_000
        end_of_document = 69_999
        fingerprint = "wide"

        def encode(self, text: str) -> list[int]:
            return [60_000 + ord(letter) for letter in text]

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [self.encode(text) for text in texts]

        def decode(self, tokens: list[int]) -> str:
            return "".join(chr(token - 60_000) for token in tokens)

    corpus = TextConfig(corpus={"kind": "files", "paths": str(story_file)}).corpus.build()
    shard = open_or_build(corpus, Wide(), 0.05, tmp_path).train
    assert shard.tokens.dtype == np.uint32
    assert Wide().decode(shard.read(0, 7).tolist()) == "Story 0"
    Wide.vocab_size, Wide.fingerprint = 60_050, "wrong"
    with pytest.raises(DataError, match=r"stories.jsonl:1: the tokenizer gives ids .* outside its"):
        open_or_build(corpus, Wide(), 0.05, tmp_path)
