"""Mixtures whose shares change with the stages of a run: every source goes on with its own rows, whatever the borders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchstone.data.batch import Batch
from torchstone.data.mixture import Mixture
from torchstone.data.shares import Phase, Timetable, check_shares, first_difference, row_counts
from torchstone.data.source import DocumentSpan, row_range
from torchstone.data.synthetic.gap_recall import GapRecallConfig
from torchstone.data.synthetic.recall import RecallConfig
from torchstone.errors import ConfigError, DataError


class Numbered:
    """A source whose row number n of a run holds the token n: what was asked of it can be read off a batch."""

    tokenizer = bytes_per_token = None
    vocab_size, length = 10**6, 2

    def __init__(self, name: str = "numbered") -> None:
        self.fingerprint = name

    def batch(self, seed, step, size, start=0, stop=None):
        numbers = torch.tensor([step * size + row for row in row_range(size, start, stop)])
        tokens_bt = numbers[:, None].expand(-1, 2).contiguous()
        return Batch(tokens_bt, tokens_bt, rows=tuple(numbers.tolist()))

    def evaluation(self, size, sequences):
        yield self.batch(0, 0, sequences)

    def documents(self, seed, step, size):
        return [[DocumentSpan(f"{self.fingerprint}-{step * size + row}", "generated", 0, 2)] for row in range(size)]


def three(phases) -> Mixture:
    sources = [Numbered(name) for name in "abc"]
    return Mixture(sources, [0.5, 0.25, 0.25]).in_phases(phases)


def used(mixture: Mixture, batch: Batch) -> list[list[int]]:
    """Row numbers of each source in a batch."""
    source_n, number_n = np.divmod(batch.tokens_bt[:, 0].numpy(), Numbered.vocab_size)
    return [number_n[source_n == index].tolist() for index in range(len(mixture.parts))]


@st.composite
def plans(draw):
    """Phases of three sources in sixteenths, a batch of 16, 32 or 48 rows, and a number of steps."""
    rows, steps = draw(st.sampled_from([16, 32, 48])), draw(st.integers(1, 12))
    begins = [0, *sorted(draw(st.sets(st.integers(1, steps + 3), max_size=4)))]
    phases = []
    for index, begin in enumerate(begins):
        first = draw(st.integers(0, 16))
        second = draw(st.integers(0, 16 - first))
        shares = (first / 16, second / 16, (16 - first - second) / 16)
        phases.append(Phase(f"stage {index}", begin, shares))
    seen = draw(st.sampled_from(range(len(phases))))
    phases[seen] = Phase(phases[seen].name, phases[seen].begin, (0.5, 0.25, 0.25))
    return phases, rows, steps


@settings(deadline=None)
@given(plans())
def test_every_row_is_used_once_and_in_order(plan):
    """Over any phases and batch sizes: no row of a source is lost, doubled or out of order, and the shares hold."""
    phases, rows, steps = plan
    mixture = three(phases)
    seen: list[list[int]] = [[], [], []]
    for step in range(steps):
        batch = mixture.batch(0, step, rows)
        found = used(mixture, batch)
        phase = next(phase for phase in reversed(phases) if phase.begin <= step)
        assert [len(numbers) for numbers in found] == [share * rows for share in phase.shares]
        assert mixture.timetable(rows).before(step) == tuple(len(numbers) for numbers in seen)
        for numbers, new in zip(seen, found, strict=True):
            numbers += new
        assert batch.rows == tuple(range(step * rows, (step + 1) * rows))
        names = [row[0].id for row in mixture.documents(0, step, rows)]
        assert names == [f"{name}-{n}" for name, numbers in zip("abc", found, strict=True) for n in numbers]
    for numbers in seen:
        assert numbers == list(range(len(numbers)))


@settings(deadline=None)
@given(plans(), st.data())
def test_any_rows_of_any_step_can_be_asked_for_alone(plan, data):
    """Steps in any order and batches cut anywhere (ranks, micro-batches) give the rows of the whole batch."""
    phases, rows, steps = plan
    step = data.draw(st.integers(0, steps))
    cuts = sorted({0, rows, *data.draw(st.sets(st.integers(1, rows - 1), max_size=4))})
    whole = three(phases).batch(0, step, rows)
    mixture = three(phases)
    mixture.batch(0, steps, rows)
    parts = [mixture.batch(0, step, rows, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat([part.tokens_bt for part in parts]), whole.tokens_bt)
    assert torch.equal(torch.cat([part.targets_bt for part in parts]), whole.targets_bt)
    assert sum((part.rows for part in parts), ()) == whole.rows


PHASES = [Phase("stable", 0, (1.0, 0.0)), Phase("decay", 3, (0.25, 0.75))]


def test_texts_go_on_where_they_were(stories) -> None:
    """The rows of a text over all phases are those that it gives alone, one after the other."""
    text, other = stories(), stories(mask_documents=True)
    mixture = Mixture([text, other], [0.5, 0.5], "shared").in_phases(PHASES)
    batches = [mixture.batch(7, step, 8) for step in range(5)]
    assert [len(batch.tokens_bt) for batch in batches] == [8] * 5
    first_bt = torch.cat([*(batch.tokens_bt for batch in batches[:3]), *(batch.tokens_bt[:2] for batch in batches[3:])])
    second_bt = torch.cat([batch.tokens_bt[2:] for batch in batches[3:]])
    assert torch.equal(first_bt, text.batch(7, 0, 28).tokens_bt)
    assert torch.equal(second_bt, other.batch(7, 0, 12).tokens_bt)
    spans = [row for step in range(5) for row in mixture.documents(7, step, 8)[: 8 if step < 3 else 2]]
    assert spans == text.documents(7, 0, 28)
    assert batches[0].documents_bt is None and batches[3].documents_bt is not None


def test_equal_shares_in_every_phase_are_no_phases(stories) -> None:
    text, task = stories(), RecallConfig(cells=16).build(None)
    plain = Mixture([text, task], [0.75, 0.25])
    phased = plain.in_phases([Phase("stable", 0, (0.75, 0.25)), Phase("decay", 2, (0.75, 0.25))])
    assert phased.fingerprint == plain.fingerprint
    for step in range(4):
        assert torch.equal(phased.batch(1, step, 8).tokens_bt, plain.batch(1, step, 8).tokens_bt)
        assert phased.documents(1, step, 8) == plain.documents(1, step, 8)


def test_tasks_never_repeat_a_row_over_a_border() -> None:
    tasks = [RecallConfig(cells=16).build(None), GapRecallConfig(cells=16).build(None)]
    phases = [Phase("stable", 0, (0.75, 0.25)), Phase("decay", 2, (0.25, 0.75))]
    mixture = Mixture(tasks, [0.5, 0.5]).in_phases(phases)
    rows = torch.cat([mixture.batch(0, step, 8).tokens_bt for step in range(6)])
    assert len({tuple(row) for row in rows.tolist()}) == 48
    names = [row[0].id for step in range(6) for row in mixture.documents(0, step, 8)]
    assert len(set(names)) == 48
    again = Mixture(tasks, [0.5, 0.5]).in_phases(phases)
    assert torch.equal(again.batch(0, 5, 8).tokens_bt, rows[40:])
    assert not torch.equal(again.batch(1, 5, 8).tokens_bt, rows[40:])


def test_a_mixture_inside_goes_on_too_and_keeps_its_shares_in_every_batch(stories) -> None:
    inner = Mixture([stories(), stories(mask_documents=True)], [0.5, 0.5], "shared")
    outer = Mixture([inner, stories()], [0.5, 0.5], "shared").in_phases(
        [Phase("stable", 0, (0.25, 0.75)), Phase("decay", 2, (0.5, 0.5))]
    )
    found = torch.cat([outer.batch(0, step, 8).tokens_bt[: 2 if step < 2 else 4] for step in range(4)])
    expected = torch.cat([inner.batch(0, block, 2).tokens_bt for block in range(6)])
    assert torch.equal(found, expected)


def test_held_out_rows_keep_the_shares_of_the_mixture(stories) -> None:
    mixture = Mixture([stories(), stories(length=32)], [0.75, 0.25], "shared")
    phased = mixture.in_phases(PHASES)
    for before, after in zip(mixture.evaluation(4, 8), phased.evaluation(4, 8), strict=True):
        assert torch.equal(before.tokens_bt, after.tokens_bt) and before.rows == after.rows
    assert phased.counts(8) == [6, 2] and phased.bytes_per_token == mixture.bytes_per_token


def test_the_fingerprint_tells_shares_and_stages_but_not_borders() -> None:
    plain = Mixture([Numbered("a"), Numbered("b")], [0.5, 0.5])
    found = {
        mixture.fingerprint
        for mixture in (
            plain,
            plain.in_phases(PHASES),
            plain.in_phases([PHASES[0], Phase("decay", 3, (0.5, 0.5))]),
            plain.in_phases([PHASES[0], Phase("warmup", 3, (0.25, 0.75))]),
        )
    }
    assert len(found) == 4
    moved = plain.in_phases([PHASES[0], Phase("decay", 9, (0.25, 0.75))])
    assert moved.fingerprint == plain.in_phases(PHASES).fingerprint


# Errors -------------------------------------------------------------------------------------------


def test_shares_of_a_phase_may_be_zero_but_must_add_up() -> None:
    check_shares([1.0, 0.0], 2, "stage decay", absent=True)
    for shares, words in (
        (
            [0.5, 0.4],
            r"stage decay: 2 sources .*\[0.5, 0.4\], which add up to 0.9; give one share of 0 or more for each",
        ),
        ([1.5, -0.5], "add up to 1; give one share of 0 or more"),
        ([1.0], "2 sources have the shares"),
        ([], "add up to 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_shares(shares, 2, "stage decay", absent=True)


def test_a_share_too_small_for_a_row_is_named_with_its_stage() -> None:
    assert row_counts((0.75, 0.25, 0.0), 4) == (3, 1, 0)
    with pytest.raises(DataError, match=r"8 sequences .* leave source 1 .* without a row in the stage decay"):
        Timetable([Phase("stable", 0, (0.5, 0.5)), Phase("decay", 5, (0.97, 0.03))], 8)


def test_a_source_absent_from_all_phases_is_refused() -> None:
    phases = [Phase("warmup", 0, (0.5, 0.0, 0.5)), Phase("decay", 5, (1.0, 0.0, 0.0))]
    with pytest.raises(ConfigError, match=r"source 1 .* absent from all stages of the run \(warmup, decay\)"):
        Timetable(phases, 8)


def test_the_first_step_that_a_plan_changes() -> None:
    later = [PHASES[0], Phase("decay", 9, (0.25, 0.75))]
    assert first_difference(PHASES, later, 3) is None
    assert first_difference(PHASES, later, 4) == (3, PHASES[1], PHASES[0])
    assert first_difference(PHASES, PHASES, 100) is None
    assert first_difference(PHASES, [Phase("other", 0, (1.0, 0.0)), PHASES[1]], 100) is None
