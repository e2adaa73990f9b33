"""HGRN2 beyond what every mixer promises (test_mixers): its gates, bounds, states, errors, and what it remembers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from torchstone.errors import ConfigError, DependencyError
from torchstone.models.belief_state import BeliefStateConfig
from torchstone.models.counts import count
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.context import BuildContext
from torchstone.nn.initialisation import NormalConfig
from torchstone.nn.recurrence import gated_linear_fla, hgrn2
from torchstone.nn.recurrence.gated_linear import gated_linear_recurrence
from torchstone.nn.recurrence.hgrn2 import HGRN2, HGRN2Config, memories
from torchstone.nn.recurrence.lower_bounds import NAME, LowerBounds
from torchstone.nn.recurrence.state import RecurrentState
from torchstone.nn.span import Span
from torchstone.nn.state import DecoderState, KVCache

WIDTH, DEPTH = 12, 3


def mixer(layer: int = 1, gamma: Tensor | None = None, seed: int = 0, **settings: Any) -> HGRN2:
    """One mixer with random weights of size 0.5, in a model with these bounds."""
    draw = torch.Generator().manual_seed(seed)
    bounds = LowerBounds(DEPTH, WIDTH)
    with torch.no_grad():
        bounds.gamma.copy_(torch.randn(DEPTH, WIDTH, generator=draw) if gamma is None else gamma)
    context = BuildContext(WIDTH, 4, DEPTH, layer, 2, 16, shared=torch.nn.ModuleDict({NAME: bounds}))
    made = HGRN2Config.model_validate(settings).build(context)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5, generator=draw)
    return made


def decoder(seed: int = 0, width: int = WIDTH, **settings: Any) -> Decoder:
    config = {"width": width, "depth": DEPTH, "head_dim": 4, "block": {"mixer": {"kind": "hgrn2", **settings}}}
    config["initialisation"] = {"kind": "normal", "std": 0.3, "scale_residual": False}
    return DecoderConfig.model_validate(config).build(9, 16, seed)


class Created(TorchFunctionMode):
    """Types of tensors filled with a number, and whether numbers of the host were made a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.full: list[torch.dtype] = []
        self.copied = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.full:
            self.full.append(found.dtype)
        self.copied = self.copied or func in (torch.tensor, torch.as_tensor)
        return found


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The function -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(DEPTH))
@pytest.mark.parametrize("lower_bound", ["learned", "none", 0.25])
def test_gates_follow_the_formula(layer: int, lower_bound: Any) -> None:
    made, x_btd = mixer(layer, lower_bound=lower_bound), random(2, 5, WIDTH)
    _, _, k_btd, g_btd = made.gates(x_btd)
    beta_d = torch.zeros(WIDTH)
    if lower_bound == "learned" and layer > 0:
        beta_d = made._bounds[0].values()[layer]
    elif lower_bound == 0.25:
        beta_d = torch.full((WIDTH,), 0.25)
    f_btd = beta_d + (1 - beta_d) * made.w_f(x_btd).sigmoid()
    torch.testing.assert_close(g_btd.exp(), f_btd, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(k_btd, 1 - f_btd, atol=1e-6, rtol=1e-6)


def test_one_channel_per_head_is_the_recurrence_of_hgrn() -> None:
    made, x_btd = mixer(expand_ratio=1, qk_scale=1.0), random(2, 9, WIDTH)
    q_btd, i_btd, k_btd, g_btd = made.gates(x_btd)
    h_bd, found = torch.zeros(2, WIDTH), []
    for step in range(9):
        f_bd = g_btd[:, step].exp()
        h_bd = f_bd * h_bd + (1 - f_bd) * i_btd[:, step]
        found.append(q_btd[:, step] * h_bd)
    expected = made.w_o(made.norm(torch.stack(found, dim=1)))
    torch.testing.assert_close(made(x_btd, Span())[0], expected, atol=1e-5, rtol=1e-5)


def test_wider_heads_change_the_function_and_not_the_parameters() -> None:
    models = [decoder(expand_ratio=ratio) for ratio in (1, 3, 12)]
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in models]
    assert shapes[0] == shapes[1] == shapes[2]
    tokens_bt = torch.arange(8)[None]
    hidden = [model(tokens_bt).hidden_btd for model in models]
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3 and (hidden[1] - hidden[2]).abs().max() > 1e-3
    sizes = [model.blocks[0].mixer.new_state(1, 8, "cpu", torch.float32).tensors["s"].numel() for model in models]  # type: ignore
    assert sizes == [WIDTH * ratio for ratio in (1, 3, 12)]


@pytest.mark.parametrize("variant", ["lm", "unit"])
@pytest.mark.parametrize("push", [-60.0, 60.0])
def test_gradients_are_finite_where_gates_saturate(variant: str, push: float) -> None:
    """z of ±100 and more, and bounds that are 0 or 1 to the last digit, in every layer."""
    gamma = torch.zeros(DEPTH, WIDTH)
    gamma[0, :4], gamma[1, 4:8], gamma[2, 8:] = 150.0, 150.0, 150.0
    for layer in range(DEPTH):
        made = mixer(layer, gamma, variant=variant)
        x_btd = (push * random(2, 20, WIDTH)).requires_grad_()
        y_btd, _ = made(x_btd, Span())
        y_btd.pow(2).sum().backward()
        tensors = [x_btd, *made.parameters(), *(bounds.gamma for bounds in made._bounds)]
        assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors)


def test_the_key_keeps_its_digits_where_the_gate_is_almost_open() -> None:
    exact = torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    for lower_bound, rest in (("none", 1.0), (0.5, 0.5)):
        made = mixer(lower_bound=lower_bound)
        with torch.no_grad():
            made.w_f.weight.copy_(torch.eye(WIDTH))
            _, _, k_btd, g_btd = made.gates(torch.full((1, 1, WIDTH), 30.0))
        assert (k_btd.double() / (rest * exact) - 1).abs().max() < 1e-6
        assert (g_btd.double() + rest * exact).abs().max() < (1e-19 if lower_bound == "none" else 1e-7)


# State --------------------------------------------------------------------------------------------


@given(
    pieces=st.lists(st.integers(1, 12), min_size=1, max_size=5), mode=st.sampled_from(["auto", "chunk", "recurrent"])
)
def test_pieces_of_any_length_equal_the_whole(pieces: list[int], mode: str) -> None:
    length, made = sum(pieces), mixer(mode=mode, chunk_size=None if mode == "recurrent" else 8)
    x_btd = random(2, length, WIDTH)
    with torch.no_grad():
        whole, _ = made(x_btd, Span())
        state, parts = made.new_state(2, length, "cpu", torch.float32), []
        for piece in x_btd.split(pieces, dim=1):
            parts.append(made(piece, Span(), state)[0])
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert state.length == length and state.tensors["s"].dtype == torch.float32


def test_the_state_stays_fp32_in_half_precision() -> None:
    made = mixer().to(torch.bfloat16)
    state = made.new_state(1, 4, "cpu", torch.bfloat16)
    y_btd, _ = made(random(1, 4, WIDTH).bfloat16(), Span(), state)
    assert y_btd.dtype == torch.bfloat16 and state.tensors["s"].dtype == torch.float32
    assert state.nbytes() == 4 * WIDTH * 4 + 8  # and the document of the row


def test_states_of_other_shapes_are_refused() -> None:
    made, x_btd = mixer(), random(2, 3, WIDTH)
    wrong = {
        "rows": made.new_state(3, 9, "cpu", torch.float32),
        "heads": mixer(expand_ratio=6).new_state(2, 9, "cpu", torch.float32),
        "type": RecurrentState({"s": torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)}, 9),
        "mixer": RecurrentState({"h": torch.zeros(2, 3)}, 9),
        "family": KVCache(2, 9, (1, 4), (1, 4), None, "cpu", torch.float32),
    }
    for state in wrong.values():
        with pytest.raises(ConfigError, match=r"the state of hgrn2 is s \(2, 3, 4, 4\) in fp32 here"):
            made(x_btd, Span(), state)


def test_states_with_another_number_of_layers_are_refused() -> None:
    model, tokens_bt = decoder(), torch.arange(4)[None]
    layers = model.new_state(1, 9).layers
    for wrong in ([], layers[:2], [*layers, layers[0]]):
        with pytest.raises(ConfigError, match=f"of {len(wrong)} layers and there are 3 here"):
            model(tokens_bt, state=DecoderState(wrong))
    assert layers[0].length == 0


def test_no_rows_give_no_rows() -> None:
    model, tokens_bt = decoder(), torch.empty(0, 5, dtype=torch.long)
    assert model(tokens_bt).hidden_btd.shape == (0, 5, WIDTH)
    assert set(model.diagnostics()) == {f"layer0{layer}/lower bound" for layer in range(DEPTH)}
    assert model(tokens_bt, state=model.new_state(0, 9)).hidden_btd.shape == (0, 5, WIDTH)


@torch.no_grad()
def test_the_state_lets_the_prompt_go() -> None:
    model = decoder()
    state = model.new_state(1, 300)
    model(torch.randint(9, (1, 300)), state=state)
    held = [tensor.untyped_storage().nbytes() for layer in state.layers for tensor in layer.tensors.values()]
    assert sum(held) + 8 * DEPTH == state.nbytes()


# Bounds -------------------------------------------------------------------------------------------


def test_bounds_are_one_matrix_of_the_model() -> None:
    model = decoder()
    names = [name for name, _ in model.named_parameters() if "gamma" in name]
    assert names == [f"shared.{NAME}.gamma"]
    made = [block.mixer for block in model.blocks]
    assert made[1]._bounds[0] is made[2]._bounds[0] is getattr(model.shared, NAME) and made[0]._bounds == ()  # type: ignore
    torch.testing.assert_close(
        getattr(model.shared, NAME).values(), torch.arange(DEPTH)[:, None].expand(DEPTH, WIDTH) / DEPTH
    )
    other = copy.deepcopy(model)
    assert other.blocks[1].mixer._bounds[0] is getattr(other.shared, NAME) is not getattr(model.shared, NAME)  # type: ignore
    for absent in (decoder(lower_bound="none"), decoder(lower_bound=0.5)):
        assert not any("gamma" in name for name, _ in absent.named_parameters())


@given(scale=st.floats(0, 50), depth=st.integers(1, 6), seed=st.integers(0, 99))
def test_bounds_rise_with_the_layer_and_stay_below_one(scale: float, depth: int, seed: int) -> None:
    bounds = LowerBounds(depth, 5)
    with torch.no_grad():
        bounds.gamma.copy_(scale * random(depth, 5, seed=seed))
    values = bounds.values()
    assert (values[0] == 0).all() and (values.diff(dim=0) >= 0).all() and (values <= 1 + 1e-6).all()
    exact = bounds.gamma.double().softmax(0)
    for layer in range(1, depth):
        beta_d, rest_d = bounds(layer)
        assert (beta_d > 0).all() and (rest_d > 0).all()
        torch.testing.assert_close(beta_d.double(), exact[1 : layer + 1].sum(0), rtol=1e-5, atol=1e-37)
        torch.testing.assert_close(rest_d.double(), 1 - exact[1 : layer + 1].sum(0), rtol=1e-5, atol=1e-7)


def test_outside_a_model_a_mixer_holds_its_bounds() -> None:
    made = HGRN2Config().build(BuildContext(WIDTH, 4, DEPTH, 1, 2, 16))
    assert "lower_bounds.gamma" in dict(made.named_parameters()) and made._bounds[0] is made.lower_bounds
    NormalConfig().fill(made, DEPTH, 0)
    assert (made.lower_bounds.gamma == 0).all()
    y_btd, _ = made(random(1, 4, WIDTH), Span())
    assert y_btd.isfinite().all() and made.diagnostics()["lower bound"] == pytest.approx(1 / 3)
    assert not any("gamma" in name for name, _ in mixer().named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fixed_bound_is_made_where_it_is_used(dtype: torch.dtype) -> None:
    """No tensor of the host goes to the device, and none is finer than the gates."""
    made = mixer(lower_bound=0.3).to(dtype)
    bound = made.bound(torch.device("meta"), dtype)
    assert bound is not None and all(value.device.type == "meta" and value.dtype == dtype for value in bound)
    with Created() as created:
        made.gates(random(1, 2, WIDTH).to(dtype))
    assert created.full == [dtype, dtype] and not created.copied


def test_bounds_without_a_row_for_the_layer_are_refused() -> None:
    for shape in ((2, WIDTH), (DEPTH, WIDTH + 1)):
        context = BuildContext(WIDTH, 4, DEPTH, 2, 2, 16, shared=torch.nn.ModuleDict({NAME: LowerBounds(*shape)}))
        with pytest.raises(ConfigError, match="layer 2 of width 12 asks for a learned lower bound"):
            HGRN2Config().build(context)


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "heads"),
    [({}, 3), ({"num_heads": 2}, 2), ({"expand_ratio": 2}, 6), ({"num_heads": 4, "expand_ratio": 3}, 4)],
)
def test_heads(settings: dict[str, int], heads: int) -> None:
    assert mixer(**settings).heads == heads


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 5}, "width 12 is not divisible by num_heads 5"),
        ({"expand_ratio": 8}, "width 12 is not divisible by expand_ratio 8"),
        (
            {"num_heads": 3, "expand_ratio": 3},
            "num_heads 3 and expand_ratio 3, whose product is 9 and not the model's width 12",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixer(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lower_bound": 1.0}, r"\[0, 1\)"),
        ({"lower_bound": -0.1}, r"\[0, 1\)"),
        ({"chunk_size": 24}, "such as 16"),
        ({"mode": "recurrent", "chunk_size": 16}, "without chunks or kernels"),
        ({"mode": "recurrent", "backend": "fla"}, "without chunks or kernels"),
        ({"backend": "fla", "chunk_size": 16}, "chunk_size 16 is a setting of our own operator"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HGRN2Config.model_validate(settings)


def test_a_chunk_size_keeps_our_own_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def use_kernels(backend: str, device: torch.device, dtype: torch.dtype, channels: int) -> bool:
        asked.append(dtype)
        return False

    monkeypatch.setattr(hgrn2, "use_kernels", use_kernels)
    mixer(chunk_size=16)(random(1, 3, WIDTH), Span())
    assert asked == []
    mixer()(random(1, 3, WIDTH), Span())
    assert asked == [torch.float32]


def test_kernels_asked_for_and_absent_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_linear_fla, "INSTALLED", False)
    with pytest.raises(DependencyError, match=r"pip install 'torchstone\[gpu\]'"):
        mixer(backend="fla")
    monkeypatch.setattr(gated_linear_fla, "INSTALLED", True)
    with pytest.raises(ConfigError, match="runs on CUDA"):
        mixer(backend="fla")(random(1, 3, WIDTH), Span())


# Counts and reports -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [16, 12, 40])
@pytest.mark.parametrize("settings", [{}, {"expand_ratio": 1}, {"chunk_size": 16}, {"variant": "unit"}], ids=str)
def test_flops_agree_with_torch(length: int, settings: dict[str, Any]) -> None:
    made = mixer(**settings)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(random(3, length, WIDTH), Span())
    assert counter.get_total_flops() == pytest.approx(3 * length * made.flops(length), rel=1e-12)


def test_size_and_cost_are_those_of_the_formula() -> None:
    """4 d² + d parameters a mixer; 8 d² + 4 d E + 2 (c + 1) d FLOPs per token; d E numbers of state."""
    found = {}
    for ratio in (1, 4, 16):
        config = decoder(width=16, expand_ratio=ratio, chunk_size=8).config
        found[ratio] = count(config, 9, 16)
        made = decoder(width=16, expand_ratio=ratio, chunk_size=8).blocks[0].mixer
        assert sum(parameter.numel() for parameter in made.parameters()) == 4 * 16**2 + 16
        assert made.flops(16) == 8 * 16**2 + 4 * 16 * ratio + 2 * (8 + 1) * 16
    assert found[1].parameters == found[4].parameters == found[16].parameters
    states = {ratio: counts.kv_cache_bytes_per_token * 16 for ratio, counts in found.items()}
    assert states[16] - states[1] == DEPTH * 4 * 16 * 15


def test_diagnostics_tell_the_mean_gate_of_the_last_pass() -> None:
    model = decoder(lower_bound=0.75)
    assert model.diagnostics() == {f"layer0{layer}/lower bound": 0.75 for layer in range(DEPTH)}
    model(torch.arange(8)[None])
    found = model.diagnostics()
    gate = found["layer01/forget gate"]
    assert 0.75 < gate < 1 and found["layer01/memory"] == pytest.approx(1 / (1 - gate), rel=1e-5)
    assert found["layer01/lower bound"] == 0.75


def test_the_mean_gate_leaves_padding_out_and_is_no_buffer() -> None:
    made, x_btd = mixer(), 3 * random(2, 9, WIDTH)
    valid_bt = torch.arange(9) >= torch.tensor([[0], [5]])
    made(x_btd, Span(valid_bt=valid_bt))
    expected = 1 - float(made.gates(x_btd)[2][valid_bt].detach().mean())
    assert made.diagnostics()["forget gate"] == pytest.approx(expected, abs=1e-6)
    assert abs(expected - (1 - float(made.gates(x_btd)[2].detach().mean()))) > 1e-4
    assert not list(made.buffers())
    made.bfloat16()(x_btd.bfloat16(), Span())
    assert made.mean_key is not None and made.mean_key.dtype == torch.float32
    made(x_btd.bfloat16(), Span(valid_bt=torch.zeros_like(valid_bt)))
    assert set(made.diagnostics()) == {"lower bound"}


def test_memories_count_every_gate() -> None:
    model, tokens_bt = decoder(), torch.arange(8)[None]
    seen: list[Tensor] = []
    hook = model.blocks[2].mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = memories(model, tokens_bt)
    hook.remove()
    assert [one.layer for one in found] == [0, 1, 2]
    memory = (1 / model.blocks[2].mixer.gates(seen[0])[2]).flatten().detach()  # type: ignore[operator,union-attr]
    last = found[2]
    assert last.shares[0] == pytest.approx(float((memory < 2).double().mean()))
    assert last.shares[2] == pytest.approx(float(((memory >= 4) & (memory < 8)).double().mean()))
    assert sum(last.shares) == pytest.approx(1) and last.median == pytest.approx(float(memory.median()))
    assert last.beta == pytest.approx((2 / 3,) * WIDTH) and found[0].beta == (0.0,) * WIDTH
    assert last.state_bytes == 4 * WIDTH * 4
    attention = DecoderConfig.model_validate({"width": 16, "depth": 1, "head_dim": 8}).build(9, 16, 0)
    assert memories(attention, tokens_bt) == []


def test_memories_are_of_the_mixers_that_ran() -> None:
    """Of a belief-state model, which has two stacks with layers of the same numbers, the forward one reads."""
    config = {"width": WIDTH, "depth": 2, "head_dim": 4, "end_token": 8, "block": {"mixer": {"kind": "hgrn2"}}}
    model = BeliefStateConfig.model_validate(config).build(9, 16, 0)
    found = memories(model, torch.arange(8)[None])
    assert [(one.path, one.layer) for one in found] == [("blocks.0.mixer", 0), ("blocks.1.mixer", 1)]
    seen: list[Tensor] = []
    hook = model.blocks[1].mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.arange(8)[None])
    hook.remove()
    key = model.blocks[1].mixer.gates(seen[0])[2].detach().double()  # type: ignore[operator,union-attr]
    assert found[1].median == pytest.approx(float((1 / key).median()))


def test_a_model_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model, tokens_bt = decoder(), torch.arange(9).expand(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for span in (None, Span(documents_bt=torch.tensor([[0] * 4 + [1] * 5] * 2))):
        hidden = [net(tokens_bt, span).hidden_btd for net in (compiled, model)]
        torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-5)
        gradients = [torch.autograd.grad(h.pow(2).sum(), list(model.parameters())) for h in hidden]
        for left, right in zip(*gradients, strict=True):
            torch.testing.assert_close(left, right, atol=1e-4 * float(right.abs().max()), rtol=0)


def test_kernels_get_what_our_own_operator_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents, padding and a carried state, as the mixer hands them on."""
    ours, x_btd = mixer(), random(2, 14, WIDTH)
    documents_bt = torch.tensor([[3] * 9 + [5] * 5, [1] * 14])
    valid_bt = torch.ones(2, 14, dtype=torch.bool)
    valid_bt[1, :4] = False
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(hgrn2, "use_kernels", lambda *asked, kernels=kernels: kernels)
        monkeypatch.setattr(hgrn2, "fla_gated_linear_attention", gated_linear_recurrence)
        state, parts = ours.new_state(2, 14, "cpu", torch.float32), []
        for start, stop in ((0, 6), (6, 14)):
            span = Span(documents_bt=documents_bt[:, start:stop], valid_bt=valid_bt[:, start:stop])
            parts.append(ours(x_btd[:, start:stop], span, state)[0])
        found.append([*parts, state.tensors["s"]])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
