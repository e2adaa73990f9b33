"""Ranks of attention products: the thin route is exact, on every layout of heads and of fused weights."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from torch import Tensor

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.ranks.attention_rank import attention_rank, attention_rank_finding, attention_spectra
from torchstone.diagnose.ranks.decoder_rank import rank_metrics
from torchstone.diagnose.ranks.head_products import HeadProducts, balance, rotate
from torchstone.diagnose.ranks.layer_products import layer_products
from torchstone.diagnose.ranks.truncation import truncated, truncation_losses
from torchstone.diagnose.spectra import spectral_metrics
from torchstone.errors import ConfigError, DataError
from torchstone.recipe.registry import parse_part

FAMILIES = ("Llama", "Qwen3", "GPTNeoX", "GPT2", "Phi3")
MIXERS = {
    "plain": {"kind": "attention", "kv_heads": 2},
    "normed": {"kind": "attention", "qk_norm": True, "output_norm": True},
    "diff v1": {"kind": "differential"},
    "diff v1 grouped": {"kind": "differential", "heads": 4, "kv_heads": 2, "head_dim": 4},
    "diff v2": {"kind": "differential", "version": "v2", "kv_heads": 2},
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoder(mixer: str = "plain"):
    settings = {"kind": "decoder", "width": 32, "depth": 2, "head_dim": 8, "block": {"mixer": MIXERS[mixer]}}
    model = parse_part("model", settings).build(24, 16, 0)
    for name, value in model.named_parameters():
        if value.dim() == 1:
            value.data += 0.3 * random(*value.shape, seed=len(name)).float()
    return model


# Products of heads --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 2, 5, 20), (4, 4, 8, 8), (3, 1, 7, 7), (2, 1, 8, 5)], ids=str)
def test_the_thin_route_gives_the_singular_values_of_the_full_product(shape):
    heads, groups, size, width = shape
    shared, own = random(groups, size, width), random(heads, size, width, seed=1)
    full = shared.repeat_interleave(heads // groups, 0).mT @ own
    kept = min(size, width)
    thin = HeadProducts(shared, own).singular_values()
    torch.testing.assert_close(thin, torch.linalg.svdvals(full)[:, :kept], rtol=0, atol=1e-12 * float(full.norm()))


def test_a_rotation_stands_between_the_factors():
    shared, own, frequencies = random(2, 6, 15), random(4, 6, 15, seed=1), torch.tensor([1.0, 0.1, 0.0])
    products = HeadProducts(shared, own)
    for delta in (1, 8, 64):
        angle = delta * frequencies.double()
        turn = torch.zeros(6, 6, dtype=torch.float64)
        for pair in range(3):
            cos, sin = angle[pair].cos(), angle[pair].sin()
            turn[pair, pair] = turn[pair + 3, pair + 3] = cos
            turn[pair, pair + 3], turn[pair + 3, pair] = -sin, sin
        full = shared.repeat_interleave(2, 0).mT @ turn @ own
        torch.testing.assert_close(
            products.singular_values(delta, frequencies), torch.linalg.svdvals(full)[:, :6], rtol=0, atol=1e-12
        )
    back = rotate(rotate(own, 5, frequencies), -5, frequencies)
    torch.testing.assert_close(back, own, rtol=0, atol=1e-12)


def test_a_planted_low_rank_head_is_found():
    shared, own = random(1, 8, 30), random(3, 8, 30, seed=1)
    own[1] = random(8, 2, seed=2) @ random(2, 30, seed=3)
    ranks = spectral_metrics(HeadProducts(shared, own).singular_values())["numeric_rank"]
    assert ranks.tolist() == [8, 2, 8]


def test_the_cut_product_is_the_nearest_of_its_rank():
    shared, own = random(2, 6, 15), random(4, 6, 15, seed=1)
    products = HeadProducts(shared, own)
    values = products.singular_values()
    cut = products.truncated_own(2)
    error = shared.repeat_interleave(2, 0).mT @ (cut - own)
    distance = torch.linalg.matrix_norm(error)
    torch.testing.assert_close(distance, values[:, 2:].square().sum(-1).sqrt(), rtol=1e-10, atol=0)
    assert HeadProducts(shared, cut).singular_values()[:, 2:].max() < 1e-12


def test_balance_of_a_stack_is_that_of_the_stacked_factors():
    shared, own = random(2, 5, 12), random(6, 5, 12, seed=1)
    found = balance(shared, own)
    for group in range(2):
        stack = torch.cat(list(own[3 * group : 3 * group + 3]), dim=1)
        product = shared[group].mT @ stack
        half = 0.5 * float(shared[group].square().sum() + stack.square().sum())
        assert float(found.half_frobenius[group]) == pytest.approx(half, rel=1e-12)
        assert float(found.nuclear[group]) == pytest.approx(float(torch.linalg.svdvals(product).sum()), rel=1e-9)
        difference = shared[group] @ shared[group].mT - stack @ stack.mT
        assert float(found.imbalance[group]) == pytest.approx(float(difference.norm()), rel=1e-12)
        assert float(found.ratio[group]) >= 1


def test_balanced_factors_have_ratio_one_and_no_imbalance():
    left, values, right = torch.linalg.svd(random(9, 9))
    root = values.sqrt().diag()
    found = balance((left @ root).mT.unsqueeze(0), (root @ right).unsqueeze(0))
    assert float(found.ratio) == pytest.approx(1, abs=1e-9)
    assert float(found.imbalance) < 1e-12


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hugging_face_model_gives_the_products_of_its_matrices(family_subject, family):
    subject = family_subject(family)
    found = attention_spectra(subject)
    assert [(s.layer, s.product) for s in found] == [(i, p) for i in range(len(subject.layers)) for p in ("QK", "OV")]
    for layer, qk, ov in zip(subject.layers, found[::2], found[1::2], strict=True):
        weights = layer.weights()
        for head in range(layer.heads):
            kv = layer.kv_of(head)
            full = torch.linalg.svdvals(weights.k_gdw[kv].mT @ weights.q_hdw[head])[: layer.head_dim]
            torch.testing.assert_close(qk.values_chn[0, head], full, rtol=1e-9, atol=1e-12)
            full = torch.linalg.svdvals(weights.o_hwe[head] @ weights.v_gew[kv])[: layer.value_dim]
            torch.testing.assert_close(ov.values_chn[0, head], full, rtol=1e-9, atol=1e-12)


def test_fused_and_separate_projections_give_the_same_numbers():
    separate = tiny_model("Llama", num_key_value_heads=4)
    fused = tiny_model("Phi3", num_key_value_heads=4)
    for ours, theirs in zip(fused.model.layers, separate.model.layers, strict=True):
        parts = [getattr(theirs.self_attn, f"{name}_proj").weight.data for name in "qkv"]
        ours.self_attn.qkv_proj.weight.data = torch.cat(parts)
        ours.self_attn.o_proj.weight.data = theirs.self_attn.o_proj.weight.data
        ours.input_layernorm.weight.data = theirs.input_layernorm.weight.data
    tables = [attention_rank(open_subject(model)) for model in (fused, separate)]
    assert tables[0].rows == tables[1].rows


def test_gains_of_norms_are_multiplied_in():
    model = decoder("normed")
    before = attention_spectra(open_subject(model))
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        mixer.q_norm.gain *= 2
        mixer.k_norm.gain[1:] = 0
    qk, ov = attention_spectra(open_subject(model))[:2]
    assert (spectral_metrics(qk.values_chn[0])["numeric_rank"] == 1).all()
    assert torch.equal(ov.values_chn, before[1].values_chn)
    assert qk.balance is None and ov.balance is not None


def test_balance_is_of_the_weights_that_decay_acts_on():
    model = decoder("plain")
    before = attention_spectra(open_subject(model))[0]
    with torch.no_grad():
        model.blocks[0].mixer_norm.gain *= 3
    after = attention_spectra(open_subject(model))[0]
    torch.testing.assert_close(after.values_chn, 9 * before.values_chn)
    assert torch.equal(after.balance.ratio, before.balance.ratio)


def test_offsets_turn_the_product_as_the_model_does():
    """At an offset the product, applied to two inputs, is the model's own score of them."""
    model = decoder("plain")
    subject = open_subject(model)
    layer = subject.layers[0]
    weights = layer.weights()
    delta = 5
    tokens = torch.randint(0, 24, (1, 8), generator=torch.Generator().manual_seed(1))
    seen = {}
    subject.visit(tokens, lambda layer, activations: seen.setdefault(layer.index, activations))
    states = subject.hidden_states(tokens)[0][0].double()
    normed = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for head in range(layer.heads):
        turned = rotate(weights.q_hdw[head] @ normed[7].unsqueeze(1), delta, layer.rotation.frequencies_m)
        ours = (weights.k_gdw[layer.kv_of(head)] @ normed[7 - delta]) @ turned[:, 0]
        theirs = seen[0].q_bhtd[0, head, 7] @ seen[0].k_bhsd[0, head, 7 - delta]
        assert float(ours) == pytest.approx(float(theirs), rel=1e-3, abs=1e-4)


def test_numbers_at_several_offsets_are_means():
    subject = open_subject(decoder("plain"))
    apart = [attention_rank(subject, rope_delta=[delta]) for delta in (0, 1, 8)]
    together = attention_rank(subject, rope_delta=[0, 1, 8])
    column = together.columns.index("effective rank")
    for row, *rows in zip(together.rows, *(table.rows for table in apart), strict=True):
        assert row[column] == pytest.approx(sum(r[column] for r in rows) / 3, abs=1e-4)
    assert apart[0].rows != apart[1].rows


def test_the_table_has_a_row_for_every_head_and_product():
    table = attention_rank(open_subject(decoder("plain")), f=0.5)
    assert [row[:3] for row in table.rows[:8]] == [(0, h, p) for p in ("QK", "OV") for h in range(4)]
    assert len(table.rows) == 2 * 2 * 4
    assert "0.5 of their sum" in table.note
    ratio = table.columns.index("half Frobenius / nuclear")
    assert all(row[ratio] >= 1 for row in table.rows)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_gives_finite_means(mixer):
    model = decoder(mixer).train()
    found = rank_metrics(model)
    assert model.training
    assert {f"{name}_{product}" for name in ("effective_rank", "pseudo_rank") for product in ("qk", "ov")} <= set(found)
    assert all(1 <= value < 100 for value in found.values())
    assert ("half_frobenius_over_nuclear_qk" in found) == (mixer not in ("normed", "diff v1 grouped"))


def test_means_are_of_decoders_only():
    with pytest.raises(ConfigError, match="LlamaForCausalLM was given"):
        rank_metrics(tiny_model("Llama"))


def test_a_head_of_zeros_has_rank_zero_and_no_ratio():
    model = decoder("plain")
    with torch.no_grad():
        model.blocks[0].mixer.w_k.weight.zero_()
    table = attention_rank(open_subject(model))
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["effective rank"], row["pseudo rank"], row["numeric rank"]) == (0, 0, 0)
    assert row["half Frobenius / nuclear"] is None
    assert all(value < 100 for value in rank_metrics(model).values())


def test_finding_stands_next_to_its_controls():
    model = decoder("plain")
    with torch.no_grad():
        for block in model.blocks:
            weight = block.mixer.w_q.weight
            low = random(4, 8, 1, seed=5).float() @ random(4, 1, 32, seed=6).float()
            weight.copy_(0.2 * low.flatten(0, 1) + 0.02 * weight)
    found = attention_rank_finding(open_subject(model), rope_delta=[0, 4], seed=3)
    assert found == attention_rank_finding(open_subject(model), rope_delta=[0, 4], seed=3)
    heads, layers = found.tables
    columns = [
        layers.columns.index(name)
        for name in ("effective rank", "effective rank, untrained", "effective rank, permuted")
    ]
    for row in layers.rows:
        own, untrained, permuted = (row[column] for column in columns)
        if row[1] == "QK":
            assert own < 0.5 * untrained and own < 0.9 * permuted
        else:
            assert own == pytest.approx(untrained, rel=0.1)
    assert {(len(heat.y), len(heat.x)) for heat in found.heatmaps} == {(2, 4)}
    assert "untrained" in found.answer and "permuted" in found.answer and "δ = 0, 4" in found.notes[0]


# What cannot be done ------------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [[], [-1], [0.5]])
def test_offsets_that_are_no_distances_are_refused(offsets):
    with pytest.raises(ConfigError, match="rope_delta holds offsets"):
        attention_rank(open_subject(decoder()), rope_delta=offsets)


def test_weights_that_are_not_finite_are_named():
    model = decoder()
    model.blocks[1].mixer.w_v.weight.data[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"attention layer 1 \(blocks.1.mixer\)"):
        attention_rank(open_subject(model))


def test_quantised_weights_are_refused():
    model = tiny_model("Llama")
    subject = open_subject(model)
    module = model.model.layers[0].self_attn.q_proj
    module.weight = torch.nn.Parameter(module.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised"):
        attention_rank(subject)


# Cutting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "GPT2"])
def test_full_rank_changes_nothing_and_low_rank_does(family):
    subject = open_subject(tiny_model(family))
    before = {name: value.clone() for name, value in subject.model.named_parameters()}
    tokens = torch.randint(3, 48, (2, 16), generator=torch.Generator().manual_seed(0))
    plain = float(subject.losses(tokens).double().mean())
    size = subject.layers[0].head_dim
    losses = truncation_losses(subject, tokens, [1, size])
    assert losses[size] == pytest.approx(plain, rel=1e-4)
    assert losses[1] != pytest.approx(plain, rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.named_parameters())


def test_inside_the_block_every_product_has_the_rank():
    subject = open_subject(decoder("plain"))
    with truncated(subject, 2):
        for layer in subject.layers:
            ranks = spectral_metrics(layer_products(layer)[0].values_chn)["numeric_rank"]
            assert (ranks == 2).all()
    assert (spectral_metrics(layer_products(subject.layers[0])[0].values_chn)["numeric_rank"] == 8).all()


def test_weights_come_back_after_an_error():
    subject = open_subject(decoder("plain"))
    before = subject.layers[1].projection("q").weight().clone()
    with pytest.raises(RuntimeError), truncated(subject, 2):
        raise RuntimeError
    assert torch.equal(subject.layers[1].projection("q").weight(), before)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ConfigError, match="ranks go from 1 to 8"):
        truncation_losses(open_subject(decoder("plain")), torch.zeros(1, 4, dtype=torch.long), [rank])


def test_grouped_differential_attention_cannot_be_cut():
    with pytest.raises(ConfigError, match="order of its own"), truncated(open_subject(decoder("diff v1 grouped")), 2):
        pass
