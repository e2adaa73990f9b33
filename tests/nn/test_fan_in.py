"""Initial values by fan-in: the standard deviation of every kind of parameter of a hybrid model."""

from __future__ import annotations

import pytest
import torch

from torchstone.models.decoder import DecoderConfig

WIDTH, DEPTH, BLOCKS, TAPS = 128, 3, 4, 4


def model(seed: int = 0) -> torch.nn.Module:
    config = {
        "width": WIDTH,
        "depth": DEPTH,
        "head_dim": 32,
        "pattern": [{"kind": "rglru", "num_blocks": BLOCKS}, "local-attention", "attention"],
        "block": {"feedforward": {"kind": "geglu", "hidden": 384, "bias": True}},
        "initialisation": "fan-in",
    }
    return DecoderConfig.model_validate(config).build(500, 16, seed)


def test_standard_deviations() -> None:
    found = {name: value for name, value in model().named_parameters()}
    expected = {
        "embed.weight": WIDTH**-0.5,
        "blocks.0.mixer.w_y.weight": WIDTH**-0.5,
        "blocks.0.mixer.w_x.weight": WIDTH**-0.5,
        "blocks.0.mixer.w_o.weight": (2 / DEPTH / WIDTH) ** 0.5,
        "blocks.0.mixer.conv.weight": (0.01 / TAPS) ** 0.5,
        "blocks.0.mixer.rg_lru.input_gate.weight": (BLOCKS / WIDTH) ** 0.5,
        "blocks.0.mixer.rg_lru.recurrence_gate.weight": (BLOCKS / WIDTH) ** 0.5,
        "blocks.1.mixer.w_q.weight": WIDTH**-0.5,
        "blocks.1.mixer.w_o.weight": (2 / DEPTH / WIDTH) ** 0.5,
        "blocks.0.feedforward.w_gate.weight": WIDTH**-0.5,
        "blocks.2.feedforward.w_down.weight": (2 / DEPTH / 384) ** 0.5,
    }
    for name, std in expected.items():
        assert float(found[name].detach().std()) == pytest.approx(std, rel=5 / (2 * found[name].numel()) ** 0.5), name


def test_an_expert_starts_as_a_layer_alone_does() -> None:
    experts = {"num_experts": 16, "top_k": 2}
    block = {
        "mixer": {"kind": "moa", "kv_heads": 2, **experts},
        "feedforward": {"kind": "smoe", "hidden": 192, **experts},
    }
    config = {"width": WIDTH, "depth": DEPTH, "head_dim": 32, "block": block, "initialisation": "fan-in"}
    found = dict(DecoderConfig.model_validate(config).build(500, 16, 0).named_parameters())
    expected = {
        "blocks.0.mixer.query_experts": WIDTH**-0.5,
        "blocks.0.mixer.output_experts": (2 / DEPTH / 64) ** 0.5,
        "blocks.0.mixer.router.weight": WIDTH**-0.5,
        "blocks.0.feedforward.w_in": WIDTH**-0.5,
        "blocks.0.feedforward.w_out": (2 / DEPTH / 192) ** 0.5,
    }
    for name, std in expected.items():
        assert float(found[name].detach().std()) == pytest.approx(std, rel=5 / (2 * found[name].numel()) ** 0.5), name


def test_biases_are_zero_and_gains_one() -> None:
    for name, value in model().named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif name.endswith("gain"):
            assert bool((value == 1).all()), name


def test_values_depend_on_seed_and_name_alone() -> None:
    first, again, other = (dict(model(seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if first[name].std() > 0]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)
