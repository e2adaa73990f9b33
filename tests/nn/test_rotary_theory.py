"""What the p-RoPE paper proves about rotation, as tests: no decay by itself, heads by construction, and what none can do."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.nn.position.base import PositionContext
from torchstone.nn.position.ladder import Variant, kept_pairs, ladder, least_share
from torchstone.nn.position.rotary import Layout, Rotary, RotaryConfig
from torchstone.nn.span import Span


def turned(rotary: Rotary, vectors_td: Tensor, offset: int = 0) -> Tensor:
    """Vectors of successive tokens, turned from position `offset` on."""
    x_bthd = vectors_td[None, :, None]
    return rotary.rotate(x_bthd, x_bthd, Span(), offset)[0][0, :, 0]


def constant(rotary: Rotary, vector_d: Tensor, length: int, offset: int = 0) -> Tensor:
    return turned(rotary, vector_d.expand(length, -1), offset)


def causal(logits_ts: Tensor) -> Tensor:
    return logits_ts.masked_fill(torch.ones_like(logits_ts, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


@pytest.mark.parametrize("distance", [0, 1, 7, 23])
def test_proposition_3_1_any_distance_can_be_preferred(distance: int) -> None:
    """k = R^r q: the logit is a sum of cosines that is largest at distance r and nowhere else."""
    rotary = Rotary(16, 10_000.0, "half")
    q_d = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    length = 60
    queries = constant(rotary, q_d, length)
    keys = constant(rotary, q_d, length, distance)
    logits_ts = queries @ keys.T
    norms_m = q_d.view(2, 8).pow(2).sum(0)
    step_ts = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    expected_ts = (norms_m * ((step_ts + distance)[..., None] * rotary.frequencies()).cos()).sum(-1)
    torch.testing.assert_close(logits_ts, expected_ts, atol=1e-5, rtol=1e-5)
    best_t = logits_ts[distance:].argmax(-1)
    assert torch.equal(best_t, torch.arange(length - distance))


def test_proposition_3_2_gaussian_keys_do_not_decay_and_equal_ones_do() -> None:
    rotary = Rotary(32, 10_000.0, "half")
    generator = torch.Generator().manual_seed(0)
    samples = 4000
    q_nd, k_nd = torch.randn(2, samples, 32, generator=generator).unbind(0)
    for distance in (0, 1, 10, 1000):
        far_nd = rotary.rotate(k_nd[None, None], k_nd[None, None], Span(), distance)[0][0, 0]
        products_n = (q_nd * far_nd).sum(-1)
        assert abs(float(products_n.mean())) < 4 * 32**0.5 / samples**0.5
        assert float(products_n.std()) == pytest.approx(32**0.5, rel=0.1)
    ones = torch.ones(32)
    logits = [float(ones @ constant(rotary, ones, 1, distance)[0]) for distance in (0, 10, 100, 1000)]
    assert logits[0] == pytest.approx(32) and logits == sorted(logits, reverse=True) and logits[3] < 0.6 * logits[0]


@pytest.mark.parametrize("back", [0, 1], ids=["diagonal", "previous token"])
@pytest.mark.parametrize("variant", ["full", "p"])
def test_theorem_5_3_heads_by_construction(variant: Variant, back: int) -> None:
    """The fast pairs alone, which p-RoPE keeps, build heads that look `back` tokens back as sharply as wanted."""
    rotary = Rotary(8, 10_000.0, "half", variant, 1.0 if variant == "full" else 0.5)
    length, found = 24, []
    for norm in (16.0, 256.0, 4096.0):
        psi_d = torch.zeros(8, dtype=torch.float64)
        psi_d[:2] = math.sqrt(norm / 2)  # the two fastest pairs
        maps_ts = causal(constant(rotary, psi_d, length) @ constant(rotary, psi_d, length, back).T)
        found.append(float(maps_ts.diagonal(-back).min()))
    assert found == sorted(found) and found[-1] > 0.999


def test_theorem_5_3_near_returns_need_norm_or_more_frequencies() -> None:
    alone = Rotary(2, 10_000.0, "half")

    def sharpness(rotary: Rotary, norm: float) -> float:
        pairs = rotary.head_dim // 2
        psi_d = torch.cat([torch.full((pairs,), math.sqrt(norm / pairs)), torch.zeros(pairs)]).double()
        return float(causal(constant(rotary, psi_d, 24) @ constant(rotary, psi_d, 24).T)[-1, -1])

    assert sharpness(alone, 64.0) == pytest.approx(0.638, abs=1e-3)
    assert sharpness(alone, 1024.0) == pytest.approx(0.99999, abs=1e-5)
    assert sharpness(Rotary(4, 100.0, "half"), 64.0) > 0.9  # two frequencies at the norm of one


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_proposition_5_2_without_rotation_equal_tokens_get_equal_weight(p: float) -> None:
    """bos, x, x: with p = 0 the last row splits its weight evenly over both x, so neither exceeds one half."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rotary = Rotary(4, 10_000.0, "half", "p", p)
    largest = 0.0
    for seed in range(20):
        vectors = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4
        q_td, k_td = (vectors[i][torch.tensor([0, 1, 1])] for i in range(2))
        maps_ts = causal(turned(rotary, q_td) @ turned(rotary, k_td).T)
        if p == 0:
            assert float(maps_ts[2, 2]) == pytest.approx(float(maps_ts[2, 1]), abs=1e-12)
        largest = max(largest, float(maps_ts[2, 2]))
    assert largest <= 0.5 if p == 0 else largest > 0.9


def test_theorem_6_1_only_a_still_pair_matches_at_every_distance() -> None:
    """One pair, equal content: a turning one loses 5 % of its logit after arccos(0.95)/g tokens, a still one never."""
    rotary = Rotary(32, 10_000.0, "half", "p", 0.75)
    frequency_m = rotary.frequencies()
    for pair in (0, 3, 8, 11, 12, 15):
        psi_d = torch.zeros(32, dtype=torch.float64)
        psi_d[pair] = 1.0
        reach = math.inf if frequency_m[pair] == 0 else math.acos(0.95) / float(frequency_m[pair])
        for distance in (0, 1, 10, 100, 1000):
            logit = float(psi_d @ constant(rotary, psi_d, 1, distance)[0])
            if distance <= reach:
                assert logit >= 0.95 - 1e-6
        if reach < 1000:
            assert float(psi_d @ constant(rotary, psi_d, 1, math.ceil(reach) + 1)[0]) < 0.95
    assert frequency_m[12:].count_nonzero() == 0 and frequency_m[:12].all()


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("variant", ["full", "p", "partial", "reversed"])
def test_arranged_weights_are_in_half_order(variant: Variant, layout: Layout) -> None:
    """Pair m stands at m and m + d/2 after arranging; the plain rule on the weights' own channels gives the same logits."""
    head_dim, heads = 12, 2
    rotary = Rotary(head_dim, 100.0, layout, variant, 1.0 if variant == "full" else 0.5)
    pairs, kept = head_dim // 2, rotary.ladder.pairs
    if layout == "interleaved":
        own = [(2 * m, 2 * m + 1) for m in range(pairs)]
    elif variant == "partial":
        own = [(m, m + kept) for m in range(kept)] + [(2 * kept + j, pairs + kept + j) for j in range(pairs - kept)]
    else:
        own = [(m, m + pairs) for m in range(pairs)]
    order = rotary.order().tolist()
    assert [(order[m], order[m + pairs]) for m in range(pairs)] == own
    generator = torch.Generator().manual_seed(0)
    w_q, w_k = torch.randn(2, heads * head_dim, 5, generator=generator, dtype=torch.float64).unbind(0)
    x_btd = torch.randn(1, 4, 5, generator=generator, dtype=torch.float64)
    arranged = [(x_btd @ rotary.arrange(w).T).unflatten(-1, (heads, -1)) for w in (w_q, w_k)]
    q, k = rotary.rotate(*arranged, Span(), 1500)
    plain = [(x_btd @ w.T).unflatten(-1, (heads, -1)) for w in (w_q, w_k)]
    for x in plain:
        for t in range(4):
            for (i, j), frequency in zip(own, rotary.frequencies().tolist(), strict=True):
                angle = (1500 + t) * frequency
                a, b = x[:, t, :, i].clone(), x[:, t, :, j].clone()
                x[:, t, :, i] = a * math.cos(angle) - b * math.sin(angle)
                x[:, t, :, j] = b * math.cos(angle) + a * math.sin(angle)
    expected = torch.einsum("bthd,bshd->bhts", *plain)
    torch.testing.assert_close(torch.einsum("bthd,bshd->bhts", q, k), expected, atol=1e-4, rtol=1e-4)


def test_variants_agree_at_the_start_and_part_with_distance() -> None:
    x = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    variants: list[Variant] = ["p", "partial", "reversed"]
    for offset in (0, 50):
        found = [Rotary(16, 10_000.0, "half", v, 0.5) for v in variants]
        results = [r.rotate(x[..., r.order()], x[..., r.order()], Span(), offset)[0] for r in found]
        back = [result[..., r.order().argsort()] for r, result in zip(found, results, strict=True)]
        gaps = [float((a - b).abs().max()) for a, b in zip(back, back[1:], strict=False)]
        assert max(gaps) == 0 if offset == 0 else min(gaps) > 0.1


def test_scale_divides_positions() -> None:
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    for variant in ("full", "p", "partial", "reversed"):
        p = 1.0 if variant == "full" else 0.5
        plain, scaled = (Rotary(8, 100.0, "half", variant, p, scale) for scale in (1.0, 4.0))  # type: ignore[arg-type]
        torch.testing.assert_close(scaled.rotate(x, x, Span(), 400), plain.rotate(x, x, Span(), 100))
        torch.testing.assert_close(4 * scaled.frequencies(), plain.frequencies())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((7, 100.0, "half", "p", 0.5), "head_dim is 7, which is odd"),
        ((8, 100.0, "half", "p", 1.5), "between 0 and 1"),
        ((8, 100.0, "half", "p", -0.1), "between 0 and 1"),
        ((8, 100.0, "half", "full", 0.5), "full turns every pair"),
        ((8, 100.0, "half", "partial", 0.2), "2r = 0 lanes"),
        ((8, 100.0, "half", "full", 1.0, 0.5), "must be 1 or more"),
    ],
)
def test_refusals(settings: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rotary(*settings)  # type: ignore[arg-type]


def test_warnings() -> None:
    for variant in ("p", "reversed"):
        with pytest.warns(UserWarning, match="no position"):
            still = Rotary(8, 100.0, "half", variant, 0.0)  # type: ignore[arg-type]
        x = torch.randn(1, 2, 1, 8)
        assert still.rotate(x, x, Span(), 9)[0] is x
    with pytest.warns(UserWarning, match="3 turn"):
        cut = Rotary(20, 100.0, "half", "p", 0.33)
    assert int(cut.frequencies().count_nonzero()) == 3
    with pytest.warns(
        UserWarning, match=r"p 0.33 of 10 rotary pairs is 3.3\d*, no whole number: 3 turn; p 0.4 turns 4"
    ):
        Rotary(20, 100.0, "half", "p", 0.33)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Rotary(16, 100.0, "half", "p", 0.75)


def test_a_share_that_rounds_below_a_whole_number_says_so() -> None:
    """0.29 · 200 / 2 is 28.999999999999996, and the share that the warning names turns 29 without one."""
    with pytest.warns(
        UserWarning, match=r"is 28\.999999999999996, no whole number: 28 turn; p (\S+) turns 29"
    ) as caught:
        assert Rotary(200, 100.0, "half", "p", 0.29).ladder.pairs == 28
    named = float(str(caught[0].message).split("; p ")[1].split()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Rotary(200, 100.0, "half", "p", named).ladder.pairs == 29
        for head_dim in range(2, 400, 2):
            for pairs in range(1, head_dim // 2 + 1):
                p = least_share(head_dim, pairs)
                assert kept_pairs(head_dim, p) == ladder(head_dim, 100.0, "p", p, 1.0).pairs == pairs


@pytest.mark.parametrize("variant", ["p", "partial", "reversed"])
def test_a_variant_without_a_share_is_refused(variant: str) -> None:
    with pytest.raises(ValidationError, match=rf"variant {variant} turns a share .* give p"):
        RotaryConfig.model_validate({"variant": variant})
    assert RotaryConfig.model_validate({"variant": variant, "p": 1}).p == 1  # said, not left out
    built = RotaryConfig.model_validate({"variant": variant, "p": 0.5}).build(PositionContext(16, 2, 8))
    assert built.ladder.pairs == 4


def test_the_full_rotation_is_written_in_one_way() -> None:
    given = [RotaryConfig(), RotaryConfig(p=1.0), RotaryConfig(variant="full", p=None)]
    assert given[0] == given[1] == given[2] and given[1].p is None
    assert given[0].build(PositionContext(16, 2, 8)).ladder.pairs == 8
