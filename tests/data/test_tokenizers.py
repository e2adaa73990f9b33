"""Every tokenizer is lossless, keeps its end-of-document id to itself, and has a stable fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from torchstone.data.corpus import Document
from torchstone.data.tokenizer import Tokenizer
from torchstone.data.tokenizers import BPEConfig, BytesConfig, HuggingFaceTokenizerConfig, sample
from torchstone.errors import DataError

SENTENCE = "The cat {} sat on the mat; the mat sat still. Ünïcödé."
TEXT = [Document(f"d{n}", f"d:{n}", SENTENCE.format(n)) for n in range(80)]


def none() -> Iterable[Document]:
    raise AssertionError("the corpus is not needed here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def every(folder: Path) -> dict[str, Tokenizer]:
    bpe = BPEConfig(vocab_size=300).build(lambda: TEXT, "corpus", folder)
    inner = hf.Tokenizer.from_file(str(next((folder / "tokenizers").iterdir())))
    inner.add_special_tokens(["<|endoftext|>"])
    inner.enable_truncation(4)
    inner.save(str(folder / "tokenizer.json"))
    return {
        "bytes": BytesConfig().build(none, "corpus", folder),
        "bpe": bpe,
        "huggingface": HuggingFaceTokenizerConfig(path=str(folder)).build(none, "corpus", folder),
    }


@pytest.mark.parametrize("kind", ["bytes", "bpe", "huggingface"])
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_text_survives(every: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = every[kind]
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text == tokenizer.decode([*tokens, tokenizer.end_of_document])
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.encode_batch([text, "x"]) == [tokens, tokenizer.encode("x")]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "huggingface"])
def test_text_that_spells_a_special_token_stays_text(every: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = every[kind]
    tokens = tokenizer.encode("before <|endoftext|> after")
    assert tokenizer.end_of_document not in tokens
    assert tokenizer.decode(tokens) == "before <|endoftext|> after"
    assert tokenizer.end_of_document < tokenizer.vocab_size


def test_byte_pairs_are_merged(every: dict[str, Tokenizer]) -> None:
    assert len(every["bpe"].encode("the mat sat")) < 11 == len(every["bytes"].encode("the mat sat"))


def test_training_is_repeatable_and_cached(folder: Path, tmp_path: Path) -> None:
    config = BPEConfig(vocab_size=300)
    first = config.build(lambda: TEXT, "corpus", folder)
    cached = config.build(none, "corpus", folder)
    again = config.build(lambda: reversed(TEXT), "corpus", tmp_path)
    assert first.fingerprint == cached.fingerprint == again.fingerprint
    assert BPEConfig(vocab_size=301).build(lambda: TEXT, "corpus", tmp_path).fingerprint != first.fingerprint
    assert config.vocabulary() == first.vocab_size == 300 and first.end_of_document == 299


def test_a_tiny_corpus_leaves_ids_unused(tmp_path: Path) -> None:
    tokenizer = BPEConfig(vocab_size=5000).build(lambda: [Document("a", "a:1", "ab ab")], "tiny", tmp_path)
    assert tokenizer.vocab_size == 5000 and max(tokenizer.encode("ab ab")) < 300
    assert tokenizer.decode([4000, *tokenizer.encode("ab")]) == "ab"


@given(size=st.integers(1, 3000))
def test_the_sample_has_the_size_and_ignores_the_order(size: int) -> None:
    texts = list(sample(TEXT, size))
    assert texts == list(sample(TEXT[::-1], size))
    total = sum(len(text.encode()) for text in texts)
    longest = max(len(document.text.encode()) for document in TEXT)
    whole = sum(len(document.text.encode()) for document in TEXT)
    assert min(size - 3, whole) <= total <= size + longest  # a cut may fall inside a character


def write(path: Path, change: Callable[[hf.Tokenizer], None]) -> HuggingFaceTokenizerConfig:
    tokenizer = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 5, "[UNK]": 1}, unk_token="[UNK]"))
    change(tokenizer)
    tokenizer.save(str(path))
    return HuggingFaceTokenizerConfig(path=str(path))


def test_the_vocabulary_of_a_file_reaches_its_highest_id(tmp_path: Path) -> None:
    config = write(tmp_path / "t.json", lambda tokenizer: tokenizer.add_special_tokens(["</s>"]) and None)
    tokenizer = config.build(none, "", tmp_path)
    assert config.vocabulary() == tokenizer.vocab_size > 5
    assert tokenizer.end_of_document != 5


def test_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        HuggingFaceTokenizerConfig(path=str(tmp_path / "absent.json")).vocabulary()
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match="bad.json is not a tokenizer.json"):
        HuggingFaceTokenizerConfig(path=str(tmp_path / "bad.json")).vocabulary()
    config = write(tmp_path / "no-end.json", lambda tokenizer: None)
    with pytest.raises(DataError, match="none of .* to end a document"):
        config.vocabulary()
    with pytest.raises(DataError, match="no 'END' to end"):
        config.model_copy(update={"end_of_document": "END"}).vocabulary()


@pytest.mark.parametrize("kind", ["bytes", "bpe", "huggingface"])
def test_ids_that_are_no_text_give_nothing(every: dict[str, Tokenizer], kind: str) -> None:
    """A model may have more ids than its text, such as <fim>, and draw them."""
    tokenizer = every[kind]
    head, tail = tokenizer.encode("The cat"), tokenizer.encode(" sat")
    for token in (tokenizer.vocab_size, tokenizer.vocab_size + 1, 10**6, -1):
        assert tokenizer.decode([*head, token, *tail, token]) == "The cat sat"
        assert tokenizer.decode([token]) == ""
