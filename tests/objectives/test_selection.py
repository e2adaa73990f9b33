"""Selection: scores, the number selected, ties, scopes, and one ranking however the batch is shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstone.errors import ConfigError, DataError
from torchstone.objectives.selection import Alone, Evidence, Rule, chosen, scored
from torchstone.objectives.selective_loss import Selective, selective_loss

ROWS, LENGTH = 6, 10


class Share:
    """One rank of several whose values are known beforehand, as if all had called `gather` at once."""

    def __init__(self, rank: int, pieces: list[list[torch.Tensor]]) -> None:
        self.rank, self.size, self.pieces, self.calls = rank, len(pieces), pieces, 0

    def gather(self, values_n: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        flat = [torch.cat([one.flatten() for one in piece]) for piece in self.pieces]
        if self.calls == 1:
            assert torch.equal(values_n, flat[self.rank])
            return torch.cat(flat)
        return torch.tensor([float(len(one)) for one in flat])


def evidence(seed: int = 0, levels: int = 0) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(ROWS, LENGTH, generator=generator) * 5  # noqa: E731
    losses_bt, reference_bt, entropy_bt = draw(), draw(), draw()
    if levels:
        losses_bt, reference_bt = (losses_bt * levels / 5).floor(), torch.zeros_like(reference_bt)
    valid_bt = torch.rand(ROWS, LENGTH, generator=generator) < 0.8
    noise_bt = torch.rand(ROWS, LENGTH, generator=generator) < 0.3
    return Evidence(valid_bt, losses_bt, reference_bt, entropy_bt, noise_bt, tuple(range(40, 40 + ROWS)))


def selected(rule: Rule, given: Evidence) -> torch.Tensor:
    return chosen(rule, [scored(rule, given)])[0].weights_bt > 0


def by_hand(values: list[float], valid: list[bool], number: int) -> list[int]:
    places = [i for i, there in enumerate(valid) if there]
    return sorted(sorted(places, key=lambda i: (-values[i], i))[:number])


@pytest.mark.parametrize("score", ["excess", "reference", "hard", "ratio", "entropy", "oracle"])
def test_scores_rank_as_defined(score):
    given = evidence(1)
    values = {
        "excess": given.losses_bt - given.reference_bt,
        "reference": -given.reference_bt,
        "hard": given.losses_bt,
        "ratio": (given.losses_bt + 1e-5) / (given.reference_bt + 1e-5),
        "entropy": -given.entropy_bt,
        "oracle": (~given.noise_bt).float(),
    }[score]
    rule = Rule(0.6, score)
    number = int(0.6 * int(given.valid_bt.sum()) + 1e-6)
    expected = by_hand(values.flatten().tolist(), given.valid_bt.flatten().tolist(), number)
    assert selected(rule, given).flatten().nonzero().flatten().tolist() == expected


def test_the_oracle_takes_noise_only_when_clean_tokens_are_used_up():
    given = evidence(2)
    mask_bt = selected(Rule(0.9, "oracle"), given)
    assert mask_bt[given.valid_bt & ~given.noise_bt].all() and mask_bt[given.noise_bt].any()
    assert not selected(Rule(0.3, "oracle"), given)[given.noise_bt].any()


@pytest.mark.parametrize("scope", ["global", "micro"])
@pytest.mark.parametrize(
    ("tokens", "ratio", "number"),
    [(100, 0.29, 29), (10, 0.6, 6), (3, 0.2, 1), (1, 0.01, 1), (7, 1.0, 7), (0, 0.5, 0), (11, 0.6, 6)],
)
def test_the_number_selected(tokens, ratio, number, scope):
    rule = Rule(ratio, "hard", scope)
    valid_bt = torch.zeros(1, 120, dtype=torch.bool)
    valid_bt[0, 5 : 5 + tokens] = True
    given = Evidence(valid_bt, torch.arange(120.0)[None])
    assert rule.number(tokens) == number == int(selected(rule, given).sum())


@given(st.lists(st.integers(0, 3), min_size=ROWS * LENGTH, max_size=ROWS * LENGTH), st.floats(0.01, 1))
def test_ties_go_to_the_lowest_index_of_the_batch(values, ratio):
    losses_bt = torch.tensor(values, dtype=torch.float32).view(ROWS, LENGTH)
    valid_bt = evidence().valid_bt
    rule = Rule(ratio, "hard")
    mask_bt = selected(rule, Evidence(valid_bt, losses_bt))
    expected = by_hand([float(v) for v in values], valid_bt.flatten().tolist(), rule.number(int(valid_bt.sum())))
    assert mask_bt.flatten().nonzero().flatten().tolist() == expected


def test_the_scope_sequence_takes_a_share_of_every_row():
    given = evidence(3)
    rule = Rule(0.4, "excess", "sequence")
    mask_bt = selected(rule, given)
    for row in range(ROWS):
        one = Evidence(given.valid_bt[row : row + 1], given.losses_bt[row : row + 1], given.reference_bt[row : row + 1])
        assert torch.equal(mask_bt[row], selected(Rule(0.4), one)[0])


def test_the_scope_micro_ranks_each_piece_alone():
    scores_bt = scored(Rule(), evidence(3))
    pieces = scores_bt.split([1, 3, 2])
    together = chosen(Rule(scope="micro"), pieces)
    for piece, found in zip(pieces, together, strict=True):
        assert torch.equal(found.weights_bt, chosen(Rule(), [piece])[0].weights_bt)


@pytest.mark.parametrize("score", ["excess", "random", "oracle", "soft"])
@pytest.mark.parametrize("cuts", [[[6]], [[3, 3]], [[1, 1, 1], [3]], [[2, 1], [1, 2]], [[1], [2], [3]]])
@pytest.mark.parametrize("levels", [0, 3])
def test_one_ranking_however_the_batch_is_shared(score, cuts, levels):
    """With three levels of loss, most tokens are tied."""
    rule = Rule(1.0 if score == "soft" else 0.6, score)
    scores_bt = scored(rule, evidence(4, levels))
    whole = chosen(rule, [scores_bt])[0]
    pieces = scores_bt.split([rows for share in cuts for rows in share])
    shares, first = [], 0
    for share in cuts:
        shares.append(list(pieces[first : first + len(share)]))
        first += len(share)
    found = []
    for rank in range(len(cuts)):
        choices = chosen(rule, shares[rank], Share(rank, shares) if len(cuts) > 1 else Alone())
        assert all(torch.equal(one.threshold, whole.threshold) for one in choices)
        found += [one.weights_bt for one in choices]
    assert torch.equal(torch.cat(found), whole.weights_bt)


def test_random_numbers_depend_on_seed_sequence_and_position_alone():
    given = evidence(5)
    everywhere = Evidence(torch.ones_like(given.valid_bt), rows=given.rows)
    draws_bt = scored(Rule(score="random", seed=3), everywhere)
    part = Evidence(torch.ones(2, LENGTH, dtype=torch.bool), rows=given.rows[2:4])
    assert torch.equal(scored(Rule(score="random", seed=3), part), draws_bt[2:4])
    assert len(set(draws_bt.flatten().tolist())) == ROWS * LENGTH
    assert not torch.equal(scored(Rule(score="random", seed=4), everywhere), draws_bt)
    assert torch.equal(scored(Rule(score="random", seed=3), given).isinf(), ~given.valid_bt)


def test_random_selection_takes_every_token_equally_often():
    rows = tuple(range(2000))
    given = Evidence(torch.ones(len(rows), 8, dtype=torch.bool), rows=rows)
    share_t = selected(Rule(0.25, "random"), given).float().mean(0)
    assert ((share_t - 0.25).abs() < 4 * (0.25 * 0.75 / len(rows)) ** 0.5).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"score": "soft"}, "ratio is 0.6; set ratio to 1"),
        ({"score": "hard", "temperature": 2.0}, "temperature belongs to the score soft and score is hard"),
        ({"score": "excess", "seed": 3}, "seed belongs to the score random and score is excess"),
    ],
)
def test_settings_that_the_score_does_not_read_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Rule(**settings)


def test_a_reference_for_a_score_that_reads_none_is_refused():
    with pytest.raises(ConfigError, match="score hard reads no reference"):
        Selective(lambda tokens_bt: tokens_bt, score="hard")
    with pytest.raises(ConfigError, match="temperature belongs to the score soft"):
        selective_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), score="hard", temperature=0.5)


def test_soft_weights_are_a_softmax_with_mean_one():
    given = evidence(6)
    rule = Rule(1.0, "soft", temperature=0.5)
    weights_bt = chosen(rule, [scored(rule, given)])[0].weights_bt
    excess_n = (given.losses_bt - given.reference_bt)[given.valid_bt]
    expected_n = (excess_n / 0.5).softmax(0) * len(excess_n)
    torch.testing.assert_close(weights_bt[given.valid_bt], expected_n)
    assert not weights_bt[~given.valid_bt].any()


def test_a_diverged_models_tokens_are_selected_so_that_the_loss_says_so():
    given = evidence(7)
    given.losses_bt[0, given.valid_bt[0].nonzero()[0]] = torch.nan
    assert selected(Rule(0.1, "excess"), given)[0].any()


@pytest.mark.parametrize(
    ("score", "missing", "message"),
    [
        ("excess", "reference_bt", "score excess needs reference losses.*objective.reference.*scored"),
        ("soft", "reference_bt", "score soft needs reference losses"),
        ("entropy", "entropy_bt", "score entropy needs the reference's predictions"),
        ("oracle", "noise_bt", "score oracle needs to know which targets are noise"),
        ("random", "rows", "numbers of sequences; 0 are given for 6"),
    ],
)
def test_a_score_without_what_it_reads_is_refused(score, missing, message):
    given = evidence()
    lacking = {name: getattr(given, name) for name in given.__dataclass_fields__} | {
        missing: () if missing == "rows" else None
    }
    with pytest.raises(ConfigError, match=message):
        scored(Rule(1.0 if score == "soft" else 0.6, score), Evidence(**lacking))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_reference_loss_that_is_no_number_is_named(value):
    given = evidence()
    place = given.valid_bt[3].nonzero()[2]
    given.reference_bt[3, place] = value
    with pytest.raises(DataError, match=rf"\(row 3, position {int(place)}\) is (nan|inf), sequence 43 of the stream"):
        scored(Rule(), given)


def test_reference_losses_where_there_is_no_target_are_not_looked_at():
    given = evidence()
    expected_bt = selected(Rule(), given)
    given.reference_bt[~given.valid_bt] = torch.nan
    assert torch.equal(selected(Rule(), given), expected_bt)


def test_reference_losses_of_another_shape_are_refused():
    given = evidence()
    with pytest.raises(DataError, match=r"shape \[6, 9\] and targets \[6, 10\]"):
        scored(Rule(), Evidence(given.valid_bt, given.losses_bt, given.reference_bt[:, 1:]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"ratio": 1.01}, "ratio is 1.01"),
        ({"score": "ref"}, "score is 'ref'; allowed: excess, reference"),
        ({"scope": "batch"}, "scope is 'batch'; allowed: global, micro, sequence"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_rules_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Rule(**settings)
