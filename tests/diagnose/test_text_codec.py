"""Spans: which characters each token stands for, whatever the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
import transformers

from torchstone.data.tokenizers import ByteTokenizer, FileTokenizer
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.adapters.text_codec import TextCodec
from torchstone.errors import ConfigError, DataError
from torchstone.models.decoder import DecoderConfig

TEXT = "Grüße, 世界 🙂!\n  two  spaces, the the end"


def byte_level() -> hf.Tokenizer:
    """A byte-pair encoding of a few merges, whose tokens split 世 and 🙂."""
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = hf.decoders.ByteLevel()
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    trainer = hf.trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["the end of the spaces, the the"] * 5, trainer)
    return inner


@pytest.fixture(scope="module")
def fast() -> Any:
    inner = byte_level()
    inner.post_processor = hf.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def codec(tokenizer: Any) -> TextCodec:
    return TextCodec(lambda: tokenizer, "a model")


class Slow:
    """A tokenizer without offsets, as those that come with a model's own code."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.inner(text, add_special_tokens=add_special_tokens)["input_ids"]}

    def decode(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids, clean_up_tokenization_spaces=False))


def check(found: tuple[list[int], list[tuple[int, int]]], text: str) -> None:
    """Ids and spans are of one length, in order, and reach over the whole text."""
    ids, spans = found
    real = [span for span in spans if span[1] > span[0]]
    assert len(ids) == len(spans)
    assert real == sorted(real)
    assert {at for start, end in real for at in range(start, end)} == set(range(len(text)))


def test_fast_tokenizers_tell_their_own(fast: Any) -> None:
    plain, special = codec(fast).spans(TEXT), codec(fast).spans(TEXT, special=True)
    check(plain, TEXT)
    assert special[0] == [0, *plain[0], 1]
    assert special[1] == [(0, 0), *plain[1], (0, 0)]


def test_slow_tokenizers_agree_with_the_fast_one(fast: Any) -> None:
    for special in (False, True):
        assert codec(Slow(fast)).spans(TEXT, special) == codec(fast).spans(TEXT, special)


def test_a_slow_tokenizer_of_transformers() -> None:
    ids, spans = codec(transformers.ByT5Tokenizer()).spans(TEXT, special=True)
    expected = [(at, at + 1) for at, character in enumerate(TEXT) for _ in character.encode()]
    assert spans == [*expected, (0, 0)]
    assert len(ids) == len(TEXT.encode()) + 1


def test_text_that_holds_the_replacement_character(fast: Any) -> None:
    text = "a�b � 世�"
    assert codec(Slow(fast)).spans(text) == codec(fast).spans(text)


def test_torchstone_tokenizers(tmp_path: Path) -> None:
    assert codec(ByteTokenizer()).spans("aé", special=True) == ([97, 195, 169], [(0, 1), (1, 2), (1, 2)])
    path = tmp_path / "tokenizer.json"
    byte_level().save(str(path))
    tokenizer = FileTokenizer(path)
    check(codec(tokenizer).spans(TEXT), TEXT)
    assert codec(tokenizer).spans(TEXT, special=True)[0] == tokenizer.encode(TEXT)


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    class Shortening:
        def encode(self, text: str) -> list[int]:
            return list(text.replace(" ", "").encode())

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    with pytest.raises(DataError, match="does not say which characters its tokens stand for.*a text of 9"):
        codec(Shortening()).spans("ab cd efg")


def test_no_tokenizer_is_said() -> None:
    with pytest.raises(ConfigError, match="has no tokenizer; give one"):
        codec(None).spans("text")


def test_subjects_pass_it_on(fast: Any) -> None:
    decoder = DecoderConfig(width=16, depth=1, head_dim=8).build(257, 16, 0)
    assert open_subject(decoder, tokenizer=ByteTokenizer()).spans("hé")[1] == [(0, 1), (1, 2), (1, 2)]
    config = transformers.LlamaConfig(
        vocab_size=270, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    subject = open_subject(transformers.LlamaForCausalLM(config), tokenizer=fast)
    assert subject.spans(TEXT, special=True) == codec(fast).spans(TEXT, special=True)


def test_an_empty_text_has_no_tokens(fast: Any) -> None:
    assert codec(ByteTokenizer()).spans("") == ([], [])
    assert codec(Slow(fast)).spans("") == ([], [])
