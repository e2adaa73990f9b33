"""AutoTokenizer gives the ids and texts of torchstone's tokenizer, whatever the text and the model type."""

import json
import random

import pytest
import tokenizers as hf
import transformers

from torchstone.data.corpus import Document
from torchstone.data.tokenizers import BPEConfig, ByteTokenizer, FileTokenizer, HuggingFaceTokenizerConfig
from torchstone.errors import ConfigError, DataError
from torchstone.interop.tokenizer import fill_vocabulary, known_ids, tokenizer_json, write_tokenizer

TEXTS = ["", " ", "a<|endoftext|>b", "<|unused 300|>", "the cat\n\n  sat", "".join(map(chr, range(256)))]


def texts():
    """Fixed texts and random ones from all planes of Unicode."""
    chance = random.Random(0)
    highest = (0x80, 0x800, 0x110000)
    for _ in range(150):
        points = [chance.randrange(chance.choice(highest)) for _ in range(chance.randrange(1, 50))]
        yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
    yield from TEXTS


def bpe(tmp_path, size=400):
    documents = [Document(str(n), f"{n}:1", "the cat sat on the mat. the dog did not!" * 3) for n in range(5)]
    return BPEConfig(vocab_size=size).build(lambda: documents, "corpus", tmp_path / "cache")


def special(tmp_path):
    """A tokenizer file with special tokens, truncation and a post-processor that puts them around a text."""
    inner = hf.Tokenizer.from_str(json.dumps(tokenizer_json(bpe(tmp_path))[0]))
    inner.add_special_tokens(["<s>", "</s>"])
    ids = [(name, inner.token_to_id(name)) for name in ("<s>", "</s>")]
    inner.post_processor = hf.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    inner.enable_truncation(8)
    path = tmp_path / "tokenizer.json"
    path.write_text(inner.to_str())
    return HuggingFaceTokenizerConfig(path=str(path), end_of_document="</s>").build(lambda: (), "", tmp_path)


MAKERS = {"bytes": lambda tmp_path: ByteTokenizer(), "bpe": bpe, "huggingface": special}
TYPES = (None, "llama", "mistral", "qwen3", "torchstone")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("model_type", TYPES)
def test_ids_and_texts_agree(kind, model_type, tmp_path):
    import torchstone.interop.huggingface  # noqa: F401  knows the type

    ours = MAKERS[kind](tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    assert write_tokenizer(ours, folder, 64) == ["tokenizer.json", "tokenizer_config.json"]
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.end_of_document == theirs.pad_token_id
    assert theirs.padding_side == "left" and theirs.model_max_length == 64
    for text in texts():
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))
    chance = random.Random(1)
    for _ in range(200):  # ids that no text encodes to
        ids = [chance.randrange(ours.vocab_size) for _ in range(20)]
        special_ids = {token["id"] for token in tokenizer_json(ours)[0]["added_tokens"]}
        shown = [token for token in ids if token not in special_ids]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(shown)


def test_every_byte_has_its_own_id(tmp_path):
    content, end = tokenizer_json(ByteTokenizer())
    assert sorted(known_ids(content)) == list(range(257)) and known_ids(content)[256] == end == "<|endoftext|>"


def test_ids_without_a_token_get_names(tmp_path):
    ours = bpe(tmp_path)
    content, _ = tokenizer_json(ours)
    used = hf.Tokenizer.from_str(ours._content.decode()).get_vocab_size()
    assert used < ours.vocab_size - 1  # the corpus is too small for the vocabulary
    names = known_ids(content)
    assert sorted(names) == list(range(400)) and names[used] == f"<|unused {used}|>"
    fill_vocabulary(content, 410)  # a model with more rows than its tokenizer
    assert sorted(known_ids(content)) == list(range(410))
    again = FileTokenizer(_written(tmp_path, content), end_name="<|endoftext|>")
    assert again.vocab_size == 410 and again.encode("the cat") == ours.encode("the cat")


def _written(tmp_path, content):
    path = tmp_path / "filled.json"
    path.write_text(json.dumps(content))
    return path


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    content, _ = tokenizer_json(bpe(tmp_path))
    with pytest.raises(DataError, match="ids up to 399 and the model only 300"):
        fill_vocabulary(content, 300)


def test_a_tokenizer_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="has no tokenizer.json"):
        tokenizer_json(object())
