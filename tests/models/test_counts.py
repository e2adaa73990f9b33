"""Counts agree with the real model and with torch's own FLOP counter."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchstone.errors import ConfigError
from torchstone.models.counts import count, memory_estimate
from torchstone.models.decoder import DecoderConfig

LENGTH, VOCABULARY = 24, 101


def config_of(mixer: Any = "attention", **model: Any) -> DecoderConfig:
    return DecoderConfig.model_validate({"width": 32, "depth": 3, "head_dim": 8, "block": {"mixer": mixer}, **model})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixer", ["attention", "differential", {"kind": "attention", "kv_heads": 2}], ids=str)
def test_parameters(mixer: Any, tied: bool) -> None:
    config = config_of(mixer, head={"kind": "linear", "tied": tied})
    counts = count(config, VOCABULARY, LENGTH)
    model = config.build(VOCABULARY, LENGTH, 0)
    assert counts.parameters == sum(parameter.numel() for parameter in model.parameters())
    matrices = 1 if tied else 2
    assert counts.non_embedding == counts.parameters - matrices * VOCABULARY * 32


@pytest.mark.parametrize(
    "mixer",
    [
        "attention",
        {"kind": "attention", "kv_heads": 2, "window": 4},
        "differential",
        {"kind": "differential", "version": "v2", "kv_heads": 2},
    ],
    ids=str,
)
def test_training_flops(mixer: Any) -> None:
    """Forward is compared for every mixer in tests/nn; here is the backward pass, of the CPU's own kernels."""
    config = config_of(mixer)
    model = config.build(VOCABULARY, LENGTH, 0)
    tokens_bt = torch.zeros(2, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", dtype=torch.bfloat16):
        model.logits(model(tokens_bt).hidden_btd).sum().backward()
    assert counter.get_total_flops() == count(config, VOCABULARY, LENGTH).training_flops_per_token * tokens_bt.numel()


@pytest.mark.parametrize(
    ("mixer", "per_token"),
    [
        ("attention", 3 * 2 * 32 * 2),
        ({"kind": "attention", "kv_heads": 1}, 3 * 2 * 8 * 2),
        ("differential", 3 * 2 * 32 * 2),
        ({"kind": "attention", "window": 6}, 3 * 2 * 32 * 2 * 6 / LENGTH),
    ],
    ids=str,
)
def test_cache_bytes(mixer: Any, per_token: float) -> None:
    assert count(config_of(mixer), VOCABULARY, LENGTH).kv_cache_bytes_per_token == per_token


def test_counting_a_large_model_is_quick() -> None:
    count(config_of(), 7, 7)
    start = time.process_time()
    counts = count(DecoderConfig(width=2048, depth=24, head_dim=128), 32000, 2048)
    assert counts.parameters > 1e9
    assert time.process_time() - start < 2.0  # about 20 ms; a model with memory would need minutes


def test_memory() -> None:
    counts = count(config_of(), VOCABULARY, LENGTH)
    estimate = memory_estimate(counts, sequences=4, precision="bf16", optimizer="adamw", chunk=16)
    assert estimate.parameters == estimate.gradients == 4 * counts.parameters
    assert estimate.optimizer == 8 * counts.parameters
    assert estimate.logits == 8 * VOCABULARY * 16
    assert estimate.total > estimate.activations > 0
    double = memory_estimate(counts, sequences=4, precision="fp32")
    assert double.activations == 2 * estimate.activations
    with pytest.raises(ConfigError, match="no memory estimate"):
        memory_estimate(counts, 1, optimizer="unknown")
    with pytest.raises(ConfigError, match="devices: cpu, cuda"):
        memory_estimate(counts, 1, device="abacus")


@pytest.mark.parametrize("components", [1, 5])
def test_a_mixture_needs_memory_for_every_component(components: int) -> None:
    head = {"kind": "mixture-of-softmaxes", "components": components}
    linear, mixture = (count(config_of(head=head), VOCABULARY, LENGTH) for head in ("linear", head))
    assert (linear.components, mixture.components) == (1, components)
    assert memory_estimate(mixture, 4, chunk=16).logits == components * memory_estimate(linear, 4, chunk=16).logits
    extra = mixture.activation_values_per_token - linear.activation_values_per_token
    assert extra == (components - 1) * 32


@pytest.mark.parametrize("head", ["linear", {"kind": "factored", "rank": 5}, "mixture-of-softmaxes"], ids=str)
def test_features_are_counted_as_the_head_makes_them(head: Any) -> None:
    config = config_of(head=head)
    states = config.build(VOCABULARY, LENGTH, 0).head.features(torch.zeros(1, 32)).states
    inner = sum(
        layer.in_features + layer.out_features
        for layer in config.skeleton(VOCABULARY, LENGTH).blocks.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    assert count(config, VOCABULARY, LENGTH).activation_values_per_token == inner + states.numel()


def test_scores_that_are_kept_depend_on_the_device_and_on_dropout() -> None:
    """By the CPU's operator half of scores, hidden layer and maps; else all keys of what every operation reads."""

    def scores(**mixer: Any) -> dict[str, int]:
        config = config_of({"kind": "attention", "position": "kerple", **mixer})
        return dict(count(config, VOCABULARY, LENGTH).score_values_per_token)

    block, whole = 3 * (2 * 4 + 32) * LENGTH // 2, 3 * (8 + 2 * 32 + 2 * 4) * LENGTH
    assert scores(score_processor="dape") == {"cpu": block, "cuda": whole}
    assert scores(score_processor="dape", dropout=0.1) == {"cpu": whole, "cuda": whole}
    assert scores(score_processor="dape", position="none")["cuda"] == 3 * (4 + 2 * 32 + 2 * 4) * LENGTH
    assert scores() == {"cpu": 0, "cuda": 0}
    counts = count(config_of({"kind": "attention", "score_processor": "dape"}), VOCABULARY, LENGTH)
    there = {device: memory_estimate(counts, 2, device=device).activations for device in ("cpu", "cuda")}
    values = counts.score_values_per_token
    assert there["cuda"] - there["cpu"] == 4 * 2 * LENGTH * (values["cuda"] - values["cpu"]) > 0


def test_activation_estimate_is_near_what_autograd_keeps() -> None:
    config = config_of(width=64)
    model = config.build(VOCABULARY, LENGTH, 0)
    tokens_bt = torch.zeros(2, LENGTH, dtype=torch.long)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() >= tokens_bt.numel() * 8:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        hidden_btd = model(tokens_bt).hidden_btd
    estimated = memory_estimate(count(config, VOCABULARY, LENGTH), 2, "fp32").activations
    assert 0.5 < sum(kept.values()) / estimated < 2
    assert hidden_btd.requires_grad
