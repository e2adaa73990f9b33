"""Reading a config.json so that nothing in it is passed over.

Every setting is taken by name. What is left at the end and not known to be without effect on the function is an error that
names it: a setting that torchstone does not know may change what the model computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchstone.errors import ConfigError, DataError

CONFIG = "config.json"
_REQUIRED = object()
# what describes the file or how transformers runs it, not the function
_DESCRIBING = """
architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash use_cache
bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
initializer_range attention_dropout max_position_embeddings pretraining_tp output_attentions output_hidden_states
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
        left = sorted(set(self._values) - self._taken - WITHOUT_EFFECT)
        left = [name for name in left if self._values[name] is not None]
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
        ConfigError: a kind of scaling other than linear.
    """
    rope = dict(settings.take("rope_parameters", None) or settings.take("rope_scaling", None) or {})
    settings.take("rope_scaling", None)
    base = rope.pop("rope_theta", None) or settings.take("rope_theta", 10000.0)
    settings.take("rope_theta", None)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    share = float(settings.take("partial_rotary_factor", None) or rope.pop("partial_rotary_factor", share))
    rope.pop("partial_rotary_factor", None)
    factor = float(rope.pop("factor", 1.0)) if kind == "linear" else 1.0
    if kind not in ("default", "linear") or rope:
        extra = f" with {', '.join(sorted(rope))}" if rope else ""
        raise ConfigError(
            f"{settings.where} has rotary scaling of type {kind!r}{extra}; torchstone's rotary part knows default and linear. "
            "Import a checkpoint without it."
        )
    if share == 1.0:
        return {"kind": "rotary", "layout": "half", "base": float(base), "scale": factor}
    return {"kind": "rotary", "variant": "partial", "p": share, "layout": "half", "base": float(base), "scale": factor}
