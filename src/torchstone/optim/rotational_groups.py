"""Which parameters of a model rotate: decayed matrices of dense maps, without embeddings and output head.

The rows of a dense map's weight are its neurons. Other tensors of two or more dimensions have rows that are none (filters
[c, 1, k], stacked blocks [b, i, o], bounds and tokens that are shared), some of them constant or zero; they take plain steps.

With the norms of all matrices frozen at small initial values a language model cannot make its logits larger. So what has the
role `embeddings` (token embedding, output matrix, everything in a head) takes plain steps unless it is asked for, and layers may
have gains (`projection: gained`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from torchstone.errors import ConfigError
from torchstone.optim.groups import decay_groups, role_rules
from torchstone.optim.weight_decay import WeightDecay


def named_groups(model: nn.Module, weight_decay: WeightDecay) -> list[dict[str, Any]]:
    """The groups of `decay_groups`, with names, for an optimizer that does not rotate."""
    return [
        {"params": list(group.parameters.items()), "weight_decay": group.weight_decay}
        for group in decay_groups(model, weight_decay)
    ]


def dense_weights(model: nn.Module) -> set[int]:
    """The identities of the weights [out, in] of dense maps: `nn.Linear`, and projections with one matrix of that shape."""
    found = set()
    for module in model.modules():
        weight, sizes = (
            getattr(module, "weight", None),
            [getattr(module, f"{end}_features", None) for end in ("out", "in")],
        )
        if isinstance(weight, nn.Parameter) and list(weight.shape) == sizes:
            found.add(id(weight))
    return found


def rotational_groups(model: nn.Module, weight_decay: WeightDecay, embeddings: bool) -> list[dict[str, Any]]:
    """The same, with what does not rotate (embeddings and head, and what is no dense map's weight) in groups of its own.

    Args:
        model: whose modules declare roles; without declarations no matrix counts as an embedding.
        weight_decay: of matrices; 0 for a role lets its matrices take plain steps.
        embeddings: rotate embeddings and head too.

    Raises:
        ConfigError: nothing rotates (see also `decay_groups`).
    """
    of_vocabulary, dense = role_rules(model, WeightDecay())["embeddings"], dense_weights(model)
    groups: list[dict[str, Any]] = []

    def turns(pair: tuple[str, nn.Parameter]) -> bool:
        return embeddings if of_vocabulary(*pair) else id(pair[1]) in dense or pair[1].dim() < 2

    for group in named_groups(model, weight_decay):
        inside = [pair for pair in group["params"] if turns(pair)]
        apart = [pair for pair in group["params"] if not turns(pair)]
        groups += [{**group, "params": inside, "rotational": None}] if inside else []
        groups += [{**group, "params": apart, "rotational": False}] if apart else []
    turning = [value for g in groups if g["weight_decay"] and g["rotational"] is None for _, value in g["params"]]
    if not any(value.dim() > 1 for value in turning):
        raise ConfigError(
            "no parameter of the model rotates: the target angle follows from weight_decay, and it is 0 for the matrix of every "
            "dense map beside embeddings and head (or there is none). Give optimizer.weight_decay a value above 0, or choose an "
            "optimizer that does not rotate."
        )
    return groups
