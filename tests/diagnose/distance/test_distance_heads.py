"""Distance heads: sums against the plain definition, planted heads, the null model, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchstone.diagnose.distance import attended_pairs, scores
from torchstone.diagnose.distance.attended_pairs import add_attended, add_random
from torchstone.diagnose.distance.heads import DistanceSettings, HeadTable, distance_heads
from torchstone.diagnose.distance.sums import DistanceSums, SumsBuilder
from torchstone.diagnose.rotary import recomputed
from torchstone.diagnose.rotary.pairs import contribution, logit_parts, random_pairs, relative_index
from torchstone.diagnose.rotary.recomputed import LayerInputs
from torchstone.diagnose.subject import Activations, Rotation
from torchstone.errors import ConfigError, DataError

HEADS, LENGTH, PAIRS = 3, 40, 4
FREQUENCIES_M = 100.0 ** (-torch.arange(PAIRS) / PAIRS)


def rotate(x_htd: Tensor, frequencies_m: Tensor) -> Tensor:
    """Half-order rotation at positions 0, 1, …"""
    angle_tm = torch.arange(x_htd.shape[1])[:, None] * frequencies_m
    cos, sin = angle_tm.cos(), angle_tm.sin()
    first, second = x_htd.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def inputs(seed: int = 0, heads: int = HEADS, length: int = LENGTH, **settings: Any) -> LayerInputs:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, heads, length, 2 * PAIRS, generator=generator)
    given = {"weights_hts": None, "window": None, "output_the": None, **settings}
    return LayerInputs(rotate(q, FREQUENCIES_M), rotate(k, FREQUENCIES_M), v, scale=0.5, **given)


def sums(
    layer: LayerInputs, skip: int = 0, keys: int | None = None, buckets: tuple[int, ...] = (1, 2, 4)
) -> DistanceSums:
    builder = SumsBuilder(layer.q_htd.shape[0], PAIRS, layer.length, buckets, 0.5, torch.device("cpu"))
    add_attended(layer, builder, skip, keys)
    return builder.sums()


def plain_shift(layer: LayerInputs, skip: int = 0) -> list[float]:
    """The definition, pair by pair."""
    parts = logit_parts(layer.q_htd[None], layer.k_hsd[None])[0].double()
    weights = layer.rows(range(layer.length)).double()
    found = []
    for head in range(parts.shape[0]):
        c, ell, alpha = [], [], []
        for i in range(layer.length):
            for j in range(skip, i):
                positive = parts[head, i, j].clamp(min=0)
                if positive.sum() > 0:
                    c.append(float((positive * relative_index(PAIRS)).sum() / positive.sum()))
                    ell.append(float(torch.log2(torch.tensor(1.0 + i - j, dtype=torch.float64))))
                    alpha.append(float(weights[head, i, j]))
        a = torch.tensor(alpha, dtype=torch.float64) / sum(alpha)
        x, y = torch.tensor(c, dtype=torch.float64), torch.tensor(ell, dtype=torch.float64)
        x, y = x - (a * x).sum(), y - (a * y).sum()
        found.append(float((a * x * y).sum() / ((a * x * x).sum() * (a * y * y).sum()).sqrt()))
    return found


@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("window", [None, 9])
def test_shift_is_its_definition(skip: int, window: int | None) -> None:
    layer = inputs(window=window)
    assert scores.shift_score(sums(layer, skip)).tolist() == pytest.approx(plain_shift(layer, skip), abs=1e-6)


def test_distances_of_attention_are_exact() -> None:
    layer = inputs()
    found, weights_hts = sums(layer, skip=2), layer.rows(range(LENGTH)).double()
    steps = torch.arange(LENGTH)
    distance_ts = steps[:, None] - steps
    for distance in range(LENGTH):
        there = (distance_ts == distance) & (steps >= 2)
        torch.testing.assert_close(found.attention_ht[:, distance], (weights_hts * there).sum((1, 2)))
        assert float(found.queries_t[distance]) == float(there.sum())
    counted = (distance_ts > 0) & (steps >= 2)
    mean_h = (weights_hts * counted * distance_ts).sum((1, 2)) / (weights_hts * counted).sum((1, 2))
    torch.testing.assert_close(scores.mean_distance(found), mean_h)


def test_buckets_hold_every_pair_once() -> None:
    found = sums(inputs(), buckets=(1, 2, 4, 8))
    torch.testing.assert_close(found.bucket_mass_hz.sum(1), found.attention_ht[:, 1:].sum(1))
    far_h = found.attention_ht[:, LENGTH // 2 :].sum(1)
    torch.testing.assert_close(found.far_mass_h, far_h)


@pytest.mark.parametrize("keys", [None, 5])
@pytest.mark.parametrize("queries", [20, 13])
def test_fewer_queries_are_spread_evenly(queries: int, keys: int | None) -> None:
    """Reading some queries is reading them all with the weights of the others set to 0."""
    step = -(-LENGTH // queries)
    weights_hts = inputs().rows(range(LENGTH))
    read_t = torch.zeros(LENGTH).index_fill(0, torch.arange(step - 1, LENGTH, step), 1)
    whole = sums(inputs(weights_hts=weights_hts * read_t[:, None]), 4, keys)
    builder = SumsBuilder(HEADS, PAIRS, LENGTH, (1, 2, 4), 0.5, torch.device("cpu"))
    add_attended(inputs(weights_hts=weights_hts), builder, 4, keys, queries)
    found = builder.sums()
    for name in ("mass_ht", "centre_ht", "parts_hzm", "far_hm", "attention_ht"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    assert float(found.queries_t.sum()) == float(sum(t + 1 - 4 for t in range(step - 1, LENGTH, step) if t >= 4))


@pytest.mark.parametrize("keys", [None, 6])
def test_blocks_equal_the_whole(monkeypatch: pytest.MonkeyPatch, keys: int | None) -> None:
    whole = sums(inputs(), 4, keys)
    monkeypatch.setattr(attended_pairs, "BLOCK_NUMBERS", 1500)
    monkeypatch.setattr(recomputed, "BLOCK_NUMBERS", 1500)
    pieces = sums(inputs(), 4, keys)
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(pieces, name), value, rtol=1e-5, atol=1e-5)


def test_top_keys_are_all_keys_where_there_are_no_more() -> None:
    for keys in (LENGTH - 1, LENGTH, 500):
        torch.testing.assert_close(sums(inputs(), 0, keys).centre_ht, sums(inputs(), 0, None).centre_ht)


def test_top_keys_are_the_most_attended() -> None:
    layer = inputs()
    weights_hts = layer.rows(range(LENGTH)).tril(-1)
    kept_hts = weights_hts * (weights_hts >= weights_hts.topk(3, dim=-1).values[..., -1:])
    expected = sums(inputs(weights_hts=kept_hts))
    torch.testing.assert_close(sums(layer, keys=3).mass_ht, expected.mass_ht)
    torch.testing.assert_close(sums(layer, keys=3).parts_hzm, expected.parts_hzm, rtol=1e-5, atol=1e-5)


def test_sinks_do_not_count() -> None:
    weights_hts = inputs().rows(range(LENGTH))
    plain, other = inputs(weights_hts=weights_hts), inputs(weights_hts=weights_hts)
    other.k_hsd[:, :4] = 100.0
    torch.testing.assert_close(sums(other, 4).parts_hzm, sums(plain, 4).parts_hzm)
    assert not torch.allclose(sums(other, 3).parts_hzm, sums(plain, 3).parts_hzm)


def test_no_key_at_or_after_its_query_counts() -> None:
    weights_hts = inputs().rows(range(LENGTH))
    plain, other = inputs(weights_hts=weights_hts), inputs(weights_hts=weights_hts)
    other.k_hsd[:, -1] = 100.0  # no query comes after the last key
    other.q_htd[:, 0] = 100.0  # nothing comes before the first query
    torch.testing.assert_close(sums(other).parts_hzm, sums(plain).parts_hzm)
    queries_n, keys_n = random_pairs(50, 5000, 4, seed=1)
    assert bool((keys_n < queries_n).all()) and int(keys_n.min()) == 4 and int(queries_n.max()) == 49
    with pytest.raises(ConfigError, match="key after its query"):
        contribution(inputs().q_htd[None], inputs().k_hsd[None], torch.tensor([3]), torch.tensor([4]))


def test_random_pairs_are_even_and_weigh_the_same() -> None:
    queries_n, keys_n = random_pairs(6, 60_000, 1, seed=0)
    counts = torch.bincount(queries_n * 6 + keys_n, minlength=36)
    found = counts[counts > 0].double()
    assert len(found) == 10 and float(found.std() / found.mean()) < 0.05
    layer, builder = inputs(), SumsBuilder(HEADS, PAIRS, LENGTH, (1, 2), 0.5, torch.device("cpu"))
    pairs = random_pairs(LENGTH, 400, 4, seed=0)
    add_random(layer, builder, 4, pairs)
    parts_hnm = logit_parts(layer.q_htd[None], layer.k_hsd[None])[0][:, pairs[0], pairs[1]]
    torch.testing.assert_close(builder.sums().positive_hm, parts_hnm.double().clamp(min=0).sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.mean_distance(builder.sums()), scores.mean_distance(sums(layer, 4)))


def test_attention_that_queries_and_keys_do_not_explain_is_refused() -> None:
    layer = inputs()
    right = (layer.rows(range(LENGTH)) @ layer.v_hse).transpose(0, 1)  # type: ignore[operator]
    sums(inputs(output_the=right))
    with pytest.raises(ConfigError, match="maps='model'"):
        sums(inputs(output_the=2 * right))


class Stub:
    """A subject with one layer of given queries and keys."""

    def __init__(self, q_htd: Tensor, k_htd: Tensor, **layer: Any) -> None:
        heads, _, width = q_htd.shape
        rotation = Rotation(FREQUENCIES_M.double(), "rotary")
        known = {"heads": heads, "kv_heads": heads, "rotation": rotation, "window": None, "name": "stub", **layer}
        self.layers = (SimpleNamespace(index=0, head_dim=width, **known),)
        self.device, self.seen = torch.device("cpu"), Activations(
            q_htd[None], k_htd[None], k_htd[None], None, torch.zeros(()), 0.5, layer.get("maps_per_head", 1)
        )  # fmt: skip

    def describe(self) -> str:
        return "stub"

    def visit(self, tokens_bt: Tensor, look: Any, *, weights: bool, layers: Any) -> None:
        layer = LayerInputs(self.seen.q_bhtd[0], self.seen.k_bhsd[0], None, None, None, 0.5, None)
        weights_bhts = layer.rows(range(layer.length))[None]
        output_bthe = (weights_bhts @ self.seen.v_bhse).transpose(1, 2)
        look(self.layers[0], Activations(**{**vars(self.seen), "weights_bhts": None, "heads_bthe": output_bthe}))


def score_stub(q_htd: Tensor, k_htd: Tensor, **layer: Any) -> HeadTable:
    stub: Any = Stub(q_htd, k_htd, **layer)
    return distance_heads(stub, torch.zeros(1, q_htd.shape[1], dtype=torch.long), DistanceSettings(keys=None))


def test_a_planted_head_is_found() -> None:
    """Equal content everywhere and at most a quarter turn: fast pairs lose their agreement with distance, slow ones keep it."""
    generator, length = torch.Generator().manual_seed(0), 128
    mixed_htd = torch.randn(3, length, 2 * PAIRS, generator=generator)
    planted_1td = torch.full((1, length, 2 * PAIRS), 0.1)
    slow_m = torch.tensor([0.012, 0.008, 0.004, 0.0])
    q_htd, k_htd = (rotate(torch.cat([x, planted_1td]), slow_m) for x in (mixed_htd, mixed_htd.roll(-1, 1)))
    table = score_stub(q_htd, k_htd)
    assert table.ranked()[0] == (0, 3) and table.selected(0.1) == [(0, 3)]
    shift_h, z_h = table.column("shift"), table.column("z")
    assert float(shift_h[3]) > max(0.3, 2 * float(shift_h[:3].abs().max())) and float(z_h[3]) > 5
    centre_z = table.of(0).centre_hz[3]
    assert float(centre_z[-1]) > float(centre_z[0]) + 0.03
    assert table.lowest(3) != table.heads()[1:] and (0, 3) not in table.lowest(3)


def test_the_null_is_nearly_calibrated_on_random_weights() -> None:
    """Pairs that share a query or a key are not independent, so z is a little too large: hence the untrained model."""
    z = []
    for seed in range(6):
        layer = inputs(seed, heads=8, length=96)
        found = sums(layer, 4)
        null = scores.permutation_null(found, scores.shift_score, 200, seed)
        assert float(null.mean_h.abs().max()) < 0.05
        z.append(null.z(scores.shift_score(found)))
    z_n = torch.cat(z)
    assert float(z_n.abs().max()) < 5 and 0.5 < float(z_n.square().mean()) < 4
    assert float(z_n.mean().abs()) < 0.7


def test_an_offset_head_is_told_apart() -> None:
    length = 64
    angle_tm = torch.arange(length)[:, None] * torch.tensor([2.5, 1.7, 1.1, 0.6])
    steep = torch.cat([angle_tm.cos(), angle_tm.sin()], -1)[None] * 8
    later = steep.roll(-1, 1)  # the key of token j fits the query of token j + 1
    table = score_stub(torch.cat([steep, steep]), torch.cat([steep, later]))
    assert [table.of(0).offset(head) for head in (0, 1)] == [0, 1]
    assert score_stub(0 * steep, 0 * steep).of(0).offset(0) is None


def test_heads_without_a_score_are_left_out() -> None:
    """A head whose queries and keys are 0 has no centre of dimension: it is neither low nor in the middle."""
    q_htd, k_htd = (torch.cat([x, 0 * x[:1]]) for x in (inputs().q_htd, inputs().k_hsd))
    table = score_stub(q_htd, k_htd)
    score_h = table.column("score")
    assert score_h.isnan().tolist() == [False] * HEADS + [True] and table.undefined() == 1
    assert table.lowest(HEADS + 1) == [(0, head) for head in score_h[:HEADS].argsort().tolist()]
    assert (0, HEADS) not in table.ranked()


def test_a_head_without_a_mean_distance_does_not_bar_its_layer() -> None:
    scored = score_stub(inputs().q_htd, inputs().k_hsd).of(0)
    distance_h = torch.tensor([torch.nan, 1.0, 3.0], dtype=torch.float64)
    positive = replace(scored, score_h=torch.ones(HEADS, dtype=torch.float64), mean_distance_h=distance_h)
    assert positive.eligible().tolist() == [False, False, True]


def test_another_definition_can_be_dropped_in() -> None:
    q, k = inputs().q_htd, inputs().k_hsd
    stub: Any = Stub(q, k)
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    table = distance_heads(stub, tokens, DistanceSettings(score=lambda found: found.positive_hm[:, -1]))
    assert table.column("score").tolist() == pytest.approx(sums(inputs(), 4).positive_hm[:, -1].tolist())
    assert bool(table.column("z").isnan().all())  # it does not read distances, so that no null moves it
    with pytest.raises(ConfigError, match="no distance score 'papre'; known: shift, far"):
        DistanceSettings(score="papre")


def test_what_cannot_be_scored_is_refused() -> None:
    q, k = inputs().q_htd, inputs().k_hsd
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    with pytest.raises(ConfigError, match="no rotary positions"):
        score_stub(q, k, rotation=None)
    with pytest.raises(ConfigError, match="no rotary positions"):
        score_stub(q, k, rotation=Rotation(torch.zeros(PAIRS), "turns nothing"))
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        score_stub(q, k, kv_heads=2)
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        score_stub(q, k, kv_heads=None)
    with pytest.raises(ConfigError, match="one map"):
        score_stub(q, k, maps_per_head=2)
    stub: Any = Stub(q, k)
    with pytest.raises(DataError, match=r"rows have 40 tokens.*bucket of 16.*at least 64"):
        distance_heads(stub, tokens, DistanceSettings(buckets=(1, 4, 16)))
    for wrong in ((2, 4), (1, 4, 4), ()):
        with pytest.raises(ConfigError, match="rising distances"):
            distance_heads(stub, tokens, DistanceSettings(buckets=wrong))
    with pytest.raises(ConfigError, match="pairs is 'all'; allowed: attended, random"):
        DistanceSettings(pairs="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 4 channels"):
        relative_index(1)
    for settings in ({"null": 1}, {"skip_sink": -1}, {"far": 1.0}, {"keys": 0}, {"queries": 0}, {"maps": "eager"}):
        with pytest.raises(ConfigError):
            DistanceSettings(**settings)  # type: ignore[arg-type]
    table = distance_heads(stub, tokens)
    with pytest.raises(ConfigError, match="layer 5 has no distance scores"):
        table.of(5)
    with pytest.raises(ConfigError, match="share of the heads"):
        table.selected(0)
