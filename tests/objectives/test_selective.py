"""The selective objective: k = 1 is next-token bit for bit, heads of every kind, references, plans, metrics, what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from torchstone.data.batch import IGNORE, Batch
from torchstone.errors import ConfigError, DataError
from torchstone.models.decoder import DecoderOutput
from torchstone.nn.span import Span
from torchstone.objectives.next_token import NextToken, NextTokenConfig
from torchstone.objectives.selective import SelectiveConfig, SelectiveObjective, head_entropies
from torchstone.objectives.selective_loss import Selective, selective_loss
from torchstone.recipe.registry import parse_part

VOCAB, LENGTH, ROWS = 29, 12, 6
HEADS: list[dict[str, Any]] = [
    {"kind": "linear", "tied": True},
    {"kind": "linear", "tied": False, "soft_cap": 2.0},
    {"kind": "factored", "rank": 4},
    {"kind": "mixture-of-softmaxes", "components": 3, "tied": False},
]
EVERY_HEAD = pytest.mark.parametrize("head", HEADS, ids=str)


def decoder(head: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> Any:
    part = {
        "kind": "decoder", "width": 16, "depth": 1, "head_dim": 8, "head": head or HEADS[0],
        "block": {"feedforward": {"kind": "swiglu", "hidden": 24}}, "initialisation": {"kind": "normal", "std": 0.4},
    }  # fmt: skip
    return parse_part("model", part | changes).build(VOCAB, LENGTH, seed)  # type: ignore[attr-defined]


def batch(seed: int = 0, rows: int = ROWS) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    tokens_bt = torch.randint(VOCAB, (rows, LENGTH + 1), generator=draw)
    targets_bt = tokens_bt[:, 1:].clone()
    targets_bt[torch.rand(rows, LENGTH, generator=draw) < 0.2] = IGNORE
    return Batch(
        tokens_bt[:, :-1],
        targets_bt,
        rows=tuple(range(seed * rows, (seed + 1) * rows)),
        reference_bt=torch.rand(rows, LENGTH, generator=draw) * 6,
        noise_bt=torch.rand(rows, LENGTH, generator=draw) < 0.3,
    )


def objective(**settings: Any) -> SelectiveObjective:
    return SelectiveConfig.model_validate(settings).build()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def plain_losses(model: Any, given: Batch) -> Tensor:
    logits_btv = model.logits(model(given.tokens_bt, Span(documents_bt=given.documents_bt)).hidden_btd)
    flat = F.cross_entropy(logits_btv.flatten(0, 1), given.targets_bt.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view(given.targets_bt.shape)


def top(scores_bt: Tensor, valid_bt: Tensor, ratio: float) -> Tensor:
    """The definition, with a sort in Python."""
    scores, valid = scores_bt.flatten().tolist(), valid_bt.flatten().tolist()
    places = sorted((i for i in range(len(scores)) if valid[i]), key=lambda i: (-scores[i], i))
    mask_n = torch.zeros(len(scores), dtype=torch.bool)
    mask_n[places[: int(ratio * len(places) + 1e-6)]] = True
    return mask_n.view(scores_bt.shape)


@EVERY_HEAD
@pytest.mark.parametrize("score", ["excess", "random", "hard"])
def test_everything_selected_is_next_token_bit_for_bit(head, score):
    model, given = decoder(head), batch()
    plain, found = (
        NextTokenConfig(chunk=7).build()(model, given),
        objective(ratio=1.0, score=score, chunk=7)(model, given),
    )
    assert torch.equal(found.loss_sum, plain.loss_sum) and torch.equal(found.count, plain.count)
    for ours, theirs in zip(gradients(model, found.minimised), gradients(model, plain.minimised), strict=True):
        assert torch.equal(ours, theirs)


@EVERY_HEAD
@pytest.mark.parametrize("chunk", [None, 5])
def test_loss_and_gradients_are_those_of_the_selected_tokens(head, chunk):
    model, given = decoder(head), batch()
    losses_bt = plain_losses(model, given)
    valid_bt = given.targets_bt != IGNORE
    mask_bt = top(losses_bt.detach() - given.reference_bt, valid_bt, 0.6)
    expected = losses_bt[mask_bt].mean()
    found = objective(chunk=chunk)(model, given)
    assert torch.equal(found.weights_bt > 0, mask_bt)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.per_token_bt, losses_bt.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(model, found.loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_tokens_that_are_not_selected_still_are_context():
    """Their own loss has no gradient; the loss of a later token reaches their embedding."""
    model, given = decoder({"kind": "linear", "tied": False}), batch()
    given = replace(given, targets_bt=given.tokens_bt.clone())
    scores_bt = torch.full((ROWS, LENGTH), 9.0)
    scores_bt[:, -1] = -9.0  # the reference knows the last tokens alone
    found = objective(ratio=1 / LENGTH, score="reference")(model, replace(given, reference_bt=scores_bt))
    assert (found.weights_bt > 0).nonzero()[:, 1].unique().tolist() == [LENGTH - 1]
    (gradient_vd,) = torch.autograd.grad(found.loss, [model.embed.weight])
    assert gradient_vd[given.tokens_bt[:, :3]].abs().sum() > 0


@pytest.mark.parametrize("scope", ["micro", "sequence"])
def test_narrow_scopes_count_what_they_select(scope):
    model, given = decoder(), batch()
    chooser = objective(ratio=0.37, scope=scope)
    selected = int(chooser(model, given).count)
    assert chooser.count_targets(given, model) == selected
    assert chooser.divisor(float(selected)) == selected
    rows = (given.targets_bt != IGNORE).sum(1).tolist()
    if scope == "sequence":
        assert selected == sum(max(1, int(0.37 * n + 1e-6)) for n in rows)


def test_the_divisor_of_the_global_scope_is_the_number_selected():
    chooser, model, given = objective(ratio=0.29), decoder(), batch()
    assert chooser.divisor(100.0) == 29 and chooser.divisor(2.0) == 1
    assert chooser.divisor(float(chooser.count_targets(given, model))) == float(chooser(model, given).count)


def test_soft_weights_every_token_by_its_excess():
    model, given = decoder(), batch()
    losses_bt, valid_bt = plain_losses(model, given), given.targets_bt != IGNORE
    excess_n = (losses_bt.detach() - given.reference_bt)[valid_bt]
    weights_n = (excess_n / 0.5).softmax(0) * len(excess_n)
    chooser = objective(score="soft", ratio=1.0, temperature=0.5)
    found = chooser(model, given)
    expected = (weights_n * losses_bt[valid_bt]).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-5)
    assert chooser.count_targets(given, model) == int(found.count) == len(excess_n)
    for ours, theirs in zip(gradients(model, found.loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_evaluation_is_plain_cross_entropy():
    model, given = decoder(), batch()
    with torch.no_grad():
        ours, plain = objective()(model, replace(given, reference_bt=None)), NextToken()(model, given)
    assert torch.equal(ours.loss_sum, plain.loss_sum) and torch.equal(ours.correct_bt, plain.correct_bt)


# Reference models -------------------------------------------------------------------------------------


@EVERY_HEAD
def test_a_reference_model_gives_the_losses_that_could_have_been_stored(head):
    model, reference, given = decoder(), decoder(head, seed=5).eval().requires_grad_(False), batch()
    stored = replace(given, reference_bt=plain_losses(reference, given).masked_fill(given.targets_bt == IGNORE, 0))
    online = objective(reference="runs/reference")
    online.attach_reference(reference)
    found = online(model, replace(given, reference_bt=None))
    assert torch.equal(found.weights_bt, objective()(model, stored).weights_bt)
    assert not any(name.startswith("_reference") for name, _ in online.named_parameters())


@EVERY_HEAD
@pytest.mark.parametrize("chunk", [None, 4])
def test_entropies_are_those_of_the_predictions(head, chunk):
    model, given = decoder(head), batch()
    hidden_nd = model(given.tokens_bt).hidden_btd.flatten(0, 1)
    expected_n = torch.distributions.Categorical(logits=model.logits(hidden_nd)).entropy()
    torch.testing.assert_close(head_entropies(model.head, hidden_nd, chunk), expected_n, rtol=1e-5, atol=1e-5)


def test_the_score_entropy_selects_where_the_reference_is_sure():
    model, reference, given = decoder(), decoder(seed=5).eval(), replace(batch(), reference_bt=None)
    chooser = objective(score="entropy", reference="runs/reference")
    chooser.attach_reference(reference)
    hidden_nd = reference(given.tokens_bt).hidden_btd.flatten(0, 1)
    entropy_bt = head_entropies(reference.head, hidden_nd).view(given.targets_bt.shape)
    expected_bt = top(-entropy_bt, given.targets_bt != IGNORE, 0.6)
    assert torch.equal(chooser(model, given).weights_bt > 0, expected_bt)


def test_a_reference_of_another_vocabulary_is_refused():
    chooser = objective(reference="runs/reference")
    small = parse_part("model", {"kind": "decoder", "width": 16, "depth": 1, "head_dim": 8}).build(11, LENGTH, 0)
    chooser.attach_reference(small)
    with pytest.raises(ConfigError, match="reference vocab 11 ≠ model vocab 29"):
        chooser(decoder(), replace(batch(), reference_bt=None))


def test_a_reference_that_is_not_loaded_and_one_beside_stored_losses_are_refused():
    with pytest.raises(ConfigError, match="runs/reference is not loaded.*attach_reference"):
        objective(reference="runs/reference")(decoder(), replace(batch(), reference_bt=None))
    with pytest.raises(ConfigError, match="set objective.reference to null"):
        objective(reference="runs/reference")(decoder(), batch())


# Several micro-batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["excess", "random", "oracle", "soft"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_plan_gives_micro_batches_the_weights_of_the_whole_batch(score, micro):
    model, given = decoder(), batch()
    settings: dict[str, Any] = {"score": score, "ratio": 1.0 if score == "soft" else 0.6}
    whole = objective(**settings)(model, given)
    chooser = objective(**settings)
    pieces = chooser.plan(model, given.split(micro), nullcontext)
    torch.testing.assert_close(
        torch.cat([piece.weights_bt for piece in pieces]), whole.weights_bt, rtol=1e-5, atol=1e-6
    )
    sums = [chooser(model, piece) for piece in pieces]
    expected = gradients(model, whole.loss)
    found = gradients(model, torch.stack([one.loss_sum for one in sums]).sum() / sum(one.count for one in sums))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_of_which_nothing_is_selected_has_zero_gradients():
    model, given = decoder(HEADS[-1]), batch()
    given = replace(given, weights_bt=torch.zeros(ROWS, LENGTH))
    found = objective()(model, given)
    assert float(found.loss_sum.detach()) == 0 and int(found.count) == 0
    assert not any(value.any() for value in gradients(model, found.minimised))


def test_scopes_that_look_at_one_micro_batch_plan_nothing():
    pieces = batch().split(2)
    for settings in ({"scope": "micro"}, {"scope": "sequence"}, {"ratio": 1.0}):
        assert objective(**settings).plan(decoder(), pieces, nullcontext) is pieces


class Dropping(nn.Module):
    """An embedding with dropout that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        inner = decoder()
        self.embed, self.head, self.passes = inner.embed, inner.head, 0

    def forward(self, tokens_bt: Tensor, span: Any = None) -> DecoderOutput:
        self.passes += 1
        return DecoderOutput(F.dropout(self.embed(tokens_bt), 0.5, self.training), None)


def test_scores_come_from_the_very_pass_that_is_trained_on_or_from_one_without_dropout():
    model, given = Dropping().train(), batch()
    noisy = objective()(model, given)
    assert model.passes == 1
    excess_bt = noisy.per_token_bt - given.reference_bt
    assert torch.equal(noisy.weights_bt > 0, top(excess_bt, given.targets_bt != IGNORE, 0.6))
    found = objective(score_eval=True)(model, given)
    assert model.training and model.passes == 3
    clean = objective()(model.eval(), given)
    assert torch.equal(found.weights_bt, clean.weights_bt)
    assert not torch.equal(found.per_token_bt, clean.per_token_bt)


def test_the_forward_pass_for_score_eval_is_that_of_the_plan():
    model, given = Dropping().train(), batch()
    pieces = objective(score_eval=True).plan(model, given.split(3), nullcontext)
    assert model.passes == 2 and model.training
    clean = objective()(model.eval(), given)
    assert torch.equal(torch.cat([piece.weights_bt for piece in pieces]), clean.weights_bt)


def test_scores_that_do_not_read_the_loss_are_planned_without_a_forward_pass():
    model, given = Dropping(), batch()
    objective(score="reference").plan(model, given.split(3), nullcontext)
    assert model.passes == 0


@pytest.mark.parametrize("settings", [{}, {"ratio": 1.0}, {"score": "random", "scope": "sequence"}], ids=str)
def test_compiled(settings):
    """Scores, ranking and the loss run outside of the graph, the model inside."""
    model, given = decoder(HEADS[-1]), batch()
    chooser, plain = objective(chunk=5, **settings), objective(chunk=5, **settings)
    chooser.before_compile()

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.objective = model, chooser

        def forward(self, given: Batch) -> Tensor:
            return self.objective(self.model, given).minimised

    found, expected = torch.compile(Step(), backend="aot_eager")(given), plain(model, given).minimised
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(model, found), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    metrics = plain.step_metrics(lambda value: value)
    assert chooser.step_metrics(lambda value: value) == pytest.approx(metrics, rel=1e-5)
    assert metrics["selected_share"] == pytest.approx(settings.get("ratio", 0.6), abs=0.06)


# Metrics and costs -----------------------------------------------------------------------------------


def test_metrics_of_a_step_are_those_of_all_its_micro_batches():
    model, given = decoder(), batch()
    chooser = objective()
    pieces = chooser.plan(model, given.split(2), nullcontext)
    for piece in pieces:
        chooser(model, piece)
    found = chooser.step_metrics(lambda value: value)
    losses_bt, valid_bt = plain_losses(model, given).detach(), given.targets_bt != IGNORE
    mask_bt = top(losses_bt - given.reference_bt, valid_bt, 0.6)
    assert found == pytest.approx(
        {
            "mean_loss": float(losses_bt[valid_bt].mean()),
            "selected_share": float(mask_bt.sum() / valid_bt.sum()),
            "unselected_loss": float(losses_bt[valid_bt & ~mask_bt].mean()),
            "selection_threshold": float((losses_bt - given.reference_bt)[mask_bt].min()),
            "selected_noise": float(given.noise_bt[mask_bt].float().mean()),
        },
        rel=1e-5,
    )
    assert chooser.step_metrics(lambda value: value) == {}


def test_metrics_of_everything_and_of_soft_weights_say_what_there_is():
    model, given = decoder(), replace(batch(), noise_bt=None)
    everything = objective(ratio=1.0)
    everything(model, given)
    assert set(everything.step_metrics(lambda value: value)) == {"mean_loss", "selected_share"}
    soft = objective(score="soft", ratio=1.0)
    soft(model, given)
    assert set(soft.step_metrics(lambda value: value)) == {"mean_loss"}


def test_a_plan_adds_the_pass_that_it_makes():
    model = decoder()
    passes: list[int] = []
    model.register_forward_hook(lambda *given: passes.append(1))
    micro = [batch(0), batch(1)]
    for settings in (
        {}, {"score": "hard"}, {"score_eval": True}, {"score": "reference"}, {"score": "random"}, {"scope": "micro"},
        {"ratio": 1.0}, {"score": "soft", "ratio": 1.0},
    ):  # fmt: skip
        chooser = objective(**settings)
        passes.clear()
        for one in micro:
            chooser(model, one)
        alone = len(passes)
        for one in chooser.plan(model, micro, nullcontext):
            chooser(model, one)
        planned = (len(passes) - alone - alone) / len(micro)
        assert 3 * chooser.planned_flops(model, LENGTH) == planned * model.flops(LENGTH), settings


def test_data_that_lacks_what_the_score_reads_is_refused_before_training():
    given = batch()
    bare = replace(given, reference_bt=None, noise_bt=None)
    for settings, words in (
        ({}, "score excess needs reference losses"),
        ({"score": "oracle"}, "score oracle needs to know"),
    ):
        config = SelectiveConfig.model_validate(settings)
        config.check_batch(given)
        with pytest.raises(ConfigError, match=words):
            config.check_batch(bare)
    for settings in (
        {"reference": "runs/a"},
        {"reference": "runs/a", "score": "entropy"},
        {"score": "random"},
        {"ratio": 1.0},
    ):
        SelectiveConfig.model_validate(settings).check_batch(bare)


def test_flops_count_the_head_twice_and_the_rest_once():
    model = decoder()
    plain, head = model.flops(LENGTH), model.head.flops()
    assert objective(ratio=1.0).flops(model, LENGTH) == plain
    assert objective(ratio=0.6).flops(model, LENGTH) == pytest.approx(plain - 0.4 * head + head / 3)
    assert objective(score_eval=True).flops(model, LENGTH) == pytest.approx(plain * 4 / 3 - 0.4 * head + head / 3)


# The functional form ---------------------------------------------------------------------------------


@EVERY_HEAD
def test_your_own_loop_selects_and_learns_the_same(head):
    model, given = decoder(head), batch()
    expected = objective()(model, given)
    hidden_btd = model(given.tokens_bt).hidden_btd
    for predictions in (model.logits(hidden_btd), (hidden_btd, model.head)):
        found = selective_loss(predictions, given.targets_bt, given.reference_bt, noise_bt=given.noise_bt)
        assert torch.equal(found.mask_bt, expected.weights_bt > 0)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.noise_share, given.noise_bt[found.mask_bt].float().mean())
        torch.testing.assert_close(found.selected_loss, expected.per_token_bt[found.mask_bt].mean())
        others_bt = (given.targets_bt != IGNORE) & ~found.mask_bt
        torch.testing.assert_close(found.unselected_loss, expected.per_token_bt[others_bt].mean(), rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(found.loss, list(model.parameters()), retain_graph=True)
        for one, other in zip(ours, gradients(model, objective()(model, given).loss), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_reference_may_be_a_decoder_logits_or_an_object_that_has_them():
    reference, model, given = decoder(seed=5), decoder(), batch()
    ids_bt = given.tokens_bt
    logits_btv = model.logits(model(ids_bt).hidden_btd)
    of_logits = lambda tokens_bt: reference.logits(reference(tokens_bt).hidden_btd)  # noqa: E731
    of_object = lambda tokens_bt: type("Output", (), {"logits": of_logits(tokens_bt)})  # noqa: E731
    losses_n = F.cross_entropy(of_logits(ids_bt)[:, :-1].flatten(0, 1), ids_bt[:, 1:].flatten(), reduction="none")
    aligned_bt = F.pad(losses_n.view(ROWS, -1).detach(), (0, 1))
    expected = Selective()(logits_btv, ids_bt, reference_bt=aligned_bt)
    for one in (reference, of_logits, of_object):
        found = Selective(one)(logits_btv, ids_bt)
        assert torch.equal(found.mask_bt, expected.mask_bt) and not found.mask_bt[:, -1].any()
        torch.testing.assert_close(found.loss, expected.loss)
    hidden_bt = Selective(reference, score="entropy")((model(ids_bt).hidden_btd, model.head), ids_bt).mask_bt
    assert torch.equal(hidden_bt, Selective(of_logits, score="entropy")(logits_btv, ids_bt).mask_bt)
    assert not reference.training


def test_a_reference_of_another_vocabulary_is_refused_in_your_own_loop():
    with pytest.raises(ConfigError, match="reference vocab 11 ≠ model vocab 29"):
        Selective(lambda ids_bt: torch.zeros(*ids_bt.shape, 11))(torch.zeros(2, 4, VOCAB), torch.ones(2, 4).long())


def test_a_batch_without_targets_has_a_loss_of_zero_with_a_gradient_and_a_warning():
    logits_btv = torch.randn(2, 4, VOCAB, requires_grad=True)
    with pytest.warns(UserWarning, match="the batch has no target"):
        found = selective_loss(logits_btv, torch.full((2, 4), IGNORE), torch.zeros(2, 4))
    found.loss.backward()
    assert float(found.loss.detach()) == 0 and not logits_btv.grad.any() and not found.mask_bt.any()


# Refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "greater than 0"),
        ({"ratio": 1.5}, "less than or equal to 1"),
        ({"score": "ref"}, "'excess', 'reference'"),
        ({"score": "soft"}, "set ratio to 1"),
        ({"temperature": 2.0}, "leave temperature out"),
        ({"seed": 3}, "seed belongs to the score random"),
        ({"score": "entropy"}, "set reference to a run directory"),
        ({"score": "hard", "reference": "runs/r"}, "set it to null"),
        ({"score": "oracle", "score_eval": True}, "score_eval has no use"),
        ({"scope": "ema"}, "'global', 'micro' or 'sequence'"),
    ],
)
def test_settings_without_a_use_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        SelectiveConfig.model_validate(settings)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ConfigError, match="a Linear has none.*set model to decoder"):
        objective()(nn.Linear(2, 2), batch())


@pytest.mark.parametrize(
    ("score", "lacking", "message"),
    [
        ("excess", "reference_bt", "score excess needs reference losses"),
        ("oracle", "noise_bt", "needs to know which targets are noise"),
    ],
)
def test_a_score_without_what_it_reads_is_refused(score, lacking, message):
    with pytest.raises(ConfigError, match=message):
        objective(score=score)(decoder(), replace(batch(), **{lacking: None}))


def test_a_stored_loss_that_is_no_number_is_named():
    given = batch(seed=2)
    place = int((given.targets_bt[4] != IGNORE).nonzero()[0])
    given.reference_bt[4, place] = torch.nan
    with pytest.raises(DataError, match=rf"\(row 4, position {place}\) is nan, sequence 16 of the stream"):
        objective()(decoder(), given)


def test_a_belief_state_model_is_trained_as_the_decoder_that_it_is():
    """Every prefix is paired with the empty suffix, as `next-token` does."""
    model = parse_part("model", {"kind": "belief-state", "width": 16, "depth": 1, "head_dim": 8, "end_token": 0}).build(
        VOCAB, LENGTH, 0
    )
    given = batch()
    found, plain = objective()(model, given), NextToken()(model, given)
    mask_bt = top(plain.per_token_bt - given.reference_bt, given.targets_bt != IGNORE, 0.6)
    assert torch.equal(found.weights_bt > 0, mask_bt)
