"""What a mixer cannot keep of the attention in whose place it is put.

An arm of a comparison may name another mixer; what both kinds have then carries over (`Part.inherit`). A setting of attention
that the new kind lacks would be lost unseen, and the arms would differ in more than the mixer. `refuse_lost` says so instead.

Pitfall: sizes and positions are not looked at. What they become is up to the kind's own `inherit`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torchstone.errors import ConfigError
from torchstone.recipe.part import Part

NEUTRAL: dict[str, Any] = {
    "window_convention": "inclusive",
    "qk_norm": False,
    "dropout": 0.0,
    "output_norm": False,
    "qkv_bias": False,
    "output_bias": False,
    "score_processor": None,
}
"""Settings of attention that change what it computes, with the value that changes nothing."""


def refuse_lost(cls: type[Part], previous: Mapping[str, Any], kept: Collection[str] = ()) -> None:
    """Raise ConfigError if the replaced mixer has a setting that the new kind would lose.

    Args:
        cls: configuration of the new kind; settings that it has a field for are not lost.
        previous: plain data of the replaced mixer, its `kind` included.
        kept: settings that the new kind has under another name.
    """
    own = cls.model_fields["kind"].default
    for name, neutral in NEUTRAL.items():
        value = previous.get(name, neutral)
        if name in cls.model_fields or name in kept or value == neutral:
            continue
        if name == "window_convention" and previous.get("window") is None:
            continue  # it says nothing of the whole past
        raise ConfigError(
            f"the replaced {previous['kind']} has {name}: {_yaml(value)} and {own} has no such setting; set {name}: "
            f"{_yaml(neutral)} in the recipe, so that the arms differ in one thing."
        )


def _yaml(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value["kind"])
    return "null" if value is None else str(value).lower()
