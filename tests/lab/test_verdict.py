"""Verdicts from cells: pairing, failures, sequential looks, items."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from coin import Coin

from torchstone.errors import StudyError
from torchstone.lab.record import Outcome
from torchstone.lab.study import ZERO, Arm, Claim, Gate, Measurement
from torchstone.lab.verdict import Design, effect_before, judge

CLAIM = Claim(id="c", sentence="x is lower", metric="loss", arm="x", baseline="base")


class Claims:
    """Stands for a study: `judge` reads only its claims."""

    def __init__(self, *claims: Claim) -> None:
        self.claims = claims


def cells(base: list[float], arm: list[float]) -> dict[tuple[str, int], Outcome]:
    found = {}
    for name, values in (("base", base), ("x", arm)):
        for seed, value in enumerate(values):
            found[name, seed] = Outcome("f", Measurement({"loss": value}))
    return found


def verdict(outcomes, design, claim=CLAIM, look=0, previous=()):
    return judge(Claims(claim), outcomes, design, look, previous)[0]


def test_a_clear_paired_advantage_holds_even_under_large_seed_noise():
    base = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = verdict(cells(base, [b - 0.1 - 0.001 * i for i, b in enumerate(base)]), Design.of(5, None))
    assert found.status == "holds"
    assert found.effect == pytest.approx(-0.102)
    assert found.interval.high < 0
    assert [pair.unit for pair in found.pairs] == ["0", "1", "2", "3", "4"]


def test_the_other_direction_fails():
    base = [1.0, 2.0, 3.0]
    assert verdict(cells(base, [b + 0.1 + 0.001 * i for i, b in enumerate(base)]), Design.of(3, None)).status == "fails"


def test_noise_is_inconclusive_and_says_what_would_decide():
    found = verdict(cells([1.0, 1.0, 1.0], [0.9, 1.1, 0.95]), Design.of(3, None))
    assert found.status == "inconclusive"
    assert found.n_needed > 3
    assert found.mde_after > 0


def test_the_margin_counts():
    base = [1.0, 2.0, 3.0, 4.0]
    outcomes = cells(base, [b - 0.1 - 0.001 * i for i, b in enumerate(base)])
    claim = Claim(id="c", sentence="", metric="loss", arm="x", baseline="base", margin=-0.2)
    assert verdict(outcomes, Design.of(4, None), claim).status == "fails"


def test_identical_arms_never_hold():
    assert verdict(cells([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), Design.of(3, None)).status == "inconclusive"


def test_a_failed_cell_keeps_the_claim_open_and_is_named():
    outcomes = cells([1.0, 2.0, 3.0, 4.0], [0.5, 1.501, 2.502, 3.5])
    outcomes["x", 2] = Outcome("f", None, "NonFiniteError: loss is nan at step 7")
    found = verdict(outcomes, Design.of(4, None))
    assert found.status == "inconclusive"
    assert "x seed 2: NonFiniteError: loss is nan at step 7" in found.reason
    assert found.n == 3
    assert found.effect == pytest.approx(-0.5, abs=0.01)


def test_a_missing_cell_keeps_the_claim_open():
    outcomes = cells([1.0, 2.0, 3.0], [0.5, 1.501, 2.5])
    del outcomes["base", 1]
    found = verdict(outcomes, Design.of(3, None))
    assert found.status == "inconclusive"
    assert "base seed 1 is missing" in found.reason


def test_no_pair_at_all_is_inconclusive():
    outcomes = {("x", 0): Outcome("f", None, "died"), ("base", 0): Outcome("f", Measurement({"loss": 1.0}))}
    found = verdict(outcomes, Design.of(1, None))
    assert (found.status, found.n, found.effect) == ("inconclusive", 0, None)


def test_a_claim_that_was_decided_keeps_its_verdict_at_later_looks():
    design = Design.of(3, 8)
    base = [1.0, 2.0, 3.0]
    first = verdict(cells(base, [b - 1 - 0.0001 * i for i, b in enumerate(base)]), design)
    assert first.status == "holds"
    reverse = cells([1.0, 2.0, 3.0, 4.0, 5.0], [9.0, 9.0, 9.0, 9.0, 9.0])
    later = verdict(reverse, design, look=1, previous=[first])
    assert later == first


def test_sequential_looks_are_recorded_and_wider_than_fixed_ones():
    design = Design.of(3, 8)
    outcomes = cells([1.0, 2.0, 3.0], [0.9, 1.8, 2.95])
    first = verdict(outcomes, design)
    fixed = verdict(outcomes, Design.of(3, None))
    assert first.interval.high - first.interval.low > fixed.interval.high - fixed.interval.low
    assert [entry["n"] for entry in first.looks] == [3]
    more = cells([1.0, 2.0, 3.0, 1.0, 2.0], [0.9, 1.8, 2.95, 1.1, 1.9])
    second = verdict(more, design, look=1, previous=[first])
    assert [entry["n"] for entry in second.looks] == [3, 5]


def test_items_are_clustered():
    generator = np.random.default_rng(0)
    items = {str(i): float(v) for i, v in enumerate(generator.normal(0, 1, 60))}
    outcomes = {
        ("base", 0): Outcome("f", Measurement({"loss": 0.0}, {"loss": items})),
        ("x", 0): Outcome(
            "f",
            Measurement({"loss": 0.0}, {"loss": {k: v - 0.5 + 0.01 * (int(k) % 7) for k, v in items.items()}}),
        ),
    }
    claim = Claim(id="c", sentence="", metric="loss", arm="x", baseline="base", unit="items")
    found = verdict(outcomes, Design.of(1, None), claim)
    assert (found.status, found.n, found.unit_of_n) == ("holds", 60, "items")


def test_a_claim_against_zero_judges_the_arms_own_number():
    claim = Claim(id="c", sentence="", metric="loss", arm="x", baseline=ZERO, direction="greater", margin=0.1)
    outcomes = {("x", seed): Outcome("f", Measurement({"loss": 0.5 + 0.01 * seed})) for seed in range(3)}
    found = verdict(outcomes, Design.of(3, None), claim)
    assert (found.status, found.baseline, [pair.baseline for pair in found.pairs]) == ("holds", "zero", [0.0] * 3)
    assert found.effect == pytest.approx(0.51)
    low = verdict(
        {key: Outcome("f", Measurement({"loss": -1.0 - 0.01 * key[1]})) for key in outcomes}, Design.of(3, None), claim
    )
    assert low.status == "fails"


def test_a_claim_against_zero_over_items():
    items = {str(i): 0.2 + 0.001 * (i % 7) for i in range(40)}
    claim = Claim(id="c", sentence="", metric="loss", arm="x", baseline=ZERO, direction="greater", unit="items")
    outcomes = {("x", seed): Outcome("f", Measurement({"loss": 0.2}, {"loss": items})) for seed in range(2)}
    found = verdict(outcomes, Design.of(2, None), claim)
    assert (found.status, found.n) == ("holds", 40)


def test_a_missing_arm_leaves_a_claim_against_zero_open():
    claim = Claim(id="c", sentence="", metric="loss", arm="x", baseline=ZERO)
    found = verdict({("x", 0): Outcome("f", Measurement({"loss": -1.0}))}, Design.of(2, None), claim)
    assert (
        found.status == "inconclusive"
        and found.reason == "1 cells failed, so the claim stays open: x seed 1 is missing"
    )


@pytest.mark.parametrize(
    ("contrast", "names", "message"), [("log ratio", "ab", "no ratio"), ("difference", "z", "zero")]
)
def test_zero_is_no_arm_and_has_no_ratio(contrast, names, message):
    class Own(Coin):
        claims = (Claim("c", "", "loss", "b", ZERO, contrast),)

        def arms(self, scale):
            return [Arm("a", "baseline"), Arm("b"), *([Arm(ZERO)] if names == "z" else [])]

    with pytest.raises(StudyError, match=message):
        Own().check(Own.scales["toy"])


def test_effect_before_needs_an_assumed_spread():
    assert effect_before(CLAIM, Design.of(3, None)) is None
    assumed = Claim(id="c", sentence="", metric="loss", arm="x", baseline="base", assumed_sd=0.01)
    three, ten = effect_before(assumed, Design.of(3, None)), effect_before(assumed, Design.of(10, None))
    assert three > ten > 0


@pytest.mark.parametrize(("seeds", "maximum"), [(0, None), (5, 3)])
def test_impossible_designs_are_refused(seeds, maximum):
    with pytest.raises(StudyError):
        Design.of(seeds, maximum)


def gated(least: float) -> Claim:
    return Claim(
        id="c", sentence="x is lower", metric="loss", arm="x", baseline="base", gate=Gate("loss", "base", least)
    )


def test_a_shut_gate_leaves_the_claim_open_and_says_which_seeds_shut_it():
    base, arm = [1.0, 2.0, 3.0], [0.5, 1.501, 2.502]
    assert verdict(cells(base, arm), Design.of(3, None), gated(0.9)).status == "holds"
    found = verdict(cells(base, arm), Design.of(3, None), gated(1.5))
    assert found.status == "inconclusive" and found.effect == pytest.approx(-0.499)
    assert found.reason == "not judged: loss of base has to be above 1.5 in every seed, and is 1 for seed 0"
    worse = verdict(cells(arm, base), Design.of(3, None), gated(2.6))
    assert worse.status == "inconclusive" and "is 0.5, 1.5, 2.5 for seeds 0, 1, 2" in worse.reason


def test_a_gate_speaks_of_what_the_study_has():
    study = Coin()
    study.claims = tuple(replace(claim, gate=Gate("nothing", claim.arm, 0.0)) for claim in study.claims)
    with pytest.raises(StudyError, match="waits for nothing of"):
        study.check(next(iter(study.scales.values())))
