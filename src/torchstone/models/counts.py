"""How large a model is and what it costs: parameters, FLOPs, cache and memory, without allocating it.

What is counted
  FLOPs        a multiplication and an addition are 2. Matrix products only: projections, feed-forward, attention
               scores and attention outputs, the output head. Norms, softmax, rotation, embedding and loss are not.
  attention    in full, T keys for every query, though causal kernels skip about half and windowed ones more.
               Maps that a mixer combines (differential attention) are combined before they read the values, as
               the eager core does; fused kernels read once per map. torch.utils.flop_counter counts alike; tests
               compare the two.
  training     three forward passes: the gradient of a product is two products of the same size.
  non-embedding parameters   all but the token embedding and an output matrix of its own.

Pitfall: memory is an estimate. Kernels keep other tensors than the formula thinks, such as the attention maps of short
sequences on the CPU (`nn.attention.blocked`), and allocators round up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import nn

from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder
from torchstone.nn.attention.score_processor import ScoreProcessor
from torchstone.recipe.part import Part

Precision = Literal["fp32", "bf16"]
BYTES: dict[str, int] = {"fp32": 4, "bf16": 2}
DEVICES = ("cpu", "cuda")
# fp32 values that an optimizer keeps per parameter
OPTIMIZER_VALUES = {"adamw": 2, "rotational": 2, "lion": 1, "liona": 1, "lionar": 1, "sgdm": 1, "sgd": 0}


@dataclass(frozen=True)
class Counts:
    """Sizes and costs of a model at one sequence length.

    Attributes:
        parameters, non_embedding: numbers of values; tied matrices count once.
        active_parameters: those that one token uses; fewer than `parameters` where experts are chosen.
        forward_flops_per_token, training_flops_per_token: at `length`.
        kv_cache_bytes_per_token: decoding state of a sequence of `length` tokens in bf16, divided by `length` (a
            sliding window stores less than one entry per token).
        activation_values_per_token: values that a training step keeps per token for the backward pass (estimate).
        score_values_per_token: the same for scores that a processor reads, which are kept in fp32, by device class (`cpu`,
            `cuda`): only some have an operator that keeps less. Grows with `length`.
        components: logits per token and entry of the vocabulary; above 1 for a mixture.
        vocab_size, width, length: the sizes used.
    """

    parameters: int
    active_parameters: int
    non_embedding: int
    forward_flops_per_token: float
    training_flops_per_token: float
    kv_cache_bytes_per_token: float
    activation_values_per_token: int
    score_values_per_token: Mapping[str, int]
    components: int
    vocab_size: int
    width: int
    length: int


@lru_cache(maxsize=512)
def count(model_config: Part, vocab_size: int, length: int) -> Counts:
    """Counts of the model that a configuration describes, built on the meta device.

    Args:
        model_config: a model part with `skeleton(vocab_size, length)`, such as DecoderConfig.
        vocab_size, length: token ids, and tokens per sequence.
    """
    model: Decoder = model_config.skeleton(vocab_size, length)  # type: ignore[attr-defined]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    vocabulary = {id(model.embed.weight): model.embed.weight, id(model.head.weight_vd): model.head.weight_vd}
    forward = float(model.flops(length))
    state = model.new_state(1, length, device="meta", dtype=torch.bfloat16)
    return Counts(
        parameters=parameters,
        active_parameters=parameters - inactive_parameters(model),
        non_embedding=parameters - sum(weight.numel() for weight in vocabulary.values()),
        forward_flops_per_token=forward,
        training_flops_per_token=3 * forward,
        kv_cache_bytes_per_token=state.nbytes() / length,
        activation_values_per_token=activation_values(model),
        score_values_per_token={name: score_values(model, length, torch.device(name)) for name in DEVICES},
        components=model.head.components,
        vocab_size=vocab_size,
        width=model.config.width,
        length=length,
    )


def activation_values(model: Decoder) -> int:
    """Values kept per token for the backward pass: input and output of every linear layer of the blocks, and features.

    A linear layer keeps its input; the functions between linear layers (norm, rotation, attention, gate) keep about
    what the layers before them put out. Modules with matrices of their own (experts, token parameters) say in
    `activation_values()` what they keep. Features are what the output matrix multiplies, once per component.
    """
    vectors = model.head.components * model.head.weight_vd.shape[1]
    outside = {id(module) for part in (model.embed, model.head) for module in part.modules()}
    return vectors + sum(_kept_values(module) for module in model.modules() if id(module) not in outside)


def _kept_values(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features + module.out_features
    own: Callable[[], int] = getattr(module, "activation_values", int)
    return own()


def inactive_parameters(model: nn.Module) -> int:
    """Parameters that one token does not use, as modules with experts declare in `inactive_parameters()`."""
    return sum(getattr(module, "inactive_parameters", int)() for module in model.modules())


def score_values(model: Decoder, length: int, device: torch.device) -> int:
    """fp32 values that score processors keep per token for the backward pass, at `length` tokens.

    Where a processor has an operator of its own it keeps what that keeps, unless the maps are dropped out.
    """
    total = 0
    for mixer in model.modules():
        processor = getattr(mixer, "score_processor", None)
        if isinstance(processor, ScoreProcessor):
            whole = processor.block_rows(device) is None or getattr(mixer, "dropout", 0.0) > 0
            total += processor.kept_at_once(length) if whole else processor.kept_values(length)
    return total


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step by what holds them."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits


def memory_estimate(
    counts: Counts,
    sequences: int,
    precision: Precision = "bf16",
    optimizer: str = "adamw",
    chunk: int | None = None,
    device: str = "cpu",
) -> MemoryEstimate:
    """Memory of a training step.

    Args:
        counts: of the model, at the sequence length in question.
        sequences: rows of one forward pass (the micro-batch).
        precision: of the activations; parameters, gradients and optimizer state are fp32 (autocast).
        optimizer: one of OPTIMIZER_VALUES.
        chunk: tokens whose logits exist at the same time; None for all.
        device: device class, one of DEVICES.

    Raises:
        ConfigError: unknown precision, optimizer or device.
    """
    if precision not in BYTES or optimizer not in OPTIMIZER_VALUES or device not in DEVICES:
        raise ConfigError(
            f"no memory estimate for precision {precision!r} with optimizer {optimizer!r} on {device!r}; precisions: "
            f"{', '.join(BYTES)}; optimizers: {', '.join(OPTIMIZER_VALUES)}; devices: {', '.join(DEVICES)}."
        )
    tokens = sequences * counts.length
    kept = min(tokens, chunk or tokens)
    scores = counts.score_values_per_token[device]
    return MemoryEstimate(
        parameters=4 * counts.parameters,
        gradients=4 * counts.parameters,
        optimizer=4 * OPTIMIZER_VALUES[optimizer] * counts.parameters,
        activations=(BYTES[precision] * counts.activation_values_per_token + 4 * scores) * tokens,
        logits=2 * 4 * counts.components * counts.vocab_size * kept,  # logits and their gradient
    )
