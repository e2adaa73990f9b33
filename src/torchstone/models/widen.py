"""Widen: append hidden units to the feed-forward layers of a trained model and train on (after Net2Net, arXiv 1511.05641).

    W_in ← [W_in; W_new],   W_out ← [W_out, 0]

New units read the stream with random weights and write nothing, so the function is the same, and their outgoing columns have
gradients from the first step. It is to an ordinary Transformer what appended parameter tokens are to TokenFormer, and the
control that the comparison of the two needs. Works on the kinds `mlp`, `swiglu` and `geglu` with linear maps.

The optimizer, the configuration and the report are handled as in `torchstone.models.growth`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchstone.data.batch import Batch
from torchstone.errors import ConfigError
from torchstone.models.growth import (
    assert_described,
    batch_name,
    check_held,
    enlarge_parameter,
    require_factor,
    require_sane,
    rewritten,
)
from torchstone.models.growth_report import GrowthReport, compare, random_batch, read
from torchstone.nn.feedforward.gated import GatedFeedForward
from torchstone.nn.feedforward.mlp import MLP
from torchstone.recipe.part import Part


def widen(
    model: Any,
    factor: float = 2,
    *,
    hidden: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    batch: Batch | None = None,
) -> GrowthReport:
    """Append hidden units to every feed-forward layer of a model, in place, without changing its function.

    Args:
        model: a decoder (or another model with `config`, `vocab_size`, `length`).
        factor: every hidden width times this.
        hidden: the new hidden width itself, instead of a factor.
        optimizer: of this model; it holds the new parameters afterwards, and its state is extended by zeros.
        seed: names the random values of incoming weights.
        batch: what loss and logits are compared on; None takes random tokens.

    Raises:
        ConfigError: no layer that can be widened, a width that is not larger or absurdly large, or an optimizer that does
            not hold the parameters. Nothing is changed then.
    """
    layers = _layers(model)
    require_factor(factor)
    sizes = {name: (old, round(factor * old) if hidden is None else hidden) for name, old in layers.items()}
    _check(sizes)
    (width,) = {after for _, after in sizes.values()}
    config = rewritten(model.config, lambda part: _widened(part, width))
    fresh = config.build(model.vocab_size, model.length, seed)
    old_shapes = {name: value.shape for name, value in model.named_parameters()}
    grown = [name for name, value in fresh.named_parameters() if value.shape != old_shapes[name]]
    check_held(model, grown, optimizer)
    probe = random_batch(model, seed) if batch is None else batch
    before = read(model, probe)
    _silence(fresh, sizes)
    for name in grown:
        enlarge_parameter(model, name, fresh.get_parameter(name), optimizer)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    model.config = config
    assert_described(model, fresh)
    settings = {"incoming weights": "random", "outgoing weights": "zero"}
    return compare(
        before, read(model, probe), "hidden units", sizes, settings, batch_name(batch), optimizer is not None
    )


def _layers(model: nn.Module) -> dict[str, int]:
    """Hidden width of every layer that can be widened."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MLP | GatedFeedForward):
            last = module.w_out if isinstance(module, MLP) else module.w_down
            if type(last) is not nn.Linear:
                raise ConfigError(
                    f"{name} is made of maps of another projection than linear; append parameter tokens with `grow`."
                )
            found[name] = last.in_features
    if not found:
        raise ConfigError(
            "the model has no feed-forward layer with hidden units to append to; kinds that have are mlp, swiglu and geglu."
        )
    return found


def _check(sizes: dict[str, tuple[int, int]]) -> None:
    for name, (before, after) in sizes.items():
        if after <= before:
            raise ConfigError(
                f"{name} has {before} hidden units and {after} were asked for; units can be appended, not taken away: ask "
                "for more."
            )
        require_sane(name, after, "hidden units")


def _widened(part: Any, hidden: int) -> Any:
    """The part with the new hidden width, if it is a feed-forward that has one."""
    if isinstance(part, Part) and part.family == "feedforward" and part.kind in ("mlp", "swiglu", "geglu"):
        return part.model_copy(update={"hidden": hidden})
    return None


@torch.no_grad()
def _silence(fresh: nn.Module, sizes: dict[str, tuple[int, int]]) -> None:
    """Zero the columns through which new units would write into the stream."""
    for name, (old, _) in sizes.items():
        module: Any = fresh.get_submodule(name)
        for local in module.residual_parameters():
            module.get_parameter(local)[:, old:].zero_()
