"""The belief-state objective: pairs by the words of the rule, loss and gradients of the double loop, means over rows."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchstone.data.batch import Batch
from torchstone.errors import ConfigError
from torchstone.models.belief_state import BeliefState, BeliefStateConfig
from torchstone.models.decoder import DecoderConfig
from torchstone.objectives.belief_pairs import PairRule, pairs_of, rows_with_pairs, valid_pairs
from torchstone.objectives.belief_reference import naive_loss, pair_losses, pair_targets, row_pairs
from torchstone.objectives.belief_state import BeliefStateObjective, BeliefStateObjectiveConfig

VOCAB, END, LENGTH = 9, 8, 14
RULES = {
    "text": PairRule(),
    "next tokens": PairRule(single_gap="next-token"),
    "star": PairRule(gap_min=2, context_length=4),
    "near": PairRule(gap_min=2, gap_max=5),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))


def model_of(**changes: Any) -> BeliefState:
    settings = {"width": 16, "depth": 2, "backward_depth": 1, "head_dim": 8, "pair": {"hidden": 24}, "end_token": END}
    init = {"kind": "normal", "std": 0.2}
    return BeliefStateConfig.model_validate({**settings, "initialisation": init, **changes}).build(VOCAB, LENGTH, 0)


def rows_of(*rows: list[int]) -> Batch:
    tokens_bt = torch.tensor(rows)
    return Batch(tokens_bt, tokens_bt)


def random_rows(rows: int, length: int = LENGTH, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    tokens_bt = torch.randint(0, VOCAB, (rows, length), generator=draw)
    return Batch(tokens_bt, tokens_bt)


def gradients(model: BeliefState, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return dict(zip(names, found, strict=True))


@given(
    tokens=st.lists(st.integers(0, 3), min_size=2, max_size=12),
    gap_min=st.integers(1, 3),
    more=st.none() | st.integers(1, 5),
    context=st.integers(0, 4),
    mode=st.sampled_from(["eos", "next-token"]),
)
def test_pairs_follow_the_rule(tokens: list[int], gap_min: int, more: int | None, context: int, mode: Any) -> None:
    rule = PairRule(gap_min, None if more is None else gap_min + more, context, mode)
    pairs = pairs_of(torch.tensor([tokens]), 0, rule)
    wanted = row_pairs(tokens, 0, rule)
    assert list(zip(pairs.prefix_n.tolist(), pairs.suffix_n.tolist(), strict=True)) == wanted
    assert pairs.targets_n2.tolist() == [list(pair_targets(tokens, pair, 0, rule)) for pair in wanted]
    if len(tokens) > gap_min + context:
        assert bool(rows_with_pairs(torch.tensor([tokens]), 0, rule)) == bool(wanted)
    if 0 not in tokens:
        assert len(wanted) == rule.per_row(len(tokens))


def test_given_documents_are_borders_too() -> None:
    tokens_bt = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 4]])
    rule = PairRule()
    documents_bt = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])  # the second row says what its end token says
    valid_bij = valid_pairs(tokens_bt, 0, rule, documents_bt)
    assert valid_bij[0].nonzero().tolist() == [[0, 1], [2, 3]]
    assert torch.equal(valid_bij[1], valid_pairs(tokens_bt, 0, rule)[1])


@every_rule
@pytest.mark.parametrize("chunk", [None, 7])
def test_loss_and_gradients_are_those_of_the_double_loop(rule: PairRule, chunk: int | None) -> None:
    model, batch = model_of(), random_rows(4)
    output = BeliefStateObjective(rule, chunk=chunk)(model, batch)
    naive = naive_loss(model, batch.tokens_bt, rule)
    torch.testing.assert_close(output.loss, naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.per_token_bt.sum(), output.loss_sum.detach())
    ours, theirs = gradients(model, output.loss), gradients(model, naive)
    for name, gradient in theirs.items():
        assert float(gradient.abs().max()) > 0 or name.endswith("head.norm.gain"), name
        torch.testing.assert_close(ours[name], gradient, atol=2e-6, rtol=1e-4)


def test_in_double_precision_the_gradients_agree_to_rounding() -> None:
    model, batch, rule = model_of().double(), random_rows(3), PairRule()
    ours = gradients(model, BeliefStateObjective(rule, chunk=11)(model, batch).loss * 3)
    for name, gradient in gradients(model, naive_loss(model, batch.tokens_bt, rule) * 3).items():
        # weights of pairs are fp32
        torch.testing.assert_close(ours[name], gradient, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (3.0, 1.0)])
def test_sides_are_weighed(weights: tuple[float, float]) -> None:
    model, batch, rule = model_of(), random_rows(2), PairRule(gap_min=2)
    found = BeliefStateObjective(rule, weights)(model, batch)
    both = [
        torch.stack([_side(model, tokens, pair, rule) for pair in row_pairs(tokens.tolist(), END, rule)]).mean(0)
        for tokens in batch.tokens_bt
    ]
    wanted = torch.stack(both).mean(0) @ torch.tensor(weights) / sum(weights)
    torch.testing.assert_close(found.loss, wanted, atol=1e-5, rtol=1e-5)
    ours = gradients(model, found.loss)
    for name, gradient in gradients(model, wanted).items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-6, rtol=1e-4)


def _side(model: BeliefState, tokens: Tensor, pair: tuple[int, int], rule: PairRule) -> Tensor:
    """Losses of one pair, next and prev."""
    prefix, suffix = model(tokens[None]).hidden_btd[0, pair[0]], model.suffixes(tokens[None]).hidden_btd[0, pair[1]]
    logits = model.head.pair_logits(prefix, suffix)
    targets = pair_targets(tokens.tolist(), pair, END, rule)
    return torch.stack([-side.log_softmax(-1)[target] for side, target in zip(logits, targets, strict=True)])


def test_evaluation_gives_the_training_loss_and_shares_of_right_answers() -> None:
    model, batch = model_of(), random_rows(4)
    objective = BeliefStateObjectiveConfig().build()
    loss = objective(model, batch).loss.detach()
    with torch.no_grad():
        output = objective(model, batch)
    torch.testing.assert_close(output.loss, loss)
    right = 0.0
    for tokens in batch.tokens_bt:
        prefix_td, suffix_td = model(tokens[None]).hidden_btd[0], model.suffixes(tokens[None]).hidden_btd[0]
        pairs = row_pairs(tokens.tolist(), END, objective.rule)
        for i, j in pairs:
            logits = model.head.pair_logits(prefix_td[i], suffix_td[j])
            targets = pair_targets(tokens.tolist(), (i, j), END, objective.rule)
            answers = [int(side.argmax()) == target for side, target in zip(logits, targets, strict=True)]
            right += sum(answers) / 2 / len(pairs)
    assert output.correct_bt is not None
    assert float(output.correct_bt.sum()) == pytest.approx(right, rel=1e-5)
    assert 0 < right < 4


def test_every_row_weighs_the_same_and_rows_without_pairs_are_skipped_with_one_warning() -> None:
    model, rule = model_of(), PairRule(gap_min=3)
    few, many, none = [1, 2, 3, END, END, END, END, 4], [1, 2, 3, 4, 5, 6, 7, 1], [1, END, END, 2, END, END, END, END]
    objective = BeliefStateObjective(rule)
    with pytest.warns(UserWarning, match="1 sequences of a batch have no pair with a gap of 3"):
        output = objective(model, rows_of(few, many, none))
    assert int(output.count) == 2 == objective.count_targets(rows_of(few, many, none), model)
    means = [losses.mean() for losses in pair_losses(model, torch.tensor([few, many, none]), rule)]
    torch.testing.assert_close(output.loss_sum, sum(means, torch.zeros(())), atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = objective(model, rows_of(none))
    assert float(alone.loss_sum.detach()) == 0 and int(alone.count) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients(model, alone.loss_sum).values())


def test_micro_batches_add_up() -> None:
    model, batch = model_of(), random_rows(6, seed=3)
    objective = BeliefStateObjective(PairRule())
    whole = objective(model, batch)
    parts = [objective(model, part) for part in batch.split(2)]
    torch.testing.assert_close(sum((part.loss_sum for part in parts), torch.zeros(())), whole.loss_sum)
    assert sum(int(part.count) for part in parts) == int(whole.count) == 6


def test_sampling_keeps_ends_one_pair_a_row_and_about_the_rate() -> None:
    rule = PairRule(rate=0.25)
    tokens_bt = torch.randint(0, 8, (64, 40), generator=torch.Generator().manual_seed(0))
    tokens_bt[:, 20] = END
    all_pairs, kept = (
        pairs_of(tokens_bt, END, one, generator=torch.Generator().manual_seed(1)) for one in (PairRule(), rule)
    )
    touching = [
        sum(END in (tokens_bt[row, i], tokens_bt[row, j]) for row, i, j in _triples(pairs))
        for pairs in (all_pairs, kept)
    ]
    assert touching[0] == touching[1] > 0
    free = len(all_pairs) - touching[0]
    assert (len(kept) - touching[1]) / free == pytest.approx(0.25, abs=0.01)
    assert set(_triples(kept)) < set(_triples(all_pairs))
    tiny = pairs_of(torch.arange(8)[None].repeat(50, 1), END, PairRule(rate=1e-6))
    assert sorted(tiny.row_n.tolist()) == list(range(50))


def _triples(pairs: Any) -> list[tuple[int, ...]]:
    return list(zip(pairs.row_n.tolist(), pairs.prefix_n.tolist(), pairs.suffix_n.tolist(), strict=True))


def test_sampling_draws_anew_in_training_and_never_in_evaluation() -> None:
    model, batch = model_of(), random_rows(4, seed=1)
    objective = BeliefStateObjectiveConfig(pair_rate=0.3).build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = (float(objective(model, batch).loss.detach()) for _ in range(2))
        torch.manual_seed(0)
        again = float(objective(model, batch).loss.detach())
        before = torch.get_rng_state()
        with torch.no_grad():
            held = [float(objective(model, batch).loss) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), before)
    assert first == again != second and held[0] == held[1]


def test_only_what_pairs_read_is_encoded() -> None:
    """Tokens that no prefix and no suffix holds change nothing."""
    model, rule = model_of(), PairRule(gap_min=2, context_length=9)
    seen: list[tuple[int, ...]] = []
    for encoder in (model.blocks[0], model.backward_encoder.blocks[0]):
        encoder.register_forward_hook(lambda module, given, output: seen.append(tuple(given[0].shape)))
    BeliefStateObjective(rule)(model, random_rows(2))
    assert seen == [(2, LENGTH - 2, 16), (2, LENGTH - 11, 16)]


def test_under_autocast_the_loss_stays_close() -> None:
    model, batch = model_of(), random_rows(4)
    objective = BeliefStateObjective(PairRule())
    exact = objective(model, batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(model, batch).loss
    assert rough.dtype == torch.float32
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    rough.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("rule", [PairRule(), PairRule(gap_min=2, context_length=5)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0)])
def test_flops_are_those_of_the_matrix_products(rule: PairRule, weights: tuple[float, float]) -> None:
    model, objective = model_of(), BeliefStateObjective(rule, weights)
    batch = Batch(torch.randint(0, 8, (3, LENGTH)), torch.zeros(3, LENGTH, dtype=torch.long))
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        objective(model, batch).loss.backward()
    # the counter sees no fused attention without gradients, so a whole step is compared: three forward passes
    assert 3 * objective.flops(model, LENGTH) * batch.tokens == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_mistakes_are_told() -> None:
    objective = BeliefStateObjective(PairRule(gap_min=3, context_length=8))
    with pytest.raises(ConfigError, match="sequences have 10 tokens, and the shortest pair needs 12"):
        objective(model_of(), random_rows(1, length=10))
    decoder = DecoderConfig(width=16, depth=1, head_dim=8).build(VOCAB, LENGTH, 0)
    with pytest.raises(ConfigError, match="needs a model with a backward encoder"):
        objective(decoder, random_rows(1))
    with pytest.raises(ValueError, match="gap_min is 3 and gap_max 3"):
        BeliefStateObjectiveConfig(gap_min=3, gap_max=3)
    with pytest.raises(ValueError, match="both 0"):
        BeliefStateObjectiveConfig(next_weight=0, prev_weight=0)


def test_a_step_of_training_lowers_the_loss_and_copies_stay_apart() -> None:
    model, batch = model_of(), random_rows(8)
    objective, untouched = BeliefStateObjective(PairRule()), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = objective(model, batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    assert float(objective(untouched, batch).loss.detach()) == pytest.approx(losses[0])
    changed, kept = model.head.features(torch.ones(16)).states, untouched.head.features(torch.ones(16)).states
    assert not torch.allclose(changed, kept)  # the copy's empty suffix is its own
