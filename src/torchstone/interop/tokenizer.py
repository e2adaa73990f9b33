"""A run's tokenizer as files that AutoTokenizer reads, with the same ids for every text.

    tokenizer.json          the tokenizers library's own form
    tokenizer_config.json   the token that ends a document, and how special tokens are treated

bytes         byte-level BPE without merges: the token of byte 65 has id 65, the end of a document 256
bpe           the trained file; ids that no token has get names, so that transformers counts as many ids as the model
huggingface   the given file, less what would put special tokens around a text

torchstone encodes text that spells a special token as ordinary characters, and puts nothing before a text. The files say so
(`split_special_tokens`, no post-processor), so that AutoTokenizer gives the ids that the model was trained on.

Pitfall: special tokens must then be given as ids (`tokenizer.eos_token_id`), not written into a prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers as hf

from torchstone.data.tokenizer import Tokenizer
from torchstone.data.tokenizers import ByteTokenizer, FileTokenizer
from torchstone.errors import ConfigError, DataError

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
END = "<|endoftext|>"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> list[str]:
    """Write a tokenizer's files; returns their names.

    Args:
        tokenizer: of a run's data.
        folder: where to.
        length: tokens of a training sequence, which transformers keeps as `model_max_length`.

    Raises:
        ConfigError: a tokenizer of a kind that has no such form.
    """
    content, end = tokenizer_json(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    (folder / FILE).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return [FILE, SETTINGS]


def tokenizer_json(tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """The content of tokenizer.json and the name of the token that ends a document; raises ConfigError."""
    if isinstance(tokenizer, ByteTokenizer):
        content = json.loads(_bytes_json())
    elif isinstance(tokenizer, FileTokenizer):
        content = json.loads(tokenizer._content)
    else:
        raise ConfigError(
            f"a {type(tokenizer).__name__} has no tokenizer.json; export a run whose tokenizer is bytes, bpe or huggingface."
        )
    content |= {"truncation": None, "padding": None, "post_processor": _without_specials(content.get("post_processor"))}
    end = _name_end(content, tokenizer.end_of_document)
    fill_vocabulary(content, tokenizer.vocab_size)
    return content, end


def fill_vocabulary(content: dict[str, Any], size: int, where: str | Path = FILE) -> None:
    """Give every id below `size` that no token has the name of an unused special token, in place.

    Args:
        content: of a tokenizer.json.
        size: ids of the model.
        where: the file, for messages.

    Raises:
        DataError: it is no tokenizer.json, or knows ids of `size` or more.
    """
    names = known_ids(content, where)
    if names and max(names) >= size:
        raise DataError(
            f"the tokenizer has ids up to {max(names)} and the model only {size} of them; give the tokenizer that belongs to "
            "the model."
        )
    taken = set(names.values())
    for number in range(size):
        if number not in names:
            name = f"<|unused {number}|>"
            while name in taken:
                name += "|"
            _add(content, number, name)
    content["added_tokens"].sort(key=lambda token: token["id"])
    if set(known_ids(content)) != set(range(size)):
        raise DataError(
            f"a {content['model'].get('type')} tokenizer with gaps between its ids has no form that transformers reads alike; "
            "train with a tokenizer whose ids have no gaps."
        )


def known_ids(content: dict[str, Any], where: str | Path = FILE) -> dict[int, str]:
    """Token id → name of a tokenizer.json, added tokens included; raises DataError where it is none."""
    try:
        vocabulary = hf.Tokenizer.from_str(json.dumps(content)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{where} is not a tokenizer.json of the tokenizers library ({error}); restore it.") from error
    model, added = content.get("model"), content.setdefault("added_tokens", [])
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list) or not isinstance(added, list):
        raise DataError(f"{where} has no vocabulary (model.vocab) or no list of added_tokens; restore it.")
    return {number: name for name, number in vocabulary.items()}


def _bytes_json() -> str:
    """One token a byte, numbered by the byte; the byte-level alphabet gives every byte a printable name."""
    names = {byte: name for byte, name in enumerate(_alphabet())}
    tokenizer = hf.Tokenizer(hf.models.BPE(vocab={name: byte for byte, name in names.items()}, merges=[]))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    return str(tokenizer.to_str())


def _alphabet() -> list[str]:
    """Name of each byte in GPT-2's byte-level alphabet: itself where it is printable, else the next character after 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    found, moved = [], 0
    for byte in range(256):
        found.append(chr(byte) if byte in printable else chr(256 + moved))
        moved += byte not in printable
    return found


def _add(content: dict[str, Any], number: int, name: str) -> None:
    """Make `name` a special token of this id, in place.

    The library numbers an added token itself, one above the highest, unless the model's vocabulary has its name already.
    """
    if isinstance(content["model"]["vocab"], dict):
        content["model"]["vocab"][name] = number
    form = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": number, "content": name, **form})


def _name_end(content: dict[str, Any], end: int) -> str:
    """The name of the token that ends a document, which is made a special token if it is not one or does not exist."""
    names = known_ids(content)
    added = {token["id"]: token for token in content["added_tokens"]}
    if end in added:
        added[end]["special"] = True
        return str(added[end]["content"])
    name = names.get(end, END)
    while name in names.values() and names.get(end) != name:
        name += "|"
    _add(content, end, name)
    return name


def _without_specials(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor that puts no token around a text: byte-level ones only move offsets."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        kept = [part for part in map(_without_specials, processor["processors"]) if part is not None]
        return {"type": "Sequence", "processors": kept} if kept else None
    return processor if processor["type"] == "ByteLevel" else None
