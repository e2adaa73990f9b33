"""Every family: what a subject shows and does is what the model computes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, half_order_of, tiny_model
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.adapters.gains import head_gain
from torchstone.diagnose.subject import Activations, AttentionLayer, Subject
from torchstone.errors import ConfigError, DataError

Subjects = Callable[[str], Subject]
families = pytest.mark.parametrize("family", FAMILIES)


def looked(subject: Subject, tokens_bt: Tensor, **options: Any) -> list[tuple[AttentionLayer, Activations]]:
    """All that a visit shows."""
    seen: list[tuple[AttentionLayer, Activations]] = []
    subject.visit(tokens_bt, lambda layer, activations: seen.append((layer, activations)), **options)
    return seen


def module_runs(subject: Subject, tokens_bt: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Inputs and outputs of all attention modules under the model's own attention, and its logits."""
    inputs, outputs = [], []
    handles = []
    for layer in subject.layers:
        module = subject.model.get_submodule(layer.name)
        before = lambda m, a, k: inputs.append(a[0] if a else k["hidden_states"])  # noqa: E731
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda m, a, y: outputs.append(y[0])))
    with torch.no_grad():
        logits_btv = subject.logits(tokens_bt)
    for handle in handles:
        handle.remove()
    return inputs, outputs, logits_btv


def own_weights(subject: Subject, tokens_bt: Tensor) -> list[Tensor]:
    """Attention maps of a copy of the model in transformers' eager mode."""
    model = copy.deepcopy(subject.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return list(model(input_ids=tokens_bt, output_attentions=True, use_cache=False).attentions)


@families
def test_visits_leave_the_logits_as_they_are_under_eager_and_fused_attention(
    family: str, family_subject: Subjects, tokens_bt: Tensor
) -> None:
    subject = family_subject(family)
    own = subject.model.config._attn_implementation
    before = subject.logits(tokens_bt)
    eager = copy.deepcopy(subject.model)
    eager.set_attn_implementation("eager")
    torch.testing.assert_close(eager(input_ids=tokens_bt).logits, before, rtol=1e-5, atol=1e-5)
    for weights in (False, True):
        looked(subject, tokens_bt, weights=weights)
    with subject.ablate([], "zero"):  # through the interface, nothing changed
        torch.testing.assert_close(subject.logits(tokens_bt), before, rtol=1e-5, atol=1e-5)
    assert subject.model.config._attn_implementation == own
    torch.testing.assert_close(subject.logits(tokens_bt), before, rtol=0, atol=0)


@families
def test_recorded_queries_keys_and_values_give_the_models_own_maps(
    family: str, family_subject: Subjects, tokens_bt: Tensor
) -> None:
    subject = family_subject(family)
    seen, maps = looked(subject, tokens_bt, weights=True), own_weights(subject, tokens_bt)
    assert [layer.index for layer, _ in seen] == list(range(len(subject.layers)))
    for (layer, activations), map_bhts in zip(seen, maps, strict=True):
        assert activations.weights_bhts is not None
        torch.testing.assert_close(activations.weights_bhts, map_bhts.float(), rtol=1e-5, atol=1e-6)
        if family not in ("Gemma2", "GptOss"):  # a cap, and sinks
            scores = activations.scale * activations.q_bhtd @ activations.k_bhsd.mT
            scores = scores.masked_fill(map_bhts == 0, -torch.inf)
            torch.testing.assert_close(scores.softmax(-1), activations.weights_bhts, rtol=1e-4, atol=1e-6)
        heads_bthe = (activations.weights_bhts @ activations.v_bhse).transpose(1, 2)
        torch.testing.assert_close(heads_bthe, activations.heads_bthe, rtol=1e-5, atol=1e-6)
        if layer.window is not None:
            distance = torch.arange(20)[:, None] - torch.arange(20)
            assert (
                not map_bhts[:, :, distance >= layer.window].any()
                and map_bhts[:, :, distance == layer.window - 1].all()
            )
    assert {layer.window for layer in subject.layers} == {
        "Mistral": {6}, "Gemma2": {6, None}, "Gemma3": {6, None}, "GptOss": {6, None}
    }.get(family, {None})  # fmt: skip


@families
def test_heads_through_the_output_projection_are_the_modules_output(
    family: str, family_subject: Subjects, tokens_bt: Tensor
) -> None:
    subject = family_subject(family)
    _, outputs, _ = module_runs(subject, tokens_bt)
    for weights in (False, True):
        for (layer, activations), output_btw in zip(looked(subject, tokens_bt, weights=weights), outputs, strict=True):
            projection = layer.projection("o")
            assert dict(subject.model.named_parameters())[projection.parameter] is projection.module.weight
            bias = getattr(projection.module, "bias", None)
            through = F.linear(activations.heads_bthe.flatten(2), projection.weight(), bias)
            torch.testing.assert_close(through, output_btw, rtol=1e-5, atol=1e-5)
            by_head = torch.einsum("hwe,bthe->btw", layer.weights().o_hwe, activations.heads_bthe.double())
            expected = output_btw.double() if bias is None else output_btw.double() - bias.double()
            torch.testing.assert_close(by_head, expected, rtol=1e-5, atol=1e-5)


@families
def test_values_are_the_projection_of_the_layers_input(
    family: str, family_subject: Subjects, tokens_bt: Tensor
) -> None:
    subject = family_subject(family)
    inputs, _, _ = module_runs(subject, tokens_bt)
    for (layer, activations), x_btw in zip(looked(subject, tokens_bt), inputs, strict=True):
        assert activations.v_bhse.shape[1] == layer.heads
        projection = layer.projection("v")
        bias = getattr(projection.module, "bias", None)
        if bias is not None and projection.rows is not None:
            bias = bias[projection.rows]
        v_bsge = F.linear(x_btw, projection.weight(), bias).unflatten(-1, (layer.kv_heads, layer.value_dim))
        for head in range(layer.heads):
            expected = v_bsge[:, :, layer.kv_of(head)]
            torch.testing.assert_close(activations.v_bhse[:, head], expected, rtol=1e-5, atol=1e-5)


@families
def test_head_weights_hold_the_gains_around_them(family: str, family_subject: Subjects, tokens_bt: Tensor) -> None:
    """At the first position, rows with gains times the layer's input without gains are the recorded vectors."""
    subject = family_subject(family)
    normed = {"Qwen3", "Gemma3", "Olmo2", "Cohere"}
    inputs, _, _ = module_runs(subject, tokens_bt)
    for (layer, activations), x_btw in zip(looked(subject, tokens_bt), inputs, strict=True):
        weights = layer.weights()
        assert weights.normalised_qk == (family in normed)
        assert weights.q_hdw.dtype == torch.float64 and weights.q_hdw.shape == (
            layer.heads,
            layer.head_dim,
            subject.width,
        )
        assert weights.k_gdw.shape == (layer.kv_heads, layer.head_dim, subject.width)
        norm = layer.facts.projections["q"].norm
        assert (norm is None) == (family in ("Olmo2",))
        gain_w = torch.ones(subject.width) if norm is None else _gain(family, norm.weight)
        bare_bw = (x_btw[:, 0] / gain_w).double()
        groups = slice(None, None, layer.heads // layer.kv_heads)
        records = {
            "q": (weights.q_hdw, activations.q_bhtd[:, :, 0]),
            "k": (weights.k_gdw, activations.k_bhsd[:, groups, 0]),
            "v": (weights.v_gew, activations.v_bhse[:, groups, 0]),
        }
        for name, (rows_hdw, recorded_bhd) in records.items():
            if family == "Cohere" and name != "v":
                continue  # its norm on queries and keys also takes away a mean
            got_bhd = torch.einsum("hdw,bw->bhd", rows_hdw, bare_bw) + _bias(layer, name, family)
            expected_bhd = recorded_bhd.double()
            if family in normed and name != "v":
                dims = (1, 2) if family == "Olmo2" else (2,)
                got_bhd, expected_bhd = (y / y.norm(dim=dims, keepdim=True) for y in (got_bhd, expected_bhd))
            torch.testing.assert_close(got_bhd, expected_bhd, rtol=1e-4, atol=1e-4)


def _bias(layer: AttentionLayer, name: str, family: str) -> Tensor | float:
    """The bias of a projection by head, as it reaches the recorded vectors."""
    projection = layer.projection(name)
    bias = getattr(projection.module, "bias", None)
    if bias is None:
        return 0.0
    bias = bias.detach().double()
    bias = bias if projection.rows is None else bias[projection.rows]
    bias_hd = bias.unflatten(0, (layer.heads if name == "q" else layer.kv_heads, -1))
    if name == "v":
        return bias_hd
    stretch = 1 + 0.1 * math.log(32)  # YaRN's factor on queries and keys
    factor = {("OPT", "q"): 8**-0.5, ("GptOss", "q"): stretch, ("GptOss", "k"): stretch}.get((family, name), 1.0)
    return factor * bias_hd[:, half_order_of(family, layer.head_dim)]


def test_rows_of_interleaved_heads_and_their_gains_are_put_in_half_order(family_subject: Subjects) -> None:
    layer = family_subject("Cohere").layers[0]
    module, order = layer.facts.module, half_order_of("Cohere", 8)
    rows_hdw = (
        module.q_proj.weight.detach().double().unflatten(0, (4, 8)) * module.q_norm.weight.detach().double()[..., None]
    )
    expected = rows_hdw[:, order] * layer.facts.projections["q"].norm.weight.detach().double()
    torch.testing.assert_close(layer.weights().q_hdw, expected, rtol=0, atol=0)


def _gain(family: str, weight: Tensor) -> Tensor:
    return 1 + weight.detach() if family.startswith("Gemma") else weight.detach()


def test_gains_are_exact_for_every_convention() -> None:
    for family, gain in (("Qwen3", lambda w: w), ("Gemma3", lambda w: 1 + w)):
        norm = tiny_model(family).model.layers[0].self_attn.q_norm
        dim = norm.weight.shape[0]
        expected = gain(norm.weight.detach()).double().expand(4, dim)
        torch.testing.assert_close(head_gain(norm, 4, dim), expected, rtol=0, atol=0)
    norm = tiny_model("Cohere").model.layers[0].self_attn.q_norm
    torch.testing.assert_close(head_gain(norm, 4, 8), norm.weight.detach().double(), rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"weight of shape \[4, 8\] for 2 heads"):
        head_gain(norm, 2, 8)


@families
def test_zero_ablation_of_all_heads_takes_attention_away(
    family: str, family_subject: Subjects, tokens_bt: Tensor
) -> None:
    subject = family_subject(family)
    before = subject.logits(tokens_bt)

    def no_heads(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.zeros_like(inputs[0]), *inputs[1:])

    handles = [layer.projection("o").module.register_forward_pre_hook(no_heads) for layer in subject.layers]
    without = subject.logits(tokens_bt)
    for handle in handles:
        handle.remove()
    every = [(layer.index, head) for layer in subject.layers for head in range(layer.heads)]
    with subject.ablate(every, "zero"):
        torch.testing.assert_close(subject.logits(tokens_bt), without, rtol=1e-5, atol=1e-5)
        assert all(not a.heads_bthe.any() for _, a in looked(subject, tokens_bt))
    assert not torch.allclose(before, without, atol=1e-3)
    torch.testing.assert_close(subject.logits(tokens_bt), before, rtol=0, atol=0)


@families
@pytest.mark.parametrize("mode", ["mean", "window"])
def test_ablated_heads_are_those_computed_by_hand(
    family: str, mode: Any, family_subject: Subjects, tokens_bt: Tensor
) -> None:
    subject = family_subject(family)
    options = {"window": 3} if mode == "window" else {}
    (layer, plain), *_ = looked(subject, tokens_bt, weights=True)
    with subject.ablate([(0, 1), (0, 3)], mode, **options):
        (_, ablated), *_ = looked(subject, tokens_bt)
        (_, with_maps), *_ = looked(subject, tokens_bt, weights=True)
    torch.testing.assert_close(ablated.heads_bthe, with_maps.heads_bthe, rtol=1e-5, atol=1e-6)
    expected = plain.heads_bthe.clone()
    assert plain.weights_bhts is not None and with_maps.weights_bhts is not None
    for head in (1, 3):
        if mode == "mean":
            expected[:, :, head] = plain.heads_bthe[:, :, head].mean((0, 1))
        elif family != "GptOss":  # sinks keep their share of the softmax
            distance = torch.arange(20)[:, None] - torch.arange(20)
            near_bts = plain.weights_bhts[:, head].masked_fill(distance >= 3, 0)
            near_bts = near_bts / near_bts.sum(-1, keepdim=True)
            expected[:, :, head] = near_bts @ plain.v_bhse[:, head]
            torch.testing.assert_close(with_maps.weights_bhts[:, head], near_bts, rtol=1e-4, atol=1e-6)
        else:
            expected[:, :, head] = ablated.heads_bthe[:, :, head]
            assert not with_maps.weights_bhts[:, head, 10, :8].any()
    torch.testing.assert_close(ablated.heads_bthe, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ablated.heads_bthe, plain.heads_bthe, atol=1e-4)


@families
def test_hidden_states_end_where_the_head_begins(family: str, family_subject: Subjects, tokens_bt: Tensor) -> None:
    subject = family_subject(family)
    states, logits = subject.hidden_states(tokens_bt), subject.logits(tokens_bt)
    assert len(states) == 4 and all(state.shape == (2, 20, 32) for state in states)
    final = states[-1] @ subject.head_weight().T
    if family == "Phi":
        final = final + subject.model.lm_head.bias
    final = {"Gemma2": lambda x: 30 * (x / 30).tanh(), "Granite": lambda x: x / 2, "Cohere": lambda x: x * 0.0625}.get(
        family, lambda x: x
    )(final)
    torch.testing.assert_close(final, logits, rtol=1e-4, atol=1e-4)
    inputs, _, _ = module_runs(subject, tokens_bt)
    if family == "Olmo2":  # no norm before attention: what it reads is the stream itself
        torch.testing.assert_close(inputs[0], states[0]), torch.testing.assert_close(inputs[1], states[1])


@families
def test_losses_are_cross_entropies(family: str, family_subject: Subjects, tokens_bt: Tensor, monkeypatch: Any) -> None:
    subject = family_subject(family)
    assert not subject._whole_head
    expected = F.cross_entropy(subject.logits(tokens_bt)[:, :-1].mT, tokens_bt[:, 1:], reduction="none")
    monkeypatch.setattr("torchstone.diagnose.adapters.losses.CHUNK_LOGITS", 48 * 7)  # chunks of 7 tokens
    torch.testing.assert_close(subject.losses(tokens_bt), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(subject.losses(tokens_bt, last=5), expected[:, -5:], rtol=1e-4, atol=1e-5)
    for last in (0, 20):
        with pytest.raises(ConfigError, match="have 1 to 19"):
            subject.losses(tokens_bt, last=last)


@families
def test_untrained_models_are_fresh_and_repeatable(family: str, family_subject: Subjects, tokens_bt: Tensor) -> None:
    subject = family_subject(family)
    state = torch.random.get_rng_state()
    one, same, other = subject.untrained(1), subject.untrained(1), subject.untrained(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.architecture == subject.architecture and "untrained" in one.name
    trained, *fresh = (s.layers[0].projection("o").weight() for s in (subject, one, same, other))
    assert (
        torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2]) and not torch.equal(fresh[0], trained)
    )
    assert one.logits(tokens_bt).isfinite().all()
    assert one.tied == subject.tied


def test_losses_fall_back_on_whole_logits_for_heads_of_unknown_form(tokens_bt: Tensor) -> None:
    class Doubled(LlamaForCausalLM):
        def forward(self, *inputs: Any, **settings: Any) -> Any:
            output = super().forward(*inputs, **settings)
            output.logits = 2 * output.logits
            return output

    subject = open_subject(Doubled(tiny_model("Llama").config))
    assert subject._whole_head
    expected = F.cross_entropy(subject.logits(tokens_bt)[:, :-1].mT, tokens_bt[:, 1:], reduction="none")
    torch.testing.assert_close(subject.losses(tokens_bt), expected)
    torch.testing.assert_close(subject.losses(tokens_bt, last=3), expected[:, -3:])


@pytest.mark.parametrize("whole", [False, True])
def test_losses_that_are_not_finite_are_reported_with_their_place(whole: bool) -> None:
    tokens = torch.tensor([[3, 4, 5, 6], [3, 7, 5, 6]])
    model = tiny_model("Llama")
    subject = open_subject(model)
    subject._whole_head = whole
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    with pytest.raises(DataError, match=r"loss of nan at token 1 of row 1 .* embedding \(token 1 of row 1\)"):
        subject.losses(tokens)
    assert subject.losses(tokens[:1]).isfinite().all()
    with torch.no_grad():
        model.lm_head.weight[9, 0] = torch.nan
    with pytest.raises(DataError, match="at token 1 of row 0 .* the output of the output head"):
        subject.losses(tokens[:1])


def test_only_the_layers_asked_for_are_shown(family_subject: Subjects, tokens_bt: Tensor) -> None:
    seen = looked(family_subject("Llama"), tokens_bt, layers={1})
    assert [layer.index for layer, _ in seen] == [1] and seen[0][1].weights_bhts is None
    assert all(not tensor.requires_grad for tensor in (seen[0][1].q_bhtd, seen[0][1].heads_bthe))


def test_layers_that_do_not_exist_are_refused(family_subject: Subjects, tokens_bt: Tensor) -> None:
    with pytest.raises(ConfigError, match="layer 2 does not exist; attention layers are 0 to 1"):
        looked(family_subject("Llama"), tokens_bt, layers={1, 2})


def test_looking_may_run_the_model_again(family_subject: Subjects, tokens_bt: Tensor) -> None:
    subject = family_subject("Llama")
    losses: list[Tensor] = []
    subject.visit(tokens_bt, lambda layer, activations: losses.append(subject.losses(tokens_bt)))
    torch.testing.assert_close(losses, [subject.losses(tokens_bt)] * 2, rtol=1e-5, atol=1e-5)


def test_a_fused_attention_that_leaves_out_the_cap_gives_way_to_eager(tokens_bt: Tensor) -> None:
    model = tiny_model("Gemma2")
    model.set_attn_implementation("eager")
    eager = model(input_ids=tokens_bt).logits
    model.config._attn_implementation = "sdpa"  # as older versions of transformers choose; it knows no cap
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *inputs, softcap=None, **settings: plain(*inputs, **settings)
    try:
        assert not torch.allclose(model(input_ids=tokens_bt).logits, eager, atol=1e-4)
        subject = open_subject(model)
        torch.testing.assert_close(subject.logits(tokens_bt), eager)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_logits_are_differentiable_under_ablation(family_subject: Subjects, tokens_bt: Tensor) -> None:
    subject = family_subject("Llama")
    weight = subject.layers[0].projection("q").module.weight
    with subject.ablate([(0, 0)], "window", window=2):
        (gradient,) = torch.autograd.grad(subject.logits(tokens_bt).sum(), weight)
    assert gradient.any() and gradient.isfinite().all()


def test_ablations_nest_and_end_on_errors(family_subject: Subjects, tokens_bt: Tensor) -> None:
    subject = family_subject("Gemma2")
    before = subject.logits(tokens_bt)
    with subject.ablate([(0, 1), (1, 2)], "zero"):
        both = subject.logits(tokens_bt)
    with subject.ablate([(0, 1)], "zero"), subject.ablate([(1, 2)], "zero"):
        torch.testing.assert_close(subject.logits(tokens_bt), both, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="stop"), subject.ablate([(0, 1)], "mean"):

        def stop(layer: AttentionLayer, activations: Activations) -> None:
            raise RuntimeError("stop")

        subject.visit(tokens_bt, stop)
    assert subject.model.config._attn_implementation == "eager"
    torch.testing.assert_close(subject.logits(tokens_bt), before, rtol=0, atol=0)
    assert not subject._ablations and not subject._recorders and not subject._seam._receivers


def test_two_subjects_can_be_open_at_once(family_subject: Subjects, tokens_bt: Tensor) -> None:
    one, two = family_subject("Llama"), family_subject("Qwen3")
    expected = two.logits(tokens_bt)
    seen = []
    with one.ablate([(0, 0)], "zero"):
        one.visit(tokens_bt, lambda layer, activations: seen.append(two.losses(tokens_bt).sum()))
        torch.testing.assert_close(two.logits(tokens_bt), expected, rtol=0, atol=0)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("heads", "mode", "window", "message"),
    [
        ([(0, 4)], "zero", None, r"head \(0, 4\) does not exist; layers are 0 to 1 and heads 0 to 3"),
        ([(2, 0)], "zero", None, r"head \(2, 0\) does not exist"),
        ([(-1, 0)], "zero", None, r"head \(-1, 0\) does not exist"),
        ([(0, 0)], "median", None, "choose one of mean, zero, window"),
        ([(0, 0)], "window", None, "needs `window`"),
        ([(0, 0)], "zero", 3, "has no `window`"),
        ([(0, 0)], "window", 0, "at least 1 token"),
    ],
)
def test_bad_ablations_are_refused(
    heads: Any, mode: Any, window: int | None, message: str, family_subject: Subjects, tokens_bt: Tensor
) -> None:
    with pytest.raises(ConfigError, match=message), family_subject("Llama").ablate(heads, mode, window=window):
        pass


@pytest.mark.parametrize("part", ["q_proj", "v_proj"])
def test_activations_that_are_not_finite_are_reported_with_their_place(part: str, tokens_bt: Tensor) -> None:
    model = tiny_model("Llama")
    token = 47
    tokens_bt = tokens_bt.clamp(max=46)
    tokens_bt[1, 13] = token
    model.model.embed_tokens.weight.data[token] = torch.inf
    with pytest.raises(DataError, match=r"layer 0 \(model.layers.0.self_attn\) .*first at token 13 of row 1"):
        open_subject(model).visit(tokens_bt, lambda layer, activations: None)
    model = tiny_model("Llama")
    getattr(model.model.layers[1].self_attn, part).weight.data[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"layer 1 .*first at token 0 of row 0, head 0"):
        open_subject(model).visit(tokens_bt, lambda layer, activations: None)


def test_quantised_weights_are_refused_where_they_are_needed(tokens_bt: Tensor) -> None:
    class Int8Linear(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.scale = float(linear.weight.detach().abs().max()) / 127
            weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype) * self.scale)

    model = tiny_model("Llama")
    model.model.layers[0].self_attn.k_proj = Int8Linear(model.model.layers[0].self_attn.k_proj)
    model.lm_head = Int8Linear(model.lm_head)
    subject = open_subject(model)
    assert len(looked(subject, tokens_bt)) == 2 and subject.layers[0].projection("k") and subject.layers[1].weights()
    with pytest.raises(ConfigError, match="k_proj.weight is quantised"):
        subject.layers[0].weights()
    with pytest.raises(ConfigError, match="output matrix of .* is quantised"):
        subject.head_weight()
