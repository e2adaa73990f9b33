"""Growth: append parameter tokens to a trained model and train on (TokenFormer, arXiv 2410.23168, section 3.3).

    K ← [K; K_new],   V ← [V; V_new]

With K_new = 0 and the scale τ kept, new scores are 0, so ‖A‖ stays, GELU(0) = 0, and the function is the same to the last
rounding. V_new must then not be 0: with both zero, ∂K_new ∝ V_new and ∂V_new ∝ GELU(0) vanish, and the new tokens are dead
for ever. With V_new random the first update goes to K_new alone (GELU'(0) = ½).

The released code differs from the paper's text: τ follows the current number of tokens (τ = √n) and new rows keep their
random initial values, which moves the loss. `keys`, `values` and `tau` offer all of it; the default keeps the function.

How: a model of the larger configuration is built, its new rows are set as asked, and what is trained already is copied into
the leading rows. Parameters that grow become new objects; an optimizer that is given along holds them afterwards in the same
places, with moments extended by zeros. The model's `config` then describes the larger model, so that its checkpoint loads
from its recipe; τ is in the checkpoint.

Pitfalls: grow before a model is wrapped or compiled. `freeze_old` makes old rows parameters of their own without gradient:
neither updates nor weight decay reach them. The rows of a softmax cannot be appended to without a jump (exp(0) = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from torchstone.data.batch import Batch
from torchstone.errors import ConfigError
from torchstone.models.growth_report import GrowthReport, compare, random_batch, read
from torchstone.nn.feedforward.pattention import PattentionFeedForwardConfig
from torchstone.nn.initialisation import generator_for
from torchstone.nn.projection.pattention import Pattention, PattentionConfig
from torchstone.nn.span import Span

Fill = Literal["zero", "random"]
Tau = Literal["fixed", "following"]
USES = ("input", "output", "feedforward")
MOST_UNITS = (
    10**7
)  # of one layer: more is a slip of the hand, and would fail for memory without a word of what was meant


def grow(
    model: Any,
    factor: float | Mapping[str, int] = 2,
    *,
    keys: Fill = "zero",
    values: Fill = "random",
    tau: Tau = "fixed",
    freeze_old: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    batch: Batch | None = None,
) -> GrowthReport:
    """Append parameter tokens to the Pattention layers of a model, in place.

    Args:
        model: a decoder (or another model with `config`, `vocab_size`, `length`) with Pattention layers.
        factor: every layer's tokens times this; or new numbers of tokens by use (`input`, `output`, `feedforward`) or by a
            pattern of layer names (`blocks.*.feedforward.*`). Later entries win; layers that none names stay.
        keys, values: what new rows are: `zero`, or `random` as in a new model.
        tau: `fixed` keeps the scale, `following` multiplies it by √(n after / n before).
        freeze_old: keep the old tokens of the layers that grow as they are. The new ones are trained, and so is everything
            else: embedding, gains, biases, layers that do not grow.
        optimizer: of this model; it holds the new parameters afterwards, and its state is extended by zeros.
        seed: names the random values.
        batch: what loss and logits are compared on; None takes random tokens.

    Raises:
        ConfigError: no Pattention layer, a name that matches none, fewer tokens than before or more than `MOST_UNITS`, a
            factor that is no finite number, keys and values both zero, function-preserving growth of `softmax` layers,
            sizes that the configuration cannot hold, or an optimizer that does not hold the parameters. Nothing is
            changed then.
    """
    layers = pattention_layers(model)
    sizes = _sizes(layers, factor)
    _check(layers, sizes, keys, values, tau)
    config = _larger_config(model.config, layers, sizes, freeze_old)
    held = [f"{name}.{part}" for name in sizes for part in ("keys_nd", "values_ne")]
    check_held(model, held, optimizer)
    fresh = config.build(model.vocab_size, model.length, seed)
    probe = random_batch(model, seed) if batch is None else batch
    before = read(model, probe)
    for name, (old, new) in sizes.items():
        layer, larger = layers[name], fresh.get_submodule(name)
        if freeze_old:
            _redraw(larger, name, old, seed)
        _set_new_rows(larger, old, keys, values)
        _enlarge(model, name, layer, larger, optimizer, freeze_old)
        if tau == "following":
            layer.tau.mul_((new / old) ** 0.5)
    model.config = config
    assert_described(model, fresh)
    settings = {"keys": keys, "values": values, "tau": tau, "old tokens": "frozen" if freeze_old else "trained"}
    return compare(
        before, read(model, probe), "parameter tokens", sizes, settings, batch_name(batch), optimizer is not None
    )


def pattention_layers(model: nn.Module) -> dict[str, Pattention]:
    """The Pattention layers of a model by name; raises ConfigError if there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Pattention)}
    if not layers:
        raise ConfigError(
            "the model has no parameter tokens to append to; build it with model.block.projection: pattention or "
            "model.block.feedforward: pattention, or enlarge its hidden layers (`widen`; `torchstone grow --widen`)."
        )
    return layers


def batch_name(batch: Batch | None) -> str:
    """What a report says of the batch."""
    return "random tokens" if batch is None else f"{batch.tokens:,} tokens of the batch given"


def _sizes(layers: Mapping[str, Pattention], factor: float | Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Tokens before and after of every layer that grows."""
    wanted = {name: layer.tokens for name, layer in layers.items()}
    if isinstance(factor, Mapping):
        for key, tokens in factor.items():
            matching = [name for name, layer in layers.items() if layer.use == key or fnmatchcase(name, key)]
            if not matching:
                raise ConfigError(
                    f"{key!r} names no layer with parameter tokens; give a use ({', '.join(USES)}) or a pattern of layer "
                    f"names: {', '.join(list(layers)[:6])}, ..."
                )
            wanted |= dict.fromkeys(matching, tokens)
    else:
        require_factor(factor)
        wanted = {name: round(tokens * factor) for name, tokens in wanted.items()}
    for name, tokens in wanted.items():
        if tokens < layers[name].tokens:
            raise ConfigError(
                f"{name} has {layers[name].tokens} parameter tokens and {tokens} were asked for; tokens can be appended, "
                "not taken away: ask for more."
            )
        require_sane(name, tokens, "parameter tokens")
    grown = {name: (layer.tokens, wanted[name]) for name, layer in layers.items() if wanted[name] > layer.tokens}
    if not grown:
        raise ConfigError("every layer has the tokens that were asked for; ask for more, such as factor=2.")
    return grown


def require_factor(factor: float) -> None:
    """Raise ConfigError for a factor that is no finite number."""
    if not math.isfinite(factor):
        raise ConfigError(
            f"the factor is {factor}; it says how many times larger layers become: give a number, such as 2."
        )


def require_sane(name: str, units: int, what: str) -> None:
    """Raise ConfigError for a layer so large that no one can have meant it."""
    if units > MOST_UNITS:
        raise ConfigError(
            f"{name} would have {units:,} {what}, and a layer has at most {MOST_UNITS:,}; give a smaller factor or number."
        )


def _check(layers: Mapping[str, Pattention], sizes: Mapping[str, Any], keys: Fill, values: Fill, tau: Tau) -> None:
    for given, name in ((keys, "keys"), (values, "values")):
        if given not in ("zero", "random"):
            raise ConfigError(f"{name} is {given!r}; new {name} are 'zero' or 'random'.")
    if tau not in ("fixed", "following"):
        raise ConfigError(f"tau is {tau!r}; the scale is 'fixed' or 'following'.")
    if keys == values == "zero":
        raise ConfigError(
            "new keys and new values are both zero: neither has a gradient then, and the new tokens stay dead. Make one of "
            "them random (keys zero and values random keep the function)."
        )
    softmax = [name for name in sizes if layers[name].settings.norm_mode == "softmax"]
    if softmax and keys == "zero" and tau == "fixed":
        raise ConfigError(
            f"{softmax[0]} has norm_mode softmax, where a new token with a zero key takes weight from the others "
            "(exp(0) = 1): it cannot grow without changing the function. Use l2-norm-gelu, or accept the jump with "
            "keys='random' or tau='following'."
        )


def _larger_config(
    config: Any, layers: Mapping[str, Pattention], sizes: Mapping[str, tuple[int, int]], freeze_old: bool
) -> Any:
    """The model's configuration with the new sizes; raises ConfigError if layers of one use differ."""
    tokens: dict[tuple[type, str], tuple[int, int]] = {}
    for name, layer in layers.items():
        after = sizes[name][1] if name in sizes else layer.tokens
        frozen = layer.tokens if freeze_old and name in sizes else layer.frozen
        found = tokens.setdefault((type(layer.settings), layer.use), (after, frozen))
        if found != (after, frozen):
            raise ConfigError(
                f"{name} would have {after} parameter tokens ({frozen} frozen) and another layer of use {layer.use!r} "
                f"{found[0]} ({found[1]} frozen), but a recipe has one number for each use; grow all layers of a use alike."
            )

    def change(part: Any) -> Any:
        if isinstance(part, PattentionFeedForwardConfig):
            after, frozen = tokens[PattentionFeedForwardConfig, "feedforward"]
            return part.model_copy(update={"tokens": after, "frozen_tokens": frozen})
        if isinstance(part, PattentionConfig):
            mine = {use: size for (kind, use), size in tokens.items() if kind is PattentionConfig}
            update = {f"{use}_tokens": after for use, (after, _) in mine.items()}
            return part.model_copy(update=update | {f"frozen_{use}_tokens": old for use, (_, old) in mine.items()})
        return None

    return rewritten(config, change)


def rewritten(value: Any, change: Callable[[Any], Any]) -> Any:
    """A configuration in which `change` replaced the parts for which it returns something."""
    if isinstance(value, BaseModel):
        replaced = change(value)
        if replaced is not None:
            return replaced
        fields = {name: rewritten(getattr(value, name), change) for name in type(value).model_fields}
        moved = {name: new for name, new in fields.items() if new is not getattr(value, name)}
        return value.model_copy(update=moved) if moved else value
    if isinstance(value, tuple):
        items = tuple(rewritten(item, change) for item in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


@torch.no_grad()
def _set_new_rows(larger: Any, old: int, keys: Fill, values: Fill) -> None:
    """Zero the rows of a new layer that shall be zero; the others keep their initial values."""
    for fill, parameter in ((keys, larger.keys_nd), (values, larger.values_ne)):
        if fill == "zero":
            parameter[old - larger.frozen :].zero_()


@torch.no_grad()
def _redraw(larger: Any, name: str, old: int, seed: int) -> None:
    """Initial values for rows that become parameters of their own, from a stream that the old rows were not drawn from.

    The stream of a parameter's name alone gives the first rows, which the old tokens have had if the seed is the run's.
    """
    for local, fill in larger.own_initialisation().items():
        if local in ("keys_nd", "values_ne"):
            fill(larger.get_parameter(local), generator_for(seed, f"{name}.{local} behind {old}"))


def _enlarge(
    model: nn.Module,
    name: str,
    layer: Pattention,
    larger: Any,
    optimizer: torch.optim.Optimizer | None,
    freeze_old: bool,
) -> None:
    """Give a layer the rows of the larger one behind its own."""
    if not freeze_old:
        for part in ("keys_nd", "values_ne"):
            enlarge_parameter(model, f"{name}.{part}", larger.get_parameter(part), optimizer)
        return
    kept = {"frozen_keys_nd": layer.keys().detach().clone(), "frozen_values_ne": layer.values().detach().clone()}
    for part in ("keys_nd", "values_ne"):
        replace_parameter(model, f"{name}.{part}", larger.get_parameter(part), optimizer, lambda zeros, _: zeros)
    for part, rows in kept.items():
        setattr(layer, part, nn.Parameter(rows, requires_grad=False))


def check_held(model: nn.Module, names: Sequence[str], optimizer: torch.optim.Optimizer | None) -> None:
    """Raise ConfigError unless the optimizer, if there is one, holds every parameter that is to grow."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name in names if id(model.get_parameter(name)) not in held]
    if missing:
        raise ConfigError(
            f"the optimizer does not hold {missing[0]} of this model, so that it would go on updating other tensors; "
            "give the optimizer that was built on this very model, or none."
        )


@torch.no_grad()
def enlarge_parameter(model: nn.Module, name: str, larger: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Replace a parameter by `larger` with the old values in its leading corner; moments are extended by zeros."""
    old = model.get_parameter(name)
    replace_parameter(
        model, name, _in_corner(old, larger.to(old)), optimizer, lambda zeros, moment: _in_corner(moment, zeros)
    )


def _in_corner(old: Tensor, larger: Tensor) -> Tensor:
    """`larger` with the old values where both have an entry."""
    result = larger.detach().clone()
    result[tuple(slice(size) for size in old.shape)] = old.detach()
    return result


@torch.no_grad()
def replace_parameter(
    model: nn.Module,
    name: str,
    value: Tensor,
    optimizer: torch.optim.Optimizer | None,
    carry: Callable[..., Tensor],
) -> None:
    """Put a new parameter in the place of an old one, under all its names and in the optimizer.

    Args:
        value: of the new parameter.
        carry: zeros of the new shape, and the old moment → the new moment. State of other shapes (step counts) is kept.
    """
    old = model.get_parameter(name)
    new = nn.Parameter(value.detach().to(old), requires_grad=old.requires_grad)
    for module in model.modules():
        for local, parameter in module.named_parameters(recurse=False):
            if parameter is old:
                setattr(module, local, new)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, {})
    if state:
        optimizer.state[new] = {
            key: carry(item.new_zeros(new.shape), item)
            if isinstance(item, Tensor) and item.shape == old.shape
            else item
            for key, item in state.items()
        }


def assert_described(model: nn.Module, fresh: nn.Module) -> None:
    """The grown model has the tensors that its configuration builds: a checkpoint of it loads."""
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (model, fresh)]
    assert shapes[0] == shapes[1], "a grown model differs from what its configuration builds"


@torch.no_grad()
def token_usage(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """How much each parameter token contributes on a batch: fp32 [n] on the CPU for every layer, mean 1.

    A token's contribution is Σ |weight| · ‖value‖ over the batch, and 1 is its share if all were alike. New tokens with zero
    keys have 0.
    """
    found: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(layer: Any, given: tuple[Any, ...]) -> None:
            weights_n = layer.weights(given[0]).abs().flatten(0, -2).double().sum(0)
            usage_n = weights_n * layer.values().double().norm(dim=-1)
            found[name] = found.get(name, torch.zeros_like(usage_n)) + usage_n

        return hook

    hooks = [layer.register_forward_pre_hook(record(name)) for name, layer in pattention_layers(model).items()]
    training = model.training
    model.eval()
    try:
        batch = batch.to(next(model.parameters()).device)
        model(batch.tokens_bt, Span(batch.positions_bt, batch.documents_bt))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: (usage_n / usage_n.mean().clamp_min(1e-300)).float().cpu() for name, usage_n in found.items()}


def usage_histogram(usage_n: Tensor, edges: Sequence[float] = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 10.0)) -> Tensor:
    """Share of tokens whose usage lies in [edge, next edge), the last bin without an end; [len(edges)], sum 1."""
    place_n = torch.bucketize(usage_n, torch.tensor(edges[1:], dtype=usage_n.dtype), right=True)
    return torch.bincount(place_n, minlength=len(edges)).float() / len(usage_n)
