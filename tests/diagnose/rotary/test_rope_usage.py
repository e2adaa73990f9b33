"""Frequency usage and offset heads: planted heads are found with their offset, on hand-made layers and on real models."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from subjects import byte_subject
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchstone.diagnose.rotary.frequency_usage import (
    OFFSETS,
    LayerUsage,
    _masses,
    _recomputed_masses,
    frequency_usage,
    pair_norms,
    share,
)
from torchstone.diagnose.rotary.offset_heads import OffsetHead, offset_heads
from torchstone.diagnose.rotary.recomputed import LayerInputs
from torchstone.diagnose.rotary.rope_usage import rope_usage_finding
from torchstone.diagnose.rotary.rope_usage_tables import mean_share, usage_shares, usage_table
from torchstone.diagnose.rotary.theory import rotated, spread
from torchstone.diagnose.subject import Activations, AttentionLayer, Rotation, Subject
from torchstone.errors import ConfigError, DataError
from torchstone.nn.position.rotary import turn
from torchstone.report.finding import Finding

LENGTH = 24
TEXT = "the quick brown fox jumps over the lazy dog, again and again and again. " * 20


class Planted(Subject):
    """One layer made by hand: queries, keys and values are given before rotation, [b, h, t, d]; keys may be grouped.

    `sink` is added to the scores of the first key, which queries and keys do not show. `asked` notes who asked for maps.
    """

    name, architecture, vocab_size, width, max_length = "planted", "hand-made", 256, 8, None

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, frequencies: Tensor | None, turning: bool = True, sink: float = 0.0
    ) -> None:
        self.model, self.sink, self.asked = nn.Linear(1, 1), sink, list[bool]()
        layer: Any = SimpleNamespace(index=0, name="layer", heads=q.shape[1], kv_heads=k.shape[1], window=None)
        layer.head_dim, layer.value_dim = q.shape[-1], v.shape[-1]
        layer.rotation = None if frequencies is None else Rotation(frequencies, "by hand")
        self.layers: tuple[AttentionLayer, ...] = (layer,)
        repeats = q.shape[1] // k.shape[1]
        self.q, self.k, self.v = q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        self.turning = turning

    def visit(self, tokens_bt: Tensor, look: Any, *, weights: bool = False, layers: Any = None) -> None:
        assert tokens_bt.shape[1] == self.q.shape[2]
        self.asked.append(weights)
        rotation = self.layers[0].rotation
        assert rotation is not None
        angle = torch.arange(tokens_bt.shape[1]).double()[:, None] * rotation.frequencies_m
        q, k = ((turn(x, angle.cos(), angle.sin(), "half") if self.turning else x) for x in (self.q, self.k))
        steps = torch.arange(q.shape[2])
        distance = steps[:, None] - steps
        hidden = (distance < 0) | (distance >= (self.layers[0].window or len(steps)))
        scores = q @ k.transpose(-1, -2)
        scores[..., 0] += self.sink
        maps = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        heads = (maps @ self.v).transpose(1, 2)
        q, k, v, maps, heads = (x.float().expand(tokens_bt.shape[0], *x.shape[1:]) for x in (q, k, self.v, maps, heads))
        look(self.layers[0], Activations(q, k, v, maps if weights else None, heads, scale=1.0))

    def _none(self, *args: Any, **settings: Any) -> Any:
        raise NotImplementedError

    decode = logits = losses = hidden_states = head_weight = embedding = _none
    tied = True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def ablate(self, *args: Any, **settings: Any) -> AbstractContextManager[None]:
        raise NotImplementedError

    def untrained(self, seed: int = 0) -> Planted:
        draw = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in (self.q, self.k, self.v))
        assert self.layers[0].rotation is not None
        return Planted(q, k, v, self.layers[0].rotation.frequencies_m)


def ladder(pairs: int = 4, base: float = 100.0) -> Tensor:
    return base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def random(heads: int, length: int = LENGTH, channels: int = 8, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, length, channels, generator=draw, dtype=torch.float64)


def tokens(length: int = LENGTH, rows: int = 1) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.long)


def planted(backs: dict[int, int], heads: int = 4) -> Planted:
    """Random heads, of which some look a number of tokens back by Thm 5.3."""
    q, k = random(heads, seed=1) / 4, random(heads, seed=2) / 4
    psi_d = spread(400.0, 4)
    for head, back in backs.items():
        q[0, head] = psi_d
        k[0, head] = rotated(psi_d, ladder(), torch.tensor([back]))
    return Planted(q, k, random(heads, seed=3), ladder())


@pytest.mark.parametrize("backs", [{1: 0}, {2: 1}, {0: 0, 3: 1}, {1: 3}, {}])
def test_planted_heads_are_found_with_their_offset(backs: dict[int, int]) -> None:
    found = offset_heads(frequency_usage(planted(backs), tokens()))
    assert {(head.layer, head.head, head.offset) for head in found} == {
        (0, head, -back) for head, back in backs.items()
    }
    assert all(0.9 < head.mass <= 1 for head in found)


def test_alignment_tells_the_diagonal_from_the_token_before() -> None:
    (usage,) = frequency_usage(planted({1: 0, 2: 1}), tokens())
    assert float(usage.aligned_u[1]) == pytest.approx(1, abs=1e-6)
    assert float(usage.aligned_previous_u[2]) == pytest.approx(1, abs=1e-6)
    assert float(usage.aligned_previous_u[1]) < 0.9 and float(usage.aligned_u[2]) < 0.9
    assert usage.aligned_u[[0, 3]].abs().max() < 0.5


def test_usage_is_the_same_before_and_after_rotation() -> None:
    arguments = (random(4), random(2, seed=1), random(2, seed=2), ladder())
    before = frequency_usage(Planted(*arguments, turning=False), tokens())[0]
    after = frequency_usage(Planted(*arguments), tokens())[0]
    torch.testing.assert_close(before.q_um, after.q_um, atol=1e-6, rtol=0)
    torch.testing.assert_close(before.k_um, after.k_um, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.q_um, pair_norms(arguments[0]).mean((0, 2)), atol=1e-6, rtol=0)


def test_grouped_keys_count_for_every_query_head_and_are_ranked_once() -> None:
    q, k = random(4), random(2, seed=1)
    k[0, 1, :, [1, 5]] *= 50
    (usage,) = frequency_usage(Planted(q, k, random(2, seed=2), ladder()), tokens())
    torch.testing.assert_close(usage.k_um, pair_norms(k).mean((0, 2)).repeat_interleave(2, 0), atol=1e-5, rtol=1e-6)
    expected = (usage.q_um * usage.k_um).unflatten(0, (2, 2)).mean(1)
    assert usage.ranking().shape == (2, 4) and int(usage.ranking()[1, 0]) == 1
    for group in range(2):
        assert expected[group][usage.ranking()[group]].tolist() == sorted(expected[group].tolist(), reverse=True)


def test_shares_go_by_frequency_and_pairs_that_stand_still_are_slowest() -> None:
    frequencies = torch.tensor([0.0, 1.0, 0.5, 0.1], dtype=torch.float64)  # as in variant reversed
    q, k = (torch.zeros(1, 1, LENGTH, 8, dtype=torch.float64) for _ in range(2))
    q[..., 0], q[..., 1], k[..., 0], k[..., 1] = 3, 1, 2, 2
    (usage,) = frequency_usage(Planted(q, k, random(1), frequencies), tokens())
    assert usage.fastest_first_m.tolist() == [1, 2, 3, 0]
    assert float(usage.slow_share_u) == pytest.approx(6 / 8) and float(usage.fast_share_u) == pytest.approx(2 / 8)
    assert usage.slow_energy[:2] == (pytest.approx(0.9), pytest.approx(0.5))


def test_values_are_split_the_same_way() -> None:
    v = torch.zeros(1, 2, LENGTH, 8, dtype=torch.float64)
    v[..., 3], v[..., 7], v[..., 0] = 3, 4, 5
    (usage,) = frequency_usage(Planted(random(2), random(2, seed=1), v, ladder()), tokens())
    assert usage.v_hn[0].tolist() == [5, 0, 0, 5] and usage.slow_energy[2] == pytest.approx(0.5)


def test_rows_are_averaged_and_may_be_seen_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = planted({1: 0})
    whole = frequency_usage(subject, tokens(rows=5))
    monkeypatch.setattr("torchstone.diagnose.rotary.frequency_usage.HELD_NUMBERS", 1)
    parts = frequency_usage(subject, tokens(rows=5))
    for name in ("q_um", "v_hn", "mass_oh", "aligned_u"):
        torch.testing.assert_close(getattr(whole[0], name), getattr(parts[0], name))


def test_a_sink_on_the_first_token_is_no_offset() -> None:
    """Every query puts all its weight on token 0, which is at another offset for each."""
    q, k = torch.ones(1, 1, LENGTH, 8, dtype=torch.float64), torch.zeros(1, 1, LENGTH, 8, dtype=torch.float64)
    k[:, :, 0] = 100
    (usage,) = frequency_usage(Planted(q, k, random(1), torch.full((4,), 1e-9, dtype=torch.float64)), tokens())
    assert float(usage.mass_oh.max()) < 1e-6 and offset_heads([usage]) == []


def test_signed_weights_are_taken_as_shares() -> None:
    """Of Σ|weight|, so that a weight of 1.5 beside one of −0.5 is three quarters."""
    steps = torch.arange(LENGTH)
    weights_bhts = torch.zeros(1, 2, LENGTH, LENGTH)
    weights_bhts[0, 0, steps, steps], weights_bhts[0, 0, 1:, 0] = 1.5, -0.5
    weights_bhts[0, 1, steps[1:], steps[1:] - 1], weights_bhts[0, 1, steps[3:], steps[3:] - 3] = -0.2, 0.6
    expected_ho = torch.zeros(2, OFFSETS, dtype=torch.float64)
    expected_ho[0, 0], expected_ho[1, 1], expected_ho[1, 3] = 0.75, -0.25, 0.75
    torch.testing.assert_close(_masses(weights_bhts)[0], expected_ho, atol=1e-7, rtol=0)


def test_offset_heads_are_those_above_the_threshold() -> None:
    usage = _usage_with_mass(torch.tensor([[0.2, 0.95], [0.96, 0.01]]))
    assert offset_heads([usage]) == [
        OffsetHead(0, 0, -1, pytest.approx(0.96)),
        OffsetHead(0, 1, 0, pytest.approx(0.95)),
    ]
    assert offset_heads([usage], threshold=0.99) == []


def _mapped(subject: Planted) -> Tensor:
    """Masses [o, h] of the subject's own maps."""
    found: list[Tensor] = []
    subject.visit(tokens(), lambda layer, seen: found.append(_masses(seen.weights_bhts)[0].T), weights=True)
    subject.asked.clear()
    return found[0]


@pytest.mark.parametrize("numbers", [1 << 22, 300, 1])
@pytest.mark.parametrize("window", [None, 5])
def test_masses_are_computed_again_without_maps(
    monkeypatch: pytest.MonkeyPatch, window: int | None, numbers: int
) -> None:
    monkeypatch.setattr("torchstone.diagnose.rotary.recomputed.BLOCK_NUMBERS", numbers)
    subject = planted({1: 0, 2: 1})
    subject.layers[0].window = window
    expected_oh = _mapped(subject)
    (usage,) = frequency_usage(subject, tokens(rows=2))
    torch.testing.assert_close(usage.mass_oh, expected_oh, atol=1e-6, rtol=0)
    assert subject.asked == [False]


def test_maps_are_read_where_queries_and_keys_do_not_explain_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = planted({1: 0})
    subject.sink = 4.0
    expected_oh = _mapped(subject)
    monkeypatch.setattr("torchstone.diagnose.rotary.frequency_usage.HELD_NUMBERS", 1)
    (usage,) = frequency_usage(subject, tokens(rows=2))
    torch.testing.assert_close(usage.mass_oh, expected_oh)
    assert subject.asked == [False, False, True, True]
    subject.sink = 0.0
    assert float((_mapped(subject) - expected_oh).abs().max()) > 0.05  # so that recomputed ones would be wrong


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.numbers = max(self.numbers, found.untyped_storage().nbytes() // found.element_size())
        return found


def test_memory_does_not_grow_with_the_square_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchstone.diagnose.rotary.recomputed.BLOCK_NUMBERS", 1 << 16)
    length, heads = 1024, 4
    q, k, v = (random(heads, length, seed=seed)[0].float() for seed in range(3))
    with Largest() as largest:
        _recomputed_masses(LayerInputs(q, k, v, None, None, 1.0, None))
    assert largest.numbers <= 1 << 16 < heads * length * length // 50


def test_heads_that_use_nothing_are_left_out_of_means() -> None:
    """A head whose keys are 0 has no shares: the mean is that of the others, and the tables have an empty cell."""
    whole, dead = planted({}), planted({})
    dead.k[:, 2] = 0
    (usage,), (other,) = frequency_usage(dead, tokens()), frequency_usage(whole, tokens())
    kept = [0, 1, 3]
    assert bool(usage.slow_share_u[2].isnan())
    assert mean_share([usage], "slow_share_u") == pytest.approx(float(other.slow_share_u[kept].mean()))
    assert usage.slow_energy[1] == pytest.approx(
        float(share(other.k_energy_um, other.fastest_first_m[-1:])[kept].mean())
    )
    parts_um = other.product_um / other.product_um.sum(1, keepdim=True)
    torch.testing.assert_close(usage_shares(usage), parts_um[kept].mean(0))
    assert usage_table([usage], [other]).rows[2][4] is None


def test_rows_have_the_length_of_training_at_most_and_a_note_beyond() -> None:
    short = planted({})
    short.max_length = LENGTH
    finding = rope_usage_finding(short, [TEXT], count=2)
    assert finding.notes[0].startswith(f"2 rows of {LENGTH} tokens")
    decoder = byte_subject()  # trained on 32 tokens
    assert rope_usage_finding(decoder, [TEXT], count=2).notes[0].startswith("2 rows of 32 tokens")
    beyond = rope_usage_finding(decoder, [TEXT], count=2, length=40)
    assert "Rows are longer than the 32 tokens that the model was trained on." in beyond.notes


def _usage_with_mass(mass_oh: Tensor) -> LayerUsage:
    ones = torch.ones(2, 4, dtype=torch.float64)
    return LayerUsage(0, 1, ladder(), ones, ones, ones, ones, ones, ones, ones[:, 0], ones[:, 0], mass_oh.double())


def test_rows_too_short_are_refused() -> None:
    with pytest.raises(DataError, match=f"rows of {OFFSETS} tokens.*at least {OFFSETS + 1}"):
        frequency_usage(planted({}), tokens(OFFSETS))


def test_without_rotation_the_positions_found_are_named() -> None:
    with pytest.raises(ConfigError, match="no rotary module found"):
        frequency_usage(Planted(random(1), random(1), random(1), None), tokens())


def test_the_finding_of_planted_heads() -> None:
    finding = rope_usage_finding(planted({0: 0, 3: 1}), [TEXT], length=LENGTH, count=3)
    assert [row[:3] for row in finding.tables[0].rows] in ([(0, 0, 0), (0, 3, -1)], [(0, 3, -1), (0, 0, 0)])
    assert "2 of 4 heads are offset heads" in finding.answer and "untrained: 0" in finding.answer
    assert Finding.model_validate_json(finding.model_dump_json()) == finding
    assert {len(heatmap.x) for heatmap in finding.heatmaps} == {4}
    assert "1 rad (6.28 tokens)" in finding.heatmaps[0].x


def test_a_threshold_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="threshold is 1.5"):
        rope_usage_finding(planted({}), [TEXT], length=LENGTH, threshold=1.5)
