"""The linear scan against a plain loop: states, last state and gradients, at every length, and under a compiler."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchstone.nn.recurrence.linear_scan import BLOCK, SHORT, advance, linear_scan
from torchstone.nn.recurrence.linear_scan_reference import linear_scan_reference


def draw(
    batch: int, length: int, width: int, seed: int, dtype: torch.dtype = torch.float64, low: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors between `low` and 1, a tenth of them exactly 0 and a tenth exactly 1; what is added; an initial state."""
    generator = torch.Generator().manual_seed(seed)
    a_btd = low + (1 - low) * torch.rand(batch, length, width, generator=generator, dtype=torch.float64)
    kind_btd = torch.randint(0, 10, a_btd.shape, generator=generator)
    a_btd = a_btd.masked_fill(kind_btd == 0, 0.0).masked_fill(kind_btd == 1, 1.0)
    b_btd = torch.randn(a_btd.shape, generator=generator, dtype=torch.float64)
    initial_bd = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return a_btd.to(dtype), b_btd.to(dtype), initial_bd.to(dtype)


@given(
    batch=st.integers(1, 3),
    length=st.one_of(st.integers(1, 3 * SHORT), st.integers(BLOCK * (SHORT + 4), BLOCK * (SHORT + 5))),
    width=st.integers(1, 4),
    seed=st.integers(0, 9),
    started=st.booleans(),
)
def test_states_and_gradients_equal_a_loop(batch: int, length: int, width: int, seed: int, started: bool) -> None:
    a_btd, b_btd, initial_bd = draw(batch, length, width, seed)
    inputs = [tensor.requires_grad_() for tensor in ((a_btd, b_btd, initial_bd) if started else (a_btd, b_btd))]
    ours, theirs = linear_scan(*inputs), linear_scan_reference(*inputs)
    weights = [torch.randn(one.shape, dtype=one.dtype, generator=torch.Generator().manual_seed(3)) for one in theirs]
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=1e-10, rtol=1e-10)
    losses = [sum((one * weight).sum() for one, weight in zip(found, weights, strict=True)) for found in (ours, theirs)]
    gradients = [torch.autograd.grad(loss, inputs) for loss in losses]  # type: ignore[arg-type]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("length", [1, 2, SHORT, SHORT + 5, 40])
def test_gradcheck(length: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in draw(2, length, 2, 0, low=0.2)]
    assert torch.autograd.gradcheck(linear_scan, inputs)


@given(pieces=st.lists(st.integers(1, 60), min_size=1, max_size=5), seed=st.integers(0, 5))
def test_pieces_continue_each_other(pieces: list[int], seed: int) -> None:
    a_btd, b_btd, state_bd = draw(2, sum(pieces), 3, seed)
    whole_btd, _ = linear_scan(a_btd, b_btd, state_bd)
    found = []
    for a_bnd, b_bnd in zip(a_btd.split(pieces, dim=1), b_btd.split(pieces, dim=1), strict=True):
        h_bnd, state_bd = linear_scan(a_bnd, b_bnd, state_bd)
        found.append(h_bnd)
    torch.testing.assert_close(torch.cat(found, dim=1), whole_btd, atol=1e-10, rtol=1e-10)


def test_products_that_vanish_and_infinite_decay_are_exact() -> None:
    """Products of 2000 strong decays are 0 in fp32; dividing by them would give NaN."""
    _, b_btd, initial_bd = draw(1, 2000, 2, 0, torch.float32)
    a_btd = torch.full_like(b_btd, 1e-6).requires_grad_()
    h_btd, _ = linear_scan(a_btd, b_btd, initial_bd)
    (gradient_btd,) = torch.autograd.grad(h_btd.sum(), a_btd)
    reference_btd, _ = linear_scan_reference(a_btd, b_btd, initial_bd)
    torch.testing.assert_close(h_btd, reference_btd)
    assert bool(gradient_btd.isfinite().all())


def test_half_precision_is_accumulated_in_fp32() -> None:
    """4000 steps of one bf16 grain each, which a bf16 sum would stop counting at 256."""
    ones_btd = torch.ones(1, 4000, 1, dtype=torch.bfloat16)
    h_btd, last_bd = linear_scan(ones_btd, ones_btd)
    assert h_btd.dtype == torch.float32 and float(last_bd) == 4000.0


@pytest.mark.parametrize("backwards", [False, True])
def test_walks_in_both_directions_change_only_the_states(backwards: bool) -> None:
    a_btd, b_btd, start_bd = draw(2, 77, 3, 1)
    before = a_btd.clone(), start_bd.clone()
    h_btd = b_btd.clone()
    advance(h_btd, a_btd, start_bd, backwards)
    order = [1] if backwards else []
    expected, _ = linear_scan_reference(a_btd.flip(order), b_btd.flip(order), start_bd)
    torch.testing.assert_close(h_btd, expected.flip(order), atol=1e-10, rtol=1e-10)
    assert torch.equal(a_btd, before[0]) and torch.equal(start_bd, before[1])


def test_a_compiler_sees_one_operator_and_no_steps() -> None:
    inputs = [tensor.requires_grad_() for tensor in draw(2, 200, 3, 0, torch.float32)]
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(linear_scan, fullgraph=True, backend=record)
    torch.testing.assert_close(compiled(*inputs)[0], linear_scan(*inputs)[0])
    (nodes,) = graphs
    assert sum("linear_scan" in node for node in nodes) == 1 and len(nodes) < 12
    torch._dynamo.reset()
    whole = torch.compile(linear_scan, fullgraph=True, backend="aot_eager")
    losses = [function(*inputs)[0].pow(2).sum() for function in (whole, linear_scan)]
    for left, right in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(left, right)


def test_operators_are_registered_as_torch_wants_them() -> None:
    a_btd, b_btd, initial_bd = draw(2, 20, 3, 0, torch.float32)
    torch.library.opcheck(torch.ops.torchstone.linear_scan.default, (a_btd, b_btd, initial_bd))
    torch.library.opcheck(torch.ops.torchstone.linear_scan_backward.default, (b_btd, a_btd, b_btd.clone(), initial_bd))
