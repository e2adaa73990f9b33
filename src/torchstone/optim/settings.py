"""Which settings an optimizer of a recipe takes over from the one that it replaces.

Weight decay and the limit on relative representation change mean the same to all. A learning rate carries over only among
optimizers whose rates have AdamW's scale. Everything else (momenta, bias correction, angle schedule, clipping) has defaults that
belong to the kind: LionAR after LionA is LionAR as published, not LionAR with LionA's momentum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

CARRIED = ("weight_decay", "rrc_batch_size")
OF_ADAMW = ("adamw", "liona", "lionar", "rotational")


def carried_over(fields: Collection[str], kind: str, previous: Mapping[str, Any]) -> dict[str, Any]:
    """What `kind` takes over from the plain data of the replaced optimizer.

    The rate of `rotational` counts as AdamW's while its inner rule is AdamW, to which it also begins.
    """
    alike = kind in OF_ADAMW and previous["kind"] in OF_ADAMW and previous.get("inner", "adamw") == "adamw"
    names = (*CARRIED, *(("learning_rate",) if alike else ()))
    return {name: previous[name] for name in names if name in fields and name in previous}
