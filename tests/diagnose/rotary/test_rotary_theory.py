"""Statements of arXiv 2410.06205 as numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstone.diagnose.rotary.theory import (
    constructed_attention,
    constructed_logits,
    measured_reach,
    rotated,
    semantic_reach,
    spread,
)


def ladder(pairs: int, base: float = 10000.0) -> torch.Tensor:
    return base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


@given(distance=st.integers(0, 30), seed=st.integers(0, 20))
def test_any_query_has_a_key_that_is_best_at_any_distance(distance: int, seed: int) -> None:
    """Prop. 3.1: k = R^r q gives Σ‖q⁽ᵐ⁾‖² cos((j − i + r) g_m), whose only maximum is at distance r."""
    q_d = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    frequencies_m = ladder(8)
    key_d = rotated(q_d, frequencies_m, torch.tensor([distance]))[0]
    steps = torch.arange(40)
    queries_td, keys_td = rotated(q_d, frequencies_m, steps), rotated(key_d, frequencies_m, steps)
    logits_s = queries_td[-1] @ keys_td.T
    energy_m = q_d[:8] ** 2 + q_d[8:] ** 2
    angle_sm = (steps - 39 + distance).double()[:, None] * frequencies_m
    torch.testing.assert_close(logits_s, (energy_m * angle_sm.cos()).sum(1))
    assert int(logits_s.argmax()) == 39 - distance


def test_random_vectors_do_not_decay_and_constant_ones_do() -> None:
    """Prop. 3.2 and the remark after it."""
    draw = torch.Generator().manual_seed(0)
    q_nd, k_nd = (torch.randn(20000, 32, dtype=torch.float64, generator=draw) for _ in range(2))
    for distance in (0, 1, 10, 300):
        angle_m = distance * ladder(16)
        cos, sin = angle_m.cos(), angle_m.sin()
        turned = torch.cat([k_nd[:, :16] * cos - k_nd[:, 16:] * sin, k_nd[:, 16:] * cos + k_nd[:, :16] * sin], 1)
        products = (q_nd * turned).sum(1)
        assert abs(float(products.mean())) < 4 * float(products.std()) / math.sqrt(20000)
    ones = torch.ones(32, dtype=torch.float64)
    decay = rotated(ones, ladder(16), torch.arange(2000)) @ ones
    near, middle, far = (float(decay[a:b].mean()) for a, b in ((0, 10), (10, 100), (100, 1000)))
    assert float(decay[0]) == 32 and near > 1.3 * middle > 1.3 * 1.3 * far


@pytest.mark.parametrize(("amplitude", "weight"), [(64.0, 0.638), (1024.0, 0.99999)])
@pytest.mark.parametrize("back", [0, 1])
def test_one_frequency_makes_offset_heads(amplitude: float, weight: float, back: int) -> None:
    attention_ts = constructed_attention(amplitude, [1.0], 24 + back, back)
    assert float(attention_ts[-1, -1 - back]) == pytest.approx(weight, abs=6e-4)
    assert int(attention_ts[-1].argmax()) == 23


def test_near_returns_are_why_one_frequency_needs_a_large_norm() -> None:
    logits = constructed_logits(1.0, [1.0], 45)[44]
    for gap, printed in ((6, 0.960), (19, 0.989), (44, 0.9998)):
        assert float(logits[44 - gap]) == pytest.approx(printed, abs=6e-4)
    alone = float(constructed_attention(64.0, [1.0], 24)[-1, -1])
    several = float(constructed_attention(64.0, ladder(8, 100.0).tolist(), 24)[-1, -1])
    assert several > alone + 0.2


def test_without_rotation_equal_tokens_get_equal_weight() -> None:
    """Prop. 5.2: tokens [bos, x, x] force α_33 = α_32 < 1/2 whatever the head's weights are."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        x_td = torch.randn(2, 4, dtype=torch.float64, generator=draw)[[0, 1, 1]]
        q, k = (torch.randn(4, 4, dtype=torch.float64, generator=draw) for _ in range(2))
        weights = (x_td @ q @ k.T @ x_td.T)[2].softmax(0)
        assert float(weights[2]) == pytest.approx(float(weights[1])) and float(weights[2]) < 0.5


@given(frequency=st.floats(1e-3, 1.0))
def test_a_match_drifts_after_as_many_tokens_as_the_formula_says(frequency: float) -> None:
    assert semantic_reach(frequency) == pytest.approx(0.318 / frequency, rel=2e-3)
    assert measured_reach(frequency, 400) == min(400, math.floor(semantic_reach(frequency)))


def test_only_a_pair_that_does_not_turn_serves_meaning_at_every_length() -> None:
    """Thm 6.1 for a tolerance: every turning pair fails at some length."""
    for frequency in (1.0, 0.3, 0.01, 1e-3):
        assert measured_reach(frequency, 4000) < 4000
    assert measured_reach(0.0, 4000) == 4000 and semantic_reach(0.0) == math.inf


def test_the_norm_is_spread_evenly() -> None:
    psi_d = spread(5.0, 4)
    assert float(psi_d @ psi_d) == pytest.approx(5.0)
    assert torch.equal(psi_d[:4], psi_d[:1].expand(4)) and not psi_d[4:].any()
