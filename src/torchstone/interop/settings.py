"""Reading a config.json so that nothing in it is passed over.

Every setting is taken by name. What is left at the end and not known to be without effect on the function is an error that
names it: a setting that torchstone does not know may change what the model computes.

A value of another type, or outside bounds that no model exceeds, is an error that says what is due. The bounds keep every
product of sizes within what a tensor's size can be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchstone.errors import ConfigError, DataError

CONFIG = "config.json"
MOST_DEPTH = 1024  # blocks
MOST_WIDTH = 1 << 20  # channels of the residual stream
MOST_HIDDEN = 1 << 24  # channels of a feed-forward layer
MOST_HEADS = 1 << 14  # heads, and channels of one
MOST_EXPERTS = 1 << 12
MOST_VOCABULARY = 10_000_000  # token ids
MOST_TOKENS = 1 << 40  # of a text, or of a window
MOST_BASE, MOST_FACTOR = 1e15, 1e6  # of rotary positions
_REQUIRED = object()
# what describes the file or how transformers runs it, not the function
_DESCRIBING = """
architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash use_cache
bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
initializer_range max_position_embeddings pretraining_tp output_attentions output_hidden_states
return_dict return_dict_in_generate output_scores attn_implementation _attn_implementation _attn_implementation_autoset
torchscript use_bfloat16 tokenizer_class prefix task_specific_params problem_type id2label label2id num_labels
finetuning_task chunk_size_feed_forward auto_map is_decoder
"""
# settings of generate that older versions kept here
_GENERATING = """
max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
WITHOUT_EFFECT = frozenset(f"{_DESCRIBING} {_GENERATING}".split())


class Settings:
    """The settings of one config.json, taken one by one.

    Args:
        where: the file, for messages.
        values: its content.
    """

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self._values = where, dict(values)
        self._taken: set[str] = set()

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a setting; raises ConfigError where it is missing and has no default."""
        self._taken.add(name)
        if name in self._values:
            return self._values[name]
        if default is _REQUIRED:
            raise ConfigError(f"{self.where} lacks {name}; give the complete folder of the checkpoint.")
        return default

    def take_int(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from low to high; required where there is no default. Raises ConfigError."""
        value = self.take(name, _REQUIRED if default is None else default)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name, value, f"a whole number from {low} to {high}")
        return value

    def find_int(self, name: str, low: int, high: int) -> int | None:
        """A whole number from low to high, or None where it is missing or null; raises ConfigError."""
        return None if self.take(name, None) is None else self.take_int(name, low, high)

    def take_float(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A number from low to high; required where there is no default. Raises ConfigError."""
        value = self.take(name, _REQUIRED if default is None else default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self._wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def find_float(self, name: str, low: float, high: float) -> float | None:
        """A number from low to high, or None where it is missing or null; raises ConfigError."""
        return None if self.take(name, None) is None else self.take_float(name, low, high)

    def take_flag(self, name: str, default: bool) -> bool:
        """True or false; raises ConfigError."""
        value = self.take(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def take_text(self, name: str) -> str:
        """A text; raises ConfigError."""
        value = self.take(name)
        if type(value) is not str:
            raise self._wrong(name, value, "a text")
        return value

    def find_text(self, name: str) -> str | None:
        """A text, or None where it is missing or null; raises ConfigError."""
        return None if self.take(name, None) is None else self.take_text(name)

    def find_names(self, name: str) -> list[str] | None:
        """A list of texts that is not empty, or None where it is missing or null; raises ConfigError."""
        value = self.take(name, None)
        if value is None:
            return None
        if type(value) is not list or not value or not all(type(item) is str for item in value):
            raise self._wrong(name, value, "a list of names")
        return list(value)

    def take_mapping(self, name: str) -> Settings:
        """The settings of a mapping, empty where it is missing or null; raises ConfigError."""
        value = self.take(name, None)
        if value is not None and type(value) is not dict:
            raise self._wrong(name, value, "a mapping")
        return Settings(f"{self.where} ({name})", value or {})

    def has(self, name: str) -> bool:
        """Whether the setting is there, be it null."""
        return name in self._values

    def left(self) -> list[str]:
        """Names of settings with a value that were not taken."""
        names = sorted(set(self._values) - self._taken)
        return [name for name in names if self._values[name] is not None]

    def _wrong(self, name: str, value: Any, due: str) -> ConfigError:
        return ConfigError(
            f"{self.where} has {name}={json.dumps(value)[:80]}; {due} is due. Give the config.json that belongs to the weights."
        )

    def only(self, name: str, *allowed: Any) -> Any:
        """The value of a setting that may only be one of these; the first one where it is missing."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            shown = " or ".join(json.dumps(item) for item in allowed)
            raise ConfigError(
                f"{self.where} has {name}={json.dumps(value)}, which torchstone's parts do not have; it can import {shown}."
            )
        return value

    def finish(self) -> None:
        """Raise ConfigError if a setting was not taken that may change the function."""
        left = [name for name in self.left() if name not in WITHOUT_EFFECT]
        if left:
            raise ConfigError(
                f"{self.where} has the setting {left[0]}={json.dumps(self._values[left[0]])[:80]}, which torchstone does not "
                "know; it may change what the model computes. Remove it if you know that it does not."
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises DataError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); restore it.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object; restore it.")
    return content


def rotary_of(settings: Settings, share: float = 1.0) -> dict[str, Any]:
    """The position part of a model of transformers, whose rotation pairs the halves of a head.

    Args:
        settings: with `rope_parameters` (version 5) or `rope_theta` and `rope_scaling`.
        share: of the channels that turn, where the settings do not say.

    Raises:
        ConfigError: a kind of scaling other than linear, or a number out of bounds.
    """
    given, older = settings.take_mapping("rope_parameters"), settings.take_mapping("rope_scaling")
    rope = given if given.left() else older
    outer = settings.find_float("rope_theta", 1, MOST_BASE)
    base = rope.find_float("rope_theta", 1, MOST_BASE) or outer or 10000.0
    old_name = rope.find_text("type")
    kind = rope.find_text("rope_type") or old_name or "default"
    inner = rope.find_float("partial_rotary_factor", 0, 1)
    own = settings.find_float("partial_rotary_factor", 0, 1)
    share = next((value for value in (own, inner) if value is not None), share)
    factor = rope.take_float("factor", 1, MOST_FACTOR, 1.0) if kind == "linear" else 1.0
    extra = rope.left()
    if kind not in ("default", "linear") or extra:
        shown = f" with {', '.join(extra)}" if extra else ""
        raise ConfigError(
            f"{settings.where} has rotary scaling of type {kind!r}{shown}; torchstone's rotary part knows default and linear. "
            "Import a checkpoint without it."
        )
    if share == 1.0:
        return {"kind": "rotary", "layout": "half", "base": base, "scale": factor}
    return {"kind": "rotary", "variant": "partial", "p": share, "layout": "half", "base": base, "scale": factor}
