"""Rotation: what is read from a model turns queries before rotation into those after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, TURNING, half_order_of, tiny_model
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.adapters.rotation import Table, half_order, read_rotation, rotate
from torchstone.diagnose.subject import Activations, AttentionLayer, Subject
from torchstone.errors import ConfigError

Subjects = Callable[[str], Subject]
TURNLESS = ("GPT2", "OPT")
NORMS = {"Qwen3": "q_norm", "Gemma3": "q_norm", "Olmo2": "q_norm", "Cohere": "q_norm"}


def before_rotation(subject: Subject, layer: AttentionLayer, family: str, tokens_bt: Tensor) -> Tensor:
    """Queries [b, h, t, d] as they leave the projection, or the norm after it, in the model's order."""
    projection, caught = layer.projection("q"), list[Tensor]()
    module = subject.model.get_submodule(layer.name + "." + NORMS[family]) if family in NORMS else projection.module
    handle = module.register_forward_hook(lambda m, a, y: caught.append(y))
    subject.logits(tokens_bt)
    handle.remove()
    q = caught[0].detach()
    if family in NORMS:
        shape = (2, layer.heads, 20, layer.head_dim)
        return q if q.shape == shape else q.reshape(2, 20, layer.heads, layer.head_dim).transpose(1, 2)
    q = q if projection.rows is None else q[..., projection.rows]
    return q.unflatten(-1, (layer.heads, layer.head_dim)).transpose(1, 2)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in TURNLESS])
def test_turning_the_queries_before_rotation_gives_those_recorded(
    family: str, family_subject: Subjects, tokens_bt: Tensor
) -> None:
    subject = family_subject(family)
    seen: list[tuple[AttentionLayer, Activations]] = []
    subject.visit(tokens_bt, lambda layer, activations: seen.append((layer, activations)))
    for layer, activations in seen:
        q_bhtd, dim = before_rotation(subject, layer, family, tokens_bt), layer.head_dim
        q_bhtd = q_bhtd[..., half_order_of(family, dim)]
        if family == "SmolLM3" and layer.index == 1:
            assert layer.rotation is None
            torch.testing.assert_close(q_bhtd, activations.q_bhtd, rtol=1e-5, atol=1e-5)
            continue
        rotation = layer.rotation
        assert rotation is not None and rotation.frequencies_m.shape == (dim // 2,)
        assert int((rotation.frequencies_m != 0).sum()) == TURNING.get(family, dim // 2)
        turned = rotate(q_bhtd.double(), rotation.frequencies_m, torch.arange(20))
        if family == "GptOss":  # YaRN also stretches
            turned = turned * (activations.q_bhtd.norm() / turned.norm())
        torch.testing.assert_close(turned.float(), activations.q_bhtd, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", TURNLESS)
def test_learned_positions_are_no_rotation(family: str, family_subject: Subjects) -> None:
    assert all(layer.rotation is None for layer in family_subject(family).layers)


def test_bases_and_words_are_the_models_own(family_subject: Subjects) -> None:
    local, everywhere = (layer.rotation for layer in family_subject("Gemma3").layers)
    assert local is not None and everywhere is not None
    assert (local.base, everywhere.base) == (10000.0, 1000000.0)
    scaled = family_subject("Llama-3").layers[0].rotation
    assert scaled is not None and scaled.base == 10000.0 and "llama3" in scaled.description
    plain = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    assert float((scaled.frequencies_m / plain).min()) == pytest.approx(1 / 8)
    assert "4 of 8 channels" in family_subject("Phi").layers[0].rotation.description
    assert "interleaved" in family_subject("Cohere").layers[0].rotation.description


@pytest.mark.parametrize("kind", sorted({"linear", "yarn", "dynamic", "proportional"} & set(ROPE_INIT_FUNCTIONS)))
def test_scaled_frequencies_are_read(kind: str, tokens_bt: Tensor) -> None:
    settings: dict[str, Any] = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0}
    if kind == "proportional":
        settings = {"rope_type": kind, "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    subject = open_subject(tiny_model("Llama", head_dim=16, _rope=settings))
    rotation = subject.layers[0].rotation
    assert rotation is not None and rotation.base == 100.0 and kind in rotation.description
    plain = 100.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    if kind == "proportional":
        plain[4:] = 0
    expected = {"linear": plain / 4, "dynamic": plain, "proportional": plain}
    if kind in expected:
        torch.testing.assert_close(rotation.frequencies_m, expected[kind], rtol=1e-6, atol=1e-9)


def test_a_rotation_that_cannot_be_explained_is_an_error_and_no_missing_rotation() -> None:
    model = tiny_model("Llama")
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, position_ids * position_ids)
    subject = open_subject(model)
    with pytest.raises(ConfigError, match="rotation of model.layers.0.self_attn .*none of 2 readings"):
        _ = subject.layers[0].rotation


def test_reading_tells_apart_tables_layouts_and_no_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 3, 1, 8, generator=generator, dtype=torch.float64)
    tables = [
        Table(10.0 ** (-torch.arange(4).double() / 4), 10.0, ""),
        Table(10.0 ** (-torch.arange(2).double() / 2), 10.0, ""),
    ]
    positions = torch.arange(16)
    for table in tables:
        frequencies = torch.cat([table.frequencies_r, torch.zeros(4 - len(table.frequencies_r), dtype=torch.float64)])
        for layout in ("half", "interleaved"):
            order = half_order(8, len(table.frequencies_r), layout)
            turned = rotate(first[..., order].expand(2, 3, 16, 8), frequencies, positions)
            reading = read_rotation(turned[..., order.argsort()], tables, "layer")
            assert reading.rotation is not None and layout in reading.rotation.description
            torch.testing.assert_close(reading.rotation.frequencies_m, frequencies)
            natural = torch.equal(order, torch.arange(8))
            assert (reading.order_d is None) == natural and (natural or torch.equal(reading.order_d, order))
    assert read_rotation(first.expand(2, 3, 16, 8), tables, "layer").rotation is None
    assert read_rotation(first * 0, tables, "layer").problem
    added = first + torch.randn(1, 1, 16, 8, generator=generator)
    assert read_rotation(added, tables, "layer").problem
    assert not read_rotation(added, [], "layer").problem and read_rotation(added, [], "layer").rotation is None
    assert read_rotation(turned, [], "layer").problem  # turns, and the model has no table
