"""Noise: shares as asked, flags of exactly the tokens that changed, held-out text clean, bad rows counted as without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchstone.data.corpus import Document
from torchstone.data.files import FilesConfig
from torchstone.data.mixture import Mixture
from torchstone.data.noisy import NoisyConfig, NoisyCorpus, token_noise, token_spans
from torchstone.data.shards import verify
from torchstone.data.text import TextConfig, TextSource
from torchstone.data.tokenizers import ByteTokenizer
from torchstone.errors import ConfigError, DataError

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "some",
    "small",
    "clouds",
    "move",
    "quiet",
    "skies",
]


def documents(count: int = 300) -> list[Document]:
    draw = np.random.default_rng(0)
    return [Document(f"d{n}", f"d:{n}", " ".join(draw.choice(WORDS, 60))) for n in range(count)]


class Given:
    fingerprint = "given"

    def documents(self, reject: Any = None) -> Iterable[Document]:
        return iter(documents())


def noisy(**settings: Any) -> NoisyCorpus:
    return NoisyCorpus(NoisyConfig(**settings), Given())


def test_shares_are_as_asked() -> None:
    corpus = noisy(shuffled=0.2, random_spans=0.1, scanned=0.03)
    found = [(document, corpus.corrupt(document)) for document in documents()]
    whole = [one.noise.all() for _, one in found]
    assert 0.14 < np.mean(whole) < 0.26  # 300 documents: 0.2 ± 2.6 standard errors
    others = [one for (_, one), all_ in zip(found, whole, strict=True) if not all_]
    share = np.concatenate([one.noise for one in others]).mean()
    assert 0.11 < share < 0.15  # random spans, and scanning of what is no space
    for document, one in found:
        assert len(one.noise) == len(one.text)
        if one.noise.all():
            assert sorted(one.text.split()) == sorted(document.text.split()) and one.text != document.text


@pytest.mark.parametrize("kind", ["shuffled", "random_spans", "scanned"])
def test_each_kind_alone_and_none(kind: str) -> None:
    nothing = {"shuffled": 0.0, "random_spans": 0.0, "scanned": 0.0}
    for document in documents(20):
        clean = noisy(**nothing).corrupt(document)
        assert clean.text == document.text and not clean.noise.any()
    assert any(noisy(**{**nothing, kind: 0.5}).corrupt(document).noise.any() for document in documents(20))


def test_what_is_not_flagged_is_the_original_text() -> None:
    corpus = noisy(shuffled=0.0, random_spans=0.2, scanned=0.1)
    for document in documents(30):
        found = corpus.corrupt(document)
        kept = "".join(c for c, noise in zip(found.text, found.noise, strict=True) if not noise)
        rest = iter(document.text)
        assert all(c in rest for c in kept)  # a subsequence of the original
        assert found.noise.any() and kept


def test_a_character_left_out_flags_the_one_after_it() -> None:
    """Characters that stand once, without case or look-alike: damage doubles one or leaves it out."""
    text = "".join(chr(0x4E00 + place) for place in range(2000))
    found = noisy(shuffled=0.0, random_spans=0.0, scanned=0.3).corrupt(Document("gaps", "gaps:1", text))
    left_out = set(text) - set(found.text)
    after = {chr(ord(one) + 1) for one in left_out} & set(found.text)
    doubled = {one for one in found.text if found.text.count(one) == 2}
    flagged = {one for one, noise in zip(found.text, found.noise, strict=True) if noise}
    assert len(left_out) > 100 and len(doubled) > 100
    assert flagged == after | doubled


def test_words_that_fell_in_their_old_order_are_no_noise() -> None:
    found = noisy(shuffled=1.0).corrupt(Document("one", "one:1", " word  "))
    assert found.text == " word  " and not found.noise.any()
    two = [noisy(shuffled=1.0).corrupt(Document(f"t{n}", "t:1", "a b")) for n in range(40)]
    assert all(one.noise.all() == (one.text == "b a") and one.noise.any() == one.noise.all() for one in two)
    assert len({one.text for one in two}) == 2


def test_noise_in_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="whose own noise would be lost"):
        NoisyConfig(corpus={"kind": "noisy", "scanned": 0.1})


def test_noise_is_a_function_of_seed_and_document() -> None:
    first, again, other = noisy(), noisy(), noisy(noise_seed=1)
    texts = [[one.corrupt(document).text for document in documents(20)] for one in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.fingerprint != noisy(scanned=0.03).fingerprint


def source_of(path: Path, cache: Path, noise: dict[str, Any] | None, **settings: Any) -> TextSource:
    corpus: dict[str, Any] = {"kind": "files", "paths": str(path)}
    if noise is not None:
        corpus = {"kind": "noisy", "corpus": corpus, **noise}
    return TextConfig(**{"corpus": corpus, "tokenizer": "bytes", "length": 16, **settings}).build(cache)


@pytest.fixture
def text_file(json_lines: Callable[..., Path]) -> Path:
    return json_lines([{"id": one.id, "text": one.text + " Ünd."} for one in documents()])


@pytest.mark.parametrize("tokenizer", ["bytes", {"kind": "bpe", "vocab_size": 400}])
def test_flags_reach_the_targets_they_belong_to(text_file: Path, tmp_path: Path, tokenizer: Any) -> None:
    noise = {"shuffled": 0.3, "random_spans": 0.2, "span": 10, "scanned": 0.05}
    source = source_of(text_file, tmp_path / "cache", noise, tokenizer=tokenizer)
    corpus = NoisyConfig(corpus={"kind": "files", "paths": str(text_file)}, **noise).build()
    labels = source.shards.train.labels()
    by_id = {document.id: document for document in corpus.documents()}
    expected_ids: list[int] = []
    expected: list[bool] = []
    for name, _ in labels:
        found = corpus.corrupt(by_id[name])
        ids, spans = token_spans(source.tokenizer, found.text)
        assert ids == source.tokenizer.encode(found.text)
        expected_ids += [*ids, source.tokenizer.end_of_document]
        expected += [bool(found.noise[a:b].any()) for a, b in spans] + [False]
    assert source.shards.train.tokens.tolist() == expected_ids
    assert source.shards.train.noise is not None and source.shards.train.noise.tolist() == expected
    batch = source.batch(4, 2, 8)
    items = source.items(4, 2, 8)
    assert batch.noise_bt is not None and batch.noise_bt.dtype == torch.bool
    for row, item in enumerate(items.tolist()):
        begin = item * 16 + 1
        assert batch.noise_bt[row].tolist() == expected[begin : begin + 16]
        assert batch.targets_bt[row].tolist() == expected_ids[begin : begin + 16]
    verify(source.shards)


def test_held_out_text_is_clean_and_the_same_as_without_noise(text_file: Path, tmp_path: Path) -> None:
    plain, dirty = (source_of(text_file, tmp_path / "cache", noise) for noise in (None, {}))
    assert dirty.shards.validation.tokens.tolist() == plain.shards.validation.tokens.tolist()
    assert next(dirty.evaluation(4, 4)).noise_bt is None and plain.batch(0, 0, 2).noise_bt is None
    assert dirty.fingerprint != plain.fingerprint


def test_files_of_plain_corpora_are_what_they_were(text_file: Path, tmp_path: Path) -> None:
    source = source_of(text_file, tmp_path / "cache", None)
    names = {path.name for path in source.shards.folder.iterdir()}
    assert names == {"manifest.json"} | {
        f"{side}.{part}" for side in ("train", "validation") for part in ("tokens", "ends", "documents.jsonl")
    }


def test_a_mixture_flags_the_noise_of_its_noisy_part(text_file: Path, tmp_path: Path) -> None:
    plain, dirty = (source_of(text_file, tmp_path / "cache", noise) for noise in (None, {"shuffled": 1.0}))
    batch = Mixture([plain, dirty], (0.5, 0.5), "shared").batch(0, 0, 8)
    assert batch.noise_bt is not None and not batch.noise_bt[:4].any() and batch.noise_bt[4:].float().mean() > 0.9


def test_bad_rows_are_counted_and_quarantined_through_every_wrapping(
    json_lines: Callable[..., Path], tmp_path: Path
) -> None:
    rows: list[Any] = [{"id": one.id, "text": one.text} for one in documents(200)]
    rows[20], rows[90] = {"id": "x"}, {"text": 7}
    path = json_lines(rows)
    files = {"kind": "files", "paths": str(path), "skip_bad": True, "skip_bad_cap": 0.05}
    text = {"kind": "text", "corpus": {"kind": "noisy", "corpus": files}, "tokenizer": "bytes", "length": 16}
    dirty = TextConfig(**text).build(tmp_path / "cache")
    plain = TextConfig(**{**text, "corpus": files}).build(tmp_path / "cache")
    mixed = Mixture([plain, dirty], (0.5, 0.5), "shared")
    for source in (plain, dirty, *(part.inner for part in mixed.parts)):
        assert (source.shards.kept, source.shards.rejected) == (198, 2)
        assert [one.location.rpartition(":")[2] for one in source.shards.quarantine()] == ["21", "91"]
    with pytest.raises(DataError, match=":21: "):
        TextConfig(**{**text, "corpus": {"kind": "noisy", "corpus": {**files, "skip_bad": False}}}).build(
            tmp_path / "new"
        )


def test_a_tokenizer_that_cannot_place_its_tokens_is_refused() -> None:
    class Blind:
        def encode(self, text: str) -> list[int]:
            return [1]

    with pytest.raises(ConfigError, match="Blind does not say which characters"):
        token_spans(Blind(), "text")  # type: ignore[arg-type]


def test_token_noise_is_any_flagged_character() -> None:
    noise = np.asarray([False, False, True, False, False])
    assert token_noise([(0, 2), (1, 3), (3, 3), (2, 5), (3, 5)], noise).tolist() == [False, True, False, True, False]
    assert token_spans(ByteTokenizer(), "aÜ")[1] == [(0, 1), (1, 2), (1, 2)]


def test_it_wraps_any_corpus_of_a_recipe() -> None:
    corpus = NoisyConfig().build()
    assert isinstance(corpus, NoisyCorpus) and not isinstance(corpus.clean, FilesConfig)
    assert next(iter(corpus.documents())).text == next(iter(corpus.clean.documents())).text
