"""The recurrent block: a plain reading of its equations, documents, padding, states, decays, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.context import BuildContext
from torchstone.nn.initialisation import NormalConfig
from torchstone.nn.recurrence.block_diagonal import BlockDiagonal
from torchstone.nn.recurrence.boundaries import boundaries
from torchstone.nn.recurrence.convolution import TemporalConvolution
from torchstone.nn.recurrence.rglru import RecurrentBlock, RGLRUConfig, _Gated
from torchstone.nn.recurrence.state import RecurrentState
from torchstone.nn.span import Span
from torchstone.nn.state import KVCache
from torchstone.optim.groups import decay_groups
from torchstone.recipe.registry import parse_part

WIDTH, LENGTH, CLOSE = 12, 15, 1e-5
HYBRID = [{"kind": "rglru"}, {"kind": "rglru", "lru_width": 24}, {"kind": "local-attention", "window": 5}]


def block(seed: int = 0, **settings: Any) -> RecurrentBlock:
    """A block whose gates and convolution are far from trivial."""
    config = RGLRUConfig.model_validate({"num_blocks": 3, **settings})
    mixer = config.build(BuildContext(WIDTH, 4, 2, 0, 7, LENGTH))
    NormalConfig(std=0.4).fill(mixer, 2, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in mixer.named_parameters():
        if "bias" in name or "conv" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return mixer.eval()


def hybrid(**changes: Any) -> Decoder:
    """Two recurrent blocks and a local attention block."""
    settings = {"width": 16, "depth": 3, "head_dim": 4, "pattern": HYBRID, "initialisation": {"kind": "fan-in"}}
    return DecoderConfig.model_validate({**settings, **changes}).build(29, LENGTH, 0).eval()


def inputs(batch: int = 2, length: int = LENGTH, width: int = WIDTH, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def close(left: Tensor, right: Tensor, tolerance: float = CLOSE) -> None:
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


def plain(mixer: RecurrentBlock, x_td: Tensor) -> Tensor:
    """The equations of the block for one sequence, token by token."""
    unit, weight_wd = mixer.rg_lru, mixer.conv.weight
    size = unit.input_gate.bias.shape[1]
    y_tr, z_tr = F.gelu(mixer.w_y(x_td), approximate="tanh"), mixer.w_x(x_td)
    h_r, outputs = torch.zeros(mixer.width), []
    for t in range(len(x_td)):
        reached = range(min(len(weight_wd), t + 1))
        c_r = mixer.conv.bias + sum(weight_wd[len(weight_wd) - 1 - back] * z_tr[t - back] for back in reached)
        gates = [
            torch.cat([c_r[h * size : (h + 1) * size] @ gate.weight[h] + gate.bias[h] for h in range(len(gate.weight))])
            for gate in (unit.input_gate, unit.recurrence_gate)
        ]
        i_r, r_r = gates[0].sigmoid(), gates[1].sigmoid()
        a_r = torch.exp(-8 * r_r * F.softplus(unit.alpha))
        h_r = i_r * c_r if t == 0 else a_r * h_r + (1 - a_r**2).sqrt() * i_r * c_r
        outputs.append(mixer.w_o(h_r * y_tr[t]))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "settings", [{}, {"lru_width": 18}, {"num_blocks": 1}, {"conv_width": 1}, {"conv_width": 7}], ids=str
)
def test_output_and_gradients_follow_the_equations(settings: dict[str, Any]) -> None:
    mixer, x_btd = block(**settings), inputs()
    ours, _ = mixer(x_btd, Span())
    theirs = torch.stack([plain(mixer, x_td) for x_td in x_btd])
    close(ours, theirs)
    weight_btd = inputs(seed=5)
    gradients = [torch.autograd.grad((out * weight_btd).sum(), list(mixer.parameters())) for out in (ours, theirs)]
    for left, right in zip(*gradients, strict=True):
        close(left, right, 1e-4 * max(1.0, float(right.abs().max())))


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [2, 1, 4, 8], [3, 3, 9], [LENGTH - 1, 1], [1, LENGTH - 1]], ids=str)
@torch.no_grad()
def test_any_pieces_continue_the_sequence(pieces: list[int]) -> None:
    mixer, x_btd = block(), inputs()
    whole, _ = mixer(x_btd, Span())
    state = mixer.new_state(2, LENGTH, "cpu", torch.float32)
    close(torch.cat([mixer(piece, Span(), state)[0] for piece in x_btd.split(pieces, dim=1)], dim=1), whole)
    assert state.length == LENGTH


@given(
    cuts=st.lists(st.integers(1, LENGTH - 1), max_size=4, unique=True),
    pieces=st.lists(st.integers(1, 6), min_size=1, max_size=LENGTH),
    seed=st.integers(0, 3),
)
@torch.no_grad()
def test_packed_documents_equal_documents_alone(cuts: list[int], pieces: list[int], seed: int) -> None:
    """Convolution, unit and state know documents, in one call and in pieces of any length."""
    mixer, x_btd = block(), inputs(batch=1, seed=seed)
    edges = [0, *sorted(cuts), LENGTH]
    alone = [mixer(x_btd[:, start:stop], Span())[0] for start, stop in zip(edges, edges[1:], strict=False)]
    index_1t = torch.arange(LENGTH)[None]
    documents_bt = sum((index_1t >= cut).long() for cut in cuts) + torch.zeros_like(index_1t)
    close(mixer(x_btd, Span(documents_bt=documents_bt))[0], torch.cat(alone, dim=1))
    state, found, start = mixer.new_state(1, LENGTH, "cpu", torch.float32), [], 0
    for size in [*pieces, LENGTH]:
        stop = min(start + size, LENGTH)
        if stop > start:
            found.append(mixer(x_btd[:, start:stop], Span(documents_bt=documents_bt[:, start:stop]), state)[0])
        start = stop
    close(torch.cat(found, dim=1), torch.cat(alone, dim=1))


@given(
    valid=st.lists(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH), min_size=2, max_size=2),
    cut=st.integers(1, LENGTH - 1),
    second=st.integers(1, LENGTH - 1),
)
@torch.no_grad()
def test_padding_anywhere_is_passed_by(valid: list[list[bool]], cut: int, second: int) -> None:
    """Visible tokens give what they give without the padding between them; padding gives 0; over two calls as well."""
    mixer, x_btd, valid_bt = block(), inputs(), torch.tensor(valid)
    documents_bt = (torch.arange(LENGTH) >= second).long().expand(2, -1)
    whole, _ = mixer(x_btd, Span(documents_bt=documents_bt, valid_bt=valid_bt))
    state = mixer.new_state(2, LENGTH, "cpu", torch.float32)
    halves = [
        mixer(x_btd[:, part], Span(documents_bt=documents_bt[:, part], valid_bt=valid_bt[:, part]), state)[0]
        for part in (slice(0, cut), slice(cut, LENGTH))
    ]
    for row in range(2):
        seen_t = valid_bt[row]
        assert bool((whole[row, ~seen_t] == 0).all())
        if bool(seen_t.any()):
            span = Span(documents_bt=documents_bt[row : row + 1, seen_t])
            alone, _ = mixer(x_btd[row : row + 1, seen_t], span)
            close(whole[row, seen_t], alone[0])
    close(torch.cat(halves, dim=1), whole)


@torch.no_grad()
def test_causality() -> None:
    mixer, x_btd = block(), inputs(batch=1)
    before, _ = mixer(x_btd, Span())
    for index in range(LENGTH):
        changed = x_btd.clone()
        changed[:, index] += 1
        after, _ = mixer(changed, Span())
        assert torch.equal(after[:, :index], before[:, :index])
        assert float((after[:, index] - before[:, index]).abs().max()) > 1e-3


@torch.no_grad()
def test_the_state_has_a_fixed_size() -> None:
    mixer = block(lru_width=18)
    short, long = (mixer.new_state(2, capacity, "cpu", torch.bfloat16) for capacity in (3, 3000))
    expected = 2 * 18 * (4 + 3 * 2) + 2 * 8  # h in fp32, three inputs in bf16, and the document of each row
    assert short.nbytes() == long.nbytes() == expected
    mixer(inputs(length=3), Span(), short)
    assert short.nbytes() == expected
    with pytest.raises(ConfigError, match="capacity"):
        mixer(inputs(length=1), Span(), short)


@torch.no_grad()
def test_a_refused_call_leaves_the_state_as_it_was() -> None:
    mixer = block()
    state = mixer.new_state(2, 4, "cpu", torch.float32)
    mixer(inputs(length=3), Span(), state)
    before = copy.deepcopy(state)
    with pytest.raises(ConfigError):
        mixer(inputs(length=2), Span(), state)
    assert state.length == before.length
    assert all(torch.equal(state.tensors[name], before.tensors[name]) for name in before.tensors)


@torch.no_grad()
def test_states_of_another_mixer_or_size_are_refused() -> None:
    mixer = block()
    half = mixer.new_state(2, 9, "cpu", torch.bfloat16)
    half.tensors["h"] = half.tensors["h"].bfloat16()
    wrong = {
        r"h \(3, 12\) in float32": mixer.new_state(3, 9, "cpu", torch.float32),
        r"h \(2, 18\) in float32": block(lru_width=18).new_state(2, 9, "cpu", torch.float32),
        r"h \(2, 12\) in float32, conv \(2, 1, 12\)": block(conv_width=2).new_state(2, 9, "cpu", torch.float32),
        r"h \(2, 12\) in bfloat16": half,
        r"s \(2, 12\) in float32": RecurrentState({"s": torch.zeros(2, 12)}, 9),
        "a KVCache": KVCache(2, 9, (1, 4), (1, 4), None, "cpu", torch.float32),
    }
    for message, state in wrong.items():
        due = r"the state of rglru is h \(2, 12\) in fp32, conv \(2, 3, 12\) here"
        with pytest.raises(ConfigError, match=f"{due}, and {message}"):
            mixer(inputs(length=3), Span(), state)


@torch.no_grad()
def test_one_row_of_padding_serves_all_rows() -> None:
    mixer, x_btd = block(), inputs()
    valid_1t = (torch.arange(LENGTH) % 4 != 1)[None]
    expected, _ = mixer(x_btd, Span(valid_bt=valid_1t.expand(2, -1)))
    assert torch.equal(mixer(x_btd, Span(valid_bt=valid_1t))[0], expected)
    state = mixer.new_state(2, LENGTH, "cpu", torch.float32)
    parts = [
        mixer(x_btd[:, part], Span(valid_bt=valid_1t[:, part]), state)[0] for part in (slice(0, 6), slice(6, LENGTH))
    ]
    close(torch.cat(parts, dim=1), expected)
    assert state.batch == 2


@torch.no_grad()
def test_the_state_lets_the_prompt_go() -> None:
    mixer = block()
    for span in (Span(), Span(valid_bt=torch.ones(2, 400, dtype=torch.bool))):
        state = mixer.new_state(2, 400, "cpu", torch.float32)
        mixer(inputs(length=400), span, state)
        held = sum(tensor.untyped_storage().nbytes() for tensor in (*state.tensors.values(), state.documents_b))
        assert held == state.nbytes()


def test_no_rows_give_no_rows() -> None:
    mixer = block()
    x_btd = torch.empty(0, 7, WIDTH, requires_grad=True)
    for span in (Span(), Span(valid_bt=torch.ones(0, 7, dtype=torch.bool))):
        y_btd, _ = mixer(x_btd, span)
        assert y_btd.shape == x_btd.shape
        y_btd.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
def test_taps_are_summed_in_fp32(dtype: torch.dtype, padded: bool) -> None:
    """Outputs and gradients of half precision are those of fp32 with the same numbers, rounded once."""
    found = []
    for used in (dtype, torch.float32):
        conv = TemporalConvolution(WIDTH, 7).to(dtype)
        generator = torch.Generator().manual_seed(0)
        for parameter in conv.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype).to(used)
        z_btd = inputs().to(dtype).to(used).requires_grad_()
        span = Span(valid_bt=torch.arange(LENGTH) >= torch.tensor([[0], [4]])) if padded else Span()
        limits = boundaries(span, 2, LENGTH, None, torch.device("cpu"))
        out_btd, _ = conv(z_btd, span, limits, torch.zeros(2, 6, WIDTH))
        assert out_btd.dtype == used
        weight_btd = inputs(seed=5).to(dtype).to(used)
        gradients = torch.autograd.grad((out_btd * weight_btd).sum(), [z_btd, *conv.parameters()])
        found.append([one.to(dtype) for one in (out_btd.detach(), *gradients)])
    for half, fine in zip(*found, strict=True):
        assert torch.equal(half, fine)


@torch.no_grad()
def test_hybrid_decodes_packed_and_padded() -> None:
    model = hybrid()
    tokens_bt = torch.randint(0, 29, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    index_t, padding_b1 = torch.arange(LENGTH), torch.tensor([[0], [6]])
    span = Span((index_t - padding_b1).clamp_min(0), None, index_t >= padding_b1)
    whole = model(tokens_bt, span).hidden_btd
    close(whole[1:, 6:], model(tokens_bt[1:, 6:]).hidden_btd)
    state, found = model.new_state(2, LENGTH), []
    for part in (slice(0, 7), slice(7, 8), slice(8, 13), slice(13, LENGTH)):
        assert span.positions_bt is not None and span.valid_bt is not None
        piece = Span(span.positions_bt[:, part], None, span.valid_bt[:, part])
        found.append(model(tokens_bt[:, part], piece, state).hidden_btd)
    close(torch.cat(found, dim=1)[:, 6:], whole[:, 6:])


def test_the_slope_of_the_root_is_bounded() -> None:
    """Gates and inputs of 1 leave ∂b/∂log a = −a² / m, whose 1 / m is 2000 at most (twice the slope of the root)."""
    rate_r = -torch.tensor([0.0, 1e-12, 1e-7, 1e-4, 0.5], dtype=torch.float64, requires_grad=True)
    open_btr, never = torch.full((1, 1, 5), 50.0, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.bool)
    a_btr, b_btr = _Gated.apply(open_btr, open_btr, torch.ones_like(open_btr), rate_r, never)
    (slope_r,) = torch.autograd.grad(b_btr.sum(), rate_r)
    u_r = -torch.expm1(2 * rate_r.detach())
    torch.testing.assert_close(b_btr.flatten(), u_r.sqrt())
    torch.testing.assert_close(slope_r, -2 * a_btr.flatten() ** 2 / (4 * u_r).clamp_min(1e-6).sqrt())
    assert float(slope_r.min()) == pytest.approx(-2000.0)


def test_coefficients_have_the_gradients_of_their_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    rate_r = -torch.rand(3, generator=generator, dtype=torch.float64).requires_grad_()
    starts_bt1 = torch.tensor([[True, False, False, True], [True, False, False, False]])[:, :, None]
    assert torch.autograd.gradcheck(_Gated.apply, (*inputs, rate_r, starts_bt1))


@pytest.mark.parametrize(
    ("decay_init", "low", "high"), [("code", 0.9, 0.999), ("paper", 0.9 ** (1 / 8), 0.999 ** (1 / 8))]
)
def test_decays_start_in_their_range(decay_init: Any, low: float, high: float) -> None:
    mixer = RGLRUConfig(num_blocks=1, lru_width=4096, decay_init=decay_init).build(BuildContext(8, 4, 2, 0, 7, LENGTH))
    alpha_r = torch.empty(4096)
    mixer.rg_lru.own_initialisation()["alpha"](alpha_r, torch.Generator().manual_seed(0))
    decay_r = torch.exp(-F.softplus(alpha_r.double()))
    assert low - 1e-6 <= float(decay_r.min()) < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < float(decay_r.max()) <= high + 1e-6
    uniform_r = (decay_r**2 - 0.81) / (0.999**2 - 0.81) if decay_init == "code" else (decay_r**8 - 0.9) / 0.099
    assert float(uniform_r.mean()) == pytest.approx(0.5, abs=0.03)
    mixer.rg_lru.alpha.data = alpha_r
    half_open = {"code": (0.656, 0.996), "paper": (0.948, 0.9996)}[decay_init]
    shown = mixer.diagnostics()
    assert half_open[0] <= shown["fastest decay"] < shown["decay"] < shown["slowest decay"] <= half_open[1]


def test_only_the_unit_is_free_of_decay() -> None:
    groups = {group.name: set(group.parameters) for group in decay_groups(hybrid(), 0.1)}
    unit = {name for name in groups["no_decay"] | groups["decay"] if ".rg_lru." in name}
    assert unit and unit <= groups["no_decay"]
    assert {f"blocks.0.mixer.{name}.weight" for name in ("w_y", "w_x", "w_o", "conv")} <= groups["decay"]


def test_the_unit_stays_fp32() -> None:
    model = hybrid().bfloat16()
    kept = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all(dtype == (torch.float32 if ".rg_lru." in name else torch.bfloat16) for name, dtype in kept.items())
    tokens_bt = torch.randint(0, 29, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden_btd = model(tokens_bt).hidden_btd
        state = model.new_state(1, LENGTH)
        model(tokens_bt, state=state)
    assert hidden_btd.dtype == torch.bfloat16 and state.layers[0].tensors["h"].dtype == torch.float32
    close(hidden_btd.float(), hybrid()(tokens_bt).hidden_btd, 0.1)


def test_flops_are_what_torch_counts() -> None:
    mixer = block(lru_width=18)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(inputs(), Span())
    assert counter.get_total_flops() == 2 * LENGTH * mixer.flops(LENGTH) == 2 * LENGTH * mixer.flops(10**6)


def test_the_values_kept_for_the_backward_pass_are_counted() -> None:
    """All but the coefficients b, which no gradient needs, and what is kept for parameters alone."""
    unit, length, sizes = block().rg_lru, 500, set()
    limits = boundaries(Span(), 2, length, None, torch.device("cpu"))

    def pack(kept: Tensor) -> Tensor:
        sizes.add((kept.untyped_storage().data_ptr(), kept.untyped_storage().nbytes() // 4))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        unit(inputs(length=length), limits)
    per_token = sum(size for _, size in sizes if size >= 2 * length) / (2 * length)
    assert per_token == pytest.approx(unit.activation_values(), rel=0.01)


@pytest.mark.parametrize("documents", [False, True])
def test_compiles_without_graph_breaks(documents: bool) -> None:
    model = hybrid()
    tokens_bt = torch.randint(0, 29, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    span = Span(documents_bt=(torch.arange(LENGTH) > 6).long().expand(2, -1)) if documents else None
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    hidden = [net(tokens_bt, span).hidden_btd for net in (compiled, model)]
    close(*hidden)
    gradients = [torch.autograd.grad(h.pow(2).sum(), list(model.parameters())) for h in hidden]
    for left, right in zip(*gradients, strict=True):
        close(left, right, 1e-4 * max(1.0, float(right.abs().max())))


def test_block_diagonal_is_a_dense_map_with_zeros() -> None:
    layer = BlockDiagonal(6, 2)
    for name, fill in layer.own_initialisation().items():
        fill(layer.get_parameter(name).data, torch.Generator().manual_seed(0))
    layer.bias.data = torch.arange(6.0).view(2, 3)
    x_btd = inputs(width=6)
    dense = torch.block_diag(*layer.weight)
    close(layer(x_btd), x_btd @ dense + torch.arange(6.0))
    assert layer.flops() == 2 * 2 * 3 * 3


def test_errors_name_both_numbers() -> None:
    with pytest.raises(ConfigError, match="12 channels and 5 blocks, and 12 is not divisible by 5"):
        RGLRUConfig(num_blocks=5).build(BuildContext(WIDTH, 4, 2, 0, 7, LENGTH))
    with pytest.raises(ConfigError, match="50 channels, and the model's head_dim 8 does not divide them"):
        RGLRUConfig().build(BuildContext(50, 8, 2, 0, 7, LENGTH))
    with pytest.raises(ValidationError, match="lru_width"):
        parse_part("mixer", {"kind": "rglru", "lru_width": 0})


def test_a_pattern_of_pairs_and_positions_that_restart_are_refused() -> None:
    mixer, x_btd = block(), inputs()
    with pytest.raises(ConfigError, match="allowed_bts"):
        mixer(x_btd, Span(allowed_bts=torch.ones(LENGTH, LENGTH, dtype=torch.bool)))
    restarting_bt = (torch.arange(LENGTH) % 5).expand(2, -1)
    with pytest.raises(ConfigError, match="documents"):
        mixer(x_btd, Span(positions_bt=restarting_bt))
