"""Gated linear attention in chunks equals the recurrence: outputs, states and gradients, whatever the sizes and gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchstone.errors import ConfigError, DependencyError
from torchstone.nn.recurrence import gated_linear, gated_linear_fla
from torchstone.nn.recurrence.gated_linear import (
    chunk_of,
    core_flops,
    gated_linear_attention,
    gated_linear_recurrence,
)
from torchstone.nn.recurrence.gated_linear_fla import fla_gated_linear_attention, use_kernels
from torchstone.nn.recurrence.gated_linear_reference import reference_gated_linear_attention

Attention = Callable[..., tuple[Tensor, Tensor]]
LOWEST = -100.0


def inputs(
    b: int, t: int, h: int, k: int, v: int, lowest: float = -2.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v, log gates in [lowest, 0] and a state; a third of the gates near 0, a third near the lowest."""
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(b, t, h, size, generator=draw, dtype=dtype) for size in (k, k, v)]
    place = torch.rand(b, t, h, k, generator=draw, dtype=dtype)
    extreme = torch.randint(3, (b, t, h, k), generator=draw)
    gates = lowest * torch.where(extreme == 0, place * 1e-3, torch.where(extreme == 1, 1 - place * 1e-3, place))
    tensors += [gates, torch.randn(b, h, k, v, generator=draw, dtype=dtype)]
    return [tensor.requires_grad_() for tensor in tensors]


def results(attention: Attention, tensors: list[Tensor], **more: Any) -> list[Tensor]:
    """Outputs, last state, and the gradients of a random function of both."""
    o, last = attention(*tensors, **more)
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype) for x in (o, last)]
    loss = (o * weights[0]).sum() + (last * weights[1]).sum()
    return [o, last, *torch.autograd.grad(loss, tensors)]


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


@given(
    b=st.integers(1, 3),
    t=st.integers(1, 70),
    h=st.integers(1, 3),
    k=st.integers(1, 6),
    v=st.integers(1, 6),
    chunk=st.sampled_from([None, 1, 2, 4, 8, 16, 64]),
    lowest=st.sampled_from([0.0, -0.1, -2.0, -20.0, LOWEST]),
    documents=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    rows=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunks_equal_the_recurrence(
    b: int, t: int, h: int, k: int, v: int, chunk: int | None, lowest: float, documents: float, rows: bool, seed: int
) -> None:
    tensors = inputs(b, t, h, k, v, lowest, seed)
    draw = torch.Generator().manual_seed(seed)
    starts_bt = torch.rand(b if rows else 1, t, generator=draw) < documents
    expected = results(reference_gated_linear_attention, tensors, starts_bt=starts_bt)
    close(results(gated_linear_attention, tensors, chunk=chunk, starts_bt=starts_bt), expected, 1e-10)
    close(results(gated_linear_recurrence, tensors, starts_bt=starts_bt), expected, 1e-10)


@pytest.mark.parametrize("lowest", [-0.01, -1.0, -30.0, LOWEST])
def test_fp32_is_exact_and_finite_at_extreme_gates(lowest: float) -> None:
    rough = inputs(2, 150, 2, 16, 12, lowest, dtype=torch.float32)
    fine = [tensor.detach().double().requires_grad_() for tensor in rough]
    exact = results(reference_gated_linear_attention, fine)
    for chunk in (8, 64):
        found = results(gated_linear_attention, rough, chunk=chunk)
        assert all(tensor.isfinite().all() for tensor in found)
        for ours, theirs in zip(found, exact, strict=True):
            error = (ours - theirs).abs().max() / theirs.abs().max()
            assert error < 5e-6


def test_what_came_before_a_document_does_not_exist() -> None:
    """Outputs behind a start do not change in a single bit with what came before, and no gradient goes there."""
    tensors = inputs(1, 60, 2, 5, 4, dtype=torch.float32)
    starts_bt = torch.zeros(1, 60, dtype=torch.bool)
    starts_bt[0, 37] = True
    o, last = gated_linear_attention(*tensors, chunk=16, starts_bt=starts_bt)
    gradients = torch.autograd.grad(o[:, 37:].sum() + last.sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all((gradient[:, :37] == 0).all() for gradient in gradients[:4]) and (gradients[4] == 0).all()
    assert (gradients[3][:, 37] == 0).all() and (gradients[3][:, 38:] != 0).any()
    other = [torch.cat([tensor[:, :37] * 3 - 1, tensor[:, 37:]], dim=1) for tensor in tensors[:3]]
    again, last_again = gated_linear_attention(*other, *tensors[3:], chunk=16, starts_bt=starts_bt)
    assert torch.equal(again[:, 37:], o[:, 37:]) and torch.equal(last_again, last)


def test_padding_passes_the_state_on() -> None:
    q, k, v, g, state = (tensor.detach() for tensor in inputs(2, 20, 2, 4, 3))
    padding_bt = torch.zeros(2, 20, dtype=torch.bool)
    padding_bt[0, 5:14], padding_bt[1, :3] = True, True
    hidden = padding_bt[:, :, None, None]
    o, last = gated_linear_attention(q, k.masked_fill(hidden, 0), v, g.masked_fill(hidden, 0), state, chunk=8)
    for row in range(2):
        kept = ~padding_bt[row]
        short = [tensor[row : row + 1, kept] for tensor in (q, k, v, g)]
        o_row, last_row = reference_gated_linear_attention(*short, state[row : row + 1])
        close([o[row : row + 1, kept], last[row : row + 1]], [o_row, last_row], 1e-12)


@given(cuts=st.lists(st.integers(0, 50), max_size=5), seed=st.integers(0, 9))
def test_pieces_of_any_length_continue(cuts: list[int], seed: int) -> None:
    *tensors, state = (tensor.detach() for tensor in inputs(2, 50, 1, 3, 4, seed=seed))
    whole, last = gated_linear_attention(*tensors, state)
    edges, outputs = [0, *sorted(cuts), 50], []
    for start, stop in zip(edges, edges[1:], strict=False):
        if start < stop:
            o, state = gated_linear_attention(*(tensor[:, start:stop] for tensor in tensors), state)
            outputs.append(o)
    close([torch.cat(outputs, dim=1), state], [whole, last], 1e-10)


def test_gradcheck() -> None:
    tensors = inputs(1, 11, 2, 3, 2)
    starts_bt = torch.arange(11)[None] == 6

    def attention(*given: Tensor) -> tuple[Tensor, Tensor]:
        return gated_linear_attention(*given, scale=0.7, chunk=4, starts_bt=starts_bt)

    assert torch.autograd.gradcheck(attention, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_for_half_precision(dtype: torch.dtype) -> None:
    half = [tensor.detach().to(dtype) for tensor in inputs(2, 40, 2, 8, 8, -3.0)]
    fine = [tensor.float() for tensor in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gated_linear_attention(*half)
    assert found[0].dtype == found[1].dtype == torch.float32
    close(list(found), list(gated_linear_attention(*fine)), 1e-6)


def test_backward_is_fp32_under_autocast() -> None:
    tensors = inputs(2, 40, 2, 8, 8, -3.0, dtype=torch.float32)
    plain = results(gated_linear_attention, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(results(gated_linear_attention, tensors), plain, 1e-6)


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    tensors = inputs(2, 21, 2, 4, 4, dtype=torch.float32)
    starts_bt = torch.arange(21)[None] % 9 == 0
    compiled = torch.compile(gated_linear_attention, fullgraph=True, backend="aot_eager")
    expected = results(gated_linear_attention, tensors, starts_bt=starts_bt)
    close(results(compiled, tensors, starts_bt=starts_bt), expected, 1e-6)


def test_operators_agree_with_their_declared_shapes() -> None:
    tensors = inputs(2, 21, 2, 4, 3, dtype=torch.float32)
    for chunk in (None, 4):
        torch.library.opcheck(torch.ops.torchstone.gated_linear_attention, (*tensors, 0.5, chunk))


@pytest.mark.parametrize(
    ("t", "k", "v", "chunk"), [(64, 16, 16, 32), (50, 4, 6, 8), (12, 1, 1, None), (128, 32, 32, None)]
)
def test_flops_are_those_of_the_products(
    t: int, k: int, v: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_linear, "TINY", 0)  # so that every product is one of matrices
    tensors = [tensor.detach() for tensor in inputs(2, t, 3, k, v)]
    with FlopCounterMode(display=False) as declared:
        gated_linear_attention(*tensors, chunk=chunk)
    with FlopCounterMode(display=False) as products:
        gated_linear.forward(*tensors, 1.0, chunk)
    used = chunk_of(t, k, chunk)
    padded = t + -t % used
    own = 2 * 3 * padded * 2 * (k + v)  # a token with itself, which is no product of matrices
    assert products.get_total_flops() + own == declared.get_total_flops()
    assert declared.get_total_flops() == pytest.approx(2 * 3 * t * core_flops(t, k, v, chunk), rel=1e-12)


def test_chunks_shrink_instead_of_padding_much() -> None:
    assert chunk_of(256, 128) == 64 and chunk_of(256, 32) == 32 and chunk_of(256, 1) == 8
    assert chunk_of(65, 128) == 8 and chunk_of(60, 128) == 64 and chunk_of(1000, 3, 128) == 128
    assert chunk_of(3, 128) == 8 and chunk_of(3, 1, 4) == 4
    assert (
        chunk_of(40, 32, 64) == 8 and chunk_of(64, 32, 64) == 64
    )  # a given size is the most, not what is always taken


@pytest.mark.parametrize("documents", [False, True])
def test_no_rows_give_no_rows(documents: bool) -> None:
    tensors = inputs(0, 13, 2, 4, 3)
    starts_bt = torch.arange(13)[None] == 6 if documents else None
    found = results(gated_linear_attention, tensors, starts_bt=starts_bt)
    assert [tuple(x.shape) for x in found] == [(0, 13, 2, 3), (0, 2, 4, 3), *(tuple(x.shape) for x in tensors)]


# Kernels of flash-linear-attention, of which a test on a CPU can only see what they are given -----


class Kernels:
    """In the place of `fla.ops.gla`: the definition, in the layout of its function."""

    calls = 0

    def chunk_gla(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        assert q.dtype == k.dtype == v.dtype and g.dtype == torch.float32
        self.calls += 1
        state, bounds = more["initial_state"], more.get("cu_seqlens")
        assert more["output_final_state"] and set(more) <= {
            "scale",
            "initial_state",
            "output_final_state",
            "cu_seqlens",
        }
        if bounds is None:
            return reference_gated_linear_attention(q, k, v, g, state, more["scale"])
        assert q.shape[0] == 1 and len(state) == len(bounds) - 1 and bounds[0] == 0 and bounds[-1] == q.shape[1]
        outputs, states = [], []
        for number, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            piece = [x[:, start:stop] for x in (q, k, v, g)]
            o, last = reference_gated_linear_attention(*piece, state[number : number + 1], more["scale"])
            outputs.append(o)
            states.append(last)
        return torch.cat(outputs, dim=1), torch.cat(states)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("documents", [None, 0.0, 0.2, 1.0])
def test_kernels_are_given_rows_documents_and_states(
    monkeypatch: pytest.MonkeyPatch, with_state: bool, documents: float | None
) -> None:
    kernels = Kernels()
    monkeypatch.setattr(gated_linear_fla.importlib, "import_module", {"fla.ops.gla": kernels}.__getitem__)
    tensors = inputs(3, 17, 2, 4, 5, dtype=torch.float32)
    if not with_state:
        tensors.pop()
    draw = torch.Generator().manual_seed(2)
    starts_bt = None if documents is None else torch.rand(3, 17, generator=draw) < documents
    found = results(fla_gated_linear_attention, tensors, starts_bt=starts_bt)
    close(found, results(gated_linear_attention, tensors, starts_bt=starts_bt), 1e-4)
    assert kernels.calls == 1


def test_a_pass_does_not_look_for_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(name: str) -> None:
        raise AssertionError(f"{name} is searched for")

    monkeypatch.setattr(gated_linear_fla.importlib.util, "find_spec", searched)
    assert use_kernels("auto", torch.device("cuda"), torch.float32, 64) == gated_linear_fla.INSTALLED


def test_kernels_are_used_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for present in (False, True):
        monkeypatch.setattr(gated_linear_fla, "INSTALLED", present)
        for dtype in (torch.bfloat16, torch.float32):
            assert not use_kernels("auto", cpu, dtype, 64) and not use_kernels("torch", cuda, dtype, 64)
            assert use_kernels("auto", cuda, dtype, 64) == use_kernels("auto", cuda, dtype, 16) == present
            assert not use_kernels("auto", cuda, dtype, 15) and use_kernels("fla", cuda, dtype, 8)
        assert not use_kernels("auto", cuda, torch.float64, 64)
        with pytest.raises(ConfigError, match="runs on CUDA and the model is on cpu"):
            use_kernels("fla", cpu, torch.float32, 64)
        with pytest.raises(ConfigError, match="fp32 at best and the model is in fp64"):
            use_kernels("fla", cuda, torch.float64, 64)
        if present:
            gated_linear_fla.require_installed()
        else:
            with pytest.raises(DependencyError, match=r"pip install 'torchstone\[gpu\]'"):
                gated_linear_fla.require_installed()
