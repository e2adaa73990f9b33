"""Frequency usage on whole models: transformers' Llama with planted heads, p-RoPE of our own, and models that do not turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.rotary.frequency_usage import _masses, frequency_usage
from torchstone.diagnose.rotary.offset_heads import offset_heads
from torchstone.diagnose.rotary.rope_usage import rope_usage_finding
from torchstone.diagnose.rotary.theory import rotated, spread
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.recipe.registry import parse_part

HEADS, KEY_HEADS, CHANNELS, BASE = 4, 2, 8, 100.0


class ByteTokenizer:
    """Text as bytes."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Any, **_: Any) -> str:
        return bytes(tokens).decode(errors="replace")

    def __len__(self) -> int:
        return 256


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=CHANNELS,
        attention_bias=True,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
    )
    return transformers.LlamaForCausalLM(config)


def plant(model: Any, layer: int, head: int, back: int) -> None:
    """Give a head constant queries, and the key head that it reads the keys of Thm 5.3."""
    attention = model.model.layers[layer].self_attn
    psi_d = spread(400.0 * CHANNELS**0.5, CHANNELS // 2)
    frequencies_m = BASE ** (-torch.arange(CHANNELS // 2, dtype=torch.float64) / (CHANNELS // 2))
    key_d = rotated(psi_d, frequencies_m, torch.tensor([back]))[0]
    key_head = head // (HEADS // KEY_HEADS)
    for linear, place, vector in ((attention.q_proj, head, psi_d), (attention.k_proj, key_head, key_d)):
        rows = slice(place * CHANNELS, (place + 1) * CHANNELS)
        with torch.no_grad():
            linear.weight[rows] = 0
            linear.bias[rows] = vector.float()


def decoder(position: Any) -> Any:
    block = {"mixer": {"kind": "attention", "position": position}}
    part = {"kind": "decoder", "width": 32, "depth": 2, "head_dim": 8, "block": block}
    return parse_part("model", part).build(256, 64, 0)


def rows(count: int = 2, length: int = 32) -> torch.Tensor:
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(0))


def test_heads_planted_in_a_llama_are_found() -> None:
    model = llama()
    plant(model, 0, 1, 1)
    plant(model, 2, 2, 0)
    found = offset_heads(frequency_usage(open_subject(model), rows()))
    assert {(head.layer, head.head, head.offset) for head in found} == {(0, 1, -1), (2, 2, 0)}


def test_the_finding_of_a_llama_has_its_frequencies_and_controls() -> None:
    model = llama()
    plant(model, 1, 0, 1)
    finding = rope_usage_finding(
        open_subject(model, tokenizer=ByteTokenizer()), ["words and more words, " * 20] * 3, length=32, count=3
    )
    assert [row[:3] for row in finding.tables[0].rows] == [(1, 0, -1)]
    untrained_mass = finding.tables[0].rows[0][4]
    assert isinstance(untrained_mass, float) and untrained_mass < 0.2
    frequencies = {row[2] for row in finding.tables[2].rows}
    assert frequencies == {1.0, 0.31623, 0.1, 0.031623}
    ranking = next(table for table in finding.tables if table.title == "Ranking of pairs")
    assert len(ranking.rows) == 3 * KEY_HEADS
    assert any("layer 1" in heatmap.title and "Offset heads: 0." in heatmap.note for heatmap in finding.heatmaps)


def test_pairs_of_p_rope_that_stand_still_are_named() -> None:
    position = {"kind": "rotary", "variant": "p", "p": 0.5, "base": 100.0}
    subject = open_subject(decoder(position), tokenizer=ByteTokenizer())
    finding = rope_usage_finding(subject, ["words and more words, " * 20], length=32, count=2)
    assert finding.heatmaps[0].x[2:] == ("does not turn", "does not turn")
    assert [row[4] for row in finding.tables[2].rows[:4]] == ["yes", "yes", "no", "no"]
    assert any("2 pairs of a head do not turn" in note for note in finding.notes)


def test_differential_attention_has_usage_by_sub_head_and_masses_by_head() -> None:
    part = {"kind": "decoder", "width": 32, "depth": 1, "head_dim": 8, "block": {"mixer": {"kind": "differential"}}}
    subject = open_subject(parse_part("model", part).build(256, 64, 0))
    (usage,) = frequency_usage(subject, rows())
    assert usage.q_um.shape[0] == 2 * usage.mass_oh.shape[1]
    torch.testing.assert_close(usage.mass_oh, own_masses(subject)[0])


def own_masses(subject: Subject) -> list[torch.Tensor]:
    """Masses [o, h] of every layer's own maps, mean over `rows`."""
    found = []
    subject.visit(rows(), lambda layer, seen: found.append(_masses(seen.weights_bhts).mean(0).T), weights=True)
    return found


@pytest.mark.parametrize(
    ("family", "asked"),
    [("Llama", []), ("Mistral", []), ("Cohere", []), ("Gemma2", [0, 1]), ("GptOss", [0, 1])],
)
def test_masses_are_those_of_the_models_own_maps(
    family: str, asked: list[int], family_subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped keys, windows and interleaved channels are computed again; a cap on the scores and sinks need the maps."""
    capped = open_subject(tiny_model("Gemma2", attn_logit_softcapping=1.0)) if family == "Gemma2" else None
    subject = capped or family_subject(family)
    tokens_bt = rows() % 48
    expected: list[torch.Tensor] = []
    subject.visit(tokens_bt, lambda layer, seen: expected.append(_masses(seen.weights_bhts).mean(0).T), weights=True)
    visit, maps = subject.visit, []

    def watched(*given: Any, weights: bool = False, layers: Any) -> None:
        maps.extend(layers if weights else [])
        visit(*given, weights=weights, layers=layers)

    monkeypatch.setattr(subject, "visit", watched)
    for usage, mass_oh in zip(frequency_usage(subject, tokens_bt), expected, strict=True):
        torch.testing.assert_close(usage.mass_oh, mass_oh, atol=1e-6, rtol=0)
    assert maps == asked


def test_a_model_with_learned_positions_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    subject = open_subject(transformers.GPT2LMHeadModel(config))
    with pytest.raises(ConfigError, match=r"no rotary module found; found learned positions \(transformer.wpe\)"):
        frequency_usage(subject, rows())


def test_a_decoder_without_positions_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rotary module found; found position kind none"):
        frequency_usage(open_subject(decoder("none")), rows())


def test_short_texts_are_refused_with_numbers() -> None:
    subject = open_subject(llama(), tokenizer=ByteTokenizer())
    with pytest.raises(DataError, match="needs 64 tokens"):
        rope_usage_finding(subject, ["too short"], length=64)
