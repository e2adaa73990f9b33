"""Projections: found by name, confirmed by what they put out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from torch import Tensor, nn

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.subject import Activations, AttentionLayer, Subject
from torchstone.errors import ConfigError

Subjects = Callable[[str], Subject]
FUSED = {"GPTNeoX": "query_key_value", "Phi3": "qkv_proj", "GPT2": "c_attn"}


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_reproduce_the_outputs_of_their_modules(
    family: str, family_subject: Subjects, tokens_bt: Tensor
) -> None:
    subject = family_subject(family)
    parameters = dict(subject.model.named_parameters())
    for layer in subject.layers:
        covered: list[int] = []
        for which in ("q", "k", "v", "o"):
            projection = layer.projection(which)
            assert parameters[projection.parameter] is projection.module.weight
            assert (projection.rows is not None) == (family in FUSED and which != "o")
            caught: list[tuple[Tensor, Tensor]] = []
            handle = projection.module.register_forward_hook(lambda m, a, y, c=caught: c.append((a[0], y)))
            subject.logits(tokens_bt)
            handle.remove()
            (x, y), *_ = caught
            weight = projection.weight()
            bias = getattr(projection.module, "bias", None)
            if projection.rows is not None:
                covered += projection.rows.tolist()
                y, bias = y[..., projection.rows], None if bias is None else bias[projection.rows]
            heads = layer.heads if which in ("q", "o") else layer.kv_heads
            assert weight.shape[1 if which == "o" else 0] == heads * layer.head_dim
            torch.testing.assert_close(nn.functional.linear(x, weight, bias), y, rtol=1e-5, atol=1e-5)
        if family in FUSED:
            assert sorted(covered) == list(range((layer.heads + 2 * layer.kv_heads) * layer.head_dim))


def test_queries_keys_and_values_of_fused_rows_are_told_apart(family_subject: Subjects) -> None:
    rows = family_subject("GPTNeoX").layers[0].projection("k").rows
    assert rows is not None and rows.tolist() == [24 * head + 8 + i for head in range(4) for i in range(8)]
    rows = family_subject("Phi3").layers[0].projection("k").rows
    assert rows is not None and rows.tolist() == list(range(32, 48))
    projection = family_subject("GPT2").layers[0].projection("v")
    assert projection.rows is not None and projection.rows.tolist() == list(range(64, 96)) and projection.transposed


def renamed(old: str, new: str) -> Any:
    """A Llama whose layers use another name for a projection."""
    model = tiny_model("Llama")
    for block in model.model.layers:
        module = getattr(block.self_attn, old)
        delattr(block.self_attn, old)
        setattr(block.self_attn, new, module)
        block.self_attn.__dict__[old] = module  # the code still finds it
    return model


def test_unknown_names_are_asked_for_and_then_used(tokens_bt: Tensor) -> None:
    model = renamed("q_proj", "asking")
    subject = open_subject(model)
    subject.visit(tokens_bt, lambda layer, activations: None)  # needs no names
    with pytest.raises(
        ConfigError, match=r"could not find the query projection in model.layers.0.self_attn .*asking.*names="
    ):
        subject.layers[0].weights()
    layer = open_subject(model, names={"q": "ask.*"}).layers[0]
    assert layer.projection("q").module is model.model.layers[0].self_attn.asking
    with pytest.raises(ConfigError, match="query projection .* was taken to be v_proj, whose output is not"):
        open_subject(model, names={"q": "v_proj"}).layers[0].projection("q")


def test_what_stands_between_projection_and_use_is_refused() -> None:
    for which, word in (("q_proj", "query"), ("v_proj", "value"), ("o_proj", "output")):
        model = tiny_model("Llama")
        module = getattr(model.model.layers[0].self_attn, which)
        adapter = torch.randn(module.out_features, module.in_features)
        module.register_forward_hook(lambda m, a, y, w=adapter: y + a[0] @ w.T)  # an adapter that is not merged
        with pytest.raises(ConfigError, match=f"the {word} projection .*unmerged adapters"):
            open_subject(model).layers[0].weights()
        assert open_subject(model).layers[1].weights()


def test_latent_attention_is_named() -> None:
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=40, moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
    )  # fmt: skip
    subject = open_subject(transformers.DeepseekV3ForCausalLM(config))
    seen: list[tuple[AttentionLayer, Activations]] = []
    subject.visit(torch.tensor([[5, 6, 7]]), lambda layer, activations: seen.append((layer, activations)))
    assert len(seen) == 1 and seen[0][1].heads_bthe.shape == (1, 3, 4, 8)
    with pytest.raises(ConfigError, match="factors its projections into .*kv_a_proj_with_mqa.*latent attention"):
        subject.layers[0].weights()


def test_norms_that_no_matrix_holds_are_named() -> None:
    model = tiny_model("Llama")
    attention = model.model.layers[0].self_attn
    attention.sub_norm = nn.RMSNorm(32)
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: (attention.sub_norm(inputs[0]),))
    with pytest.raises(ConfigError, match="has the norm sub_norm besides"):
        open_subject(model).layers[0].weights()
