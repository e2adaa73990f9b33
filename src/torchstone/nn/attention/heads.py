"""How many heads of which size: one rule for every attention mixer.

    given            heads                     head_dim
    nothing          width / (unit·d_model)    d_model, the model's head_dim
    heads            heads                     width / (unit·heads)
    head_dim         width / (unit·head_dim)   head_dim
    both             heads                     head_dim; together they may be wider or narrower than the model

`unit` is the number of query sub-heads that fill one head's share of the width: 1, or 2 for differential attention v1,
whose heads are twice as wide.
"""

from __future__ import annotations

from typing import NamedTuple

from torchstone.errors import ConfigError
from torchstone.nn.context import BuildContext


class Heads(NamedTuple):
    """Query heads, key-value heads and channels of one (sub-)head."""

    query: int
    kv: int
    dim: int


def resolve_heads(
    kind: str, context: BuildContext, heads: int | None, kv_heads: int | None, head_dim: int | None, unit: int = 1
) -> Heads:
    """Head counts and head width from what the configuration gives.

    Raises:
        ConfigError: the width does not divide.
    """
    if heads is None:
        dim = context.head_dim if head_dim is None else head_dim
        heads = _divide(context.width, unit * dim, f"{kind}: width {context.width}", f"{unit} × head_dim {dim}")
    elif head_dim is None:
        dim = _divide(context.width, unit * heads, f"{kind}: width {context.width}", f"{unit} × {heads} heads")
    else:
        dim = head_dim
    return Heads(heads, heads if kv_heads is None else kv_heads, dim)


def check_groups(kind: str, heads: Heads) -> None:
    """Raise ConfigError unless query heads divide evenly into KV groups."""
    _divide(heads.query, heads.kv, f"{kind}: {heads.query} heads", f"{heads.kv} kv_heads")


def _divide(whole: int, part: int, whole_name: str, part_name: str) -> int:
    if whole % part:
        raise ConfigError(f"{whole_name} is no multiple of {part_name}; change one so that it divides evenly.")
    return whole // part
