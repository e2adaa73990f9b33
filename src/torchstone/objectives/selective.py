"""Selective language modelling: the next-token loss of the tokens that are worth training on (Rho-1, arXiv 2404.07965).

    L = cross-entropy per token, without gradient        S = L − L_ref (other scores: `objectives.selection`)
    w = 1 for the k·N largest S of the global batch, else 0        loss = Σ w · L / Σ w

All tokens stay in the context; those that are not selected still get gradients from later ones. Hidden states are computed once.
The head scores all tokens in chunks, without gradient, and then computes logits with their gradient for selected tokens alone, so
that k = 0.6 costs 1 + 3 · 0.6 products with the output matrix in place of 3. At k = 1 nothing is scored: loss and gradient are
those of `next-token`, bit for bit.

Reference losses come with the batch (`Batch.reference_bt`, from stored losses) or from a frozen reference model, a run directory,
that reads the same tokens in evaluation mode.

The global batch is exact. With one micro-batch on each rank, ranks exchange their scores inside the forward pass. With several,
`plan` scores all of them before the first gradient, which costs one forward pass of the model more where the score reads the
model's loss; scope `micro` selects within each micro-batch and does not. The loss is divided by the number selected in the global
batch, whatever the scope.

In evaluation the loss is the plain cross-entropy, so that validation losses compare.

Shapes: b sequences · t tokens · n tokens, flat · c tokens of a chunk · v vocabulary.

Pitfalls
- With dropout scores are noisy: one micro-batch is ranked by the very losses that are trained on, several by a pass with dropout
  of its own. `score_eval: true` ranks by losses without dropout, for one more forward pass where `plan` does not need one anyway.
- The recorded training loss is that of selected tokens, which are hard ones; `unselected_loss` and `mean_loss` stand beside it.
- Counted FLOPs include the reference model and `score_eval`; `planned_flops` says what the forward pass of `plan` adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.errors import ConfigError
from torchstone.nn.heads.base import Features, Head, logits_of
from torchstone.nn.span import Span
from torchstone.objectives.next_token import LossOutput, NextToken, chunk_size, head_cross_entropy
from torchstone.objectives.selection import (
    READS_LOSS,
    READS_REFERENCE,
    Alone,
    Choice,
    Evidence,
    Peers,
    Rule,
    Score,
    check_evidence,
    chosen,
    scored,
)
from torchstone.recipe.load import load_recipe
from torchstone.recipe.part import Part

Autocast = Callable[[], AbstractContextManager[Any]]
TALLIED = ("tokens", "selected", "selected loss", "loss", "selected noise")


@dataclass(frozen=True)
class _Scored:
    """Losses [b, t] of a model on a batch, and the entropies of its predictions if they were asked for."""

    losses_bt: Tensor
    entropy_bt: Tensor | None = None


class SelectiveObjective(NextToken):
    """The objective.

    Args:
        rule: which tokens are selected.
        reference_run: run directory of the reference model, which the trainer opens and attaches; None: losses come with batches.
        score_eval: rank by losses of the model in evaluation mode.
        chunk: see `NextToken`.
    """

    def __init__(
        self, rule: Rule, reference_run: str | None = None, score_eval: bool = False, chunk: int | None = None
    ) -> None:
        super().__init__(chunk)
        self.rule, self.reference_run, self.score_eval = rule, reference_run, score_eval
        self._reference: tuple[Any, ...] = ()  # in a tuple, so that it is no submodule
        self._peers: Peers = Alone()
        self._tally: Tensor | None = None
        self._flagged, self._threshold = False, torch.tensor(torch.nan)
        self._loss, self._noted = self._selected_loss, self._note

    def join(self, world: Peers) -> None:
        """Select together with these ranks."""
        self._peers = world

    def attach_reference(self, model: Any) -> None:
        """Score with this frozen model, in evaluation mode and on the device of the batches."""
        self._reference = (model,)

    def before_compile(self) -> None:
        """Keep scores, ranking and a loss of as many tokens as are selected out of `torch.compile`; the model is compiled."""
        super().before_compile()
        self._loss = torch.compiler.disable(self._selected_loss)
        self._noted = torch.compiler.disable(self._note)

    def count_targets(self, batch: Batch, model: Any) -> int:
        """What a batch adds to the divisor: its targets if the global batch is ranked, those that it selects otherwise."""
        valid_bt, rule = batch.targets_bt != IGNORE, self.rule
        if rule.scope == "global" or rule.score == "soft":
            return int(valid_bt.sum())
        return sum(map(rule.number, valid_bt.sum(1).tolist() if rule.scope == "sequence" else [int(valid_bt.sum())]))

    def divisor(self, count: float) -> float:
        """Tokens selected in a global batch for which `count_targets` comes to `count`."""
        if self.rule.scope != "global" or self.rule.score == "soft":
            return count
        return float(self.rule.number(int(count)))

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        """Loss of `model` on a batch.

        Raises:
            ConfigError: a model without a head of torchstone's; or the score needs what neither batch nor reference gives.
            DataError: a reference loss is no finite number.
        """
        _check_model(model)
        if not torch.is_grad_enabled():
            return super().forward(model, batch)
        if self.rule.everything:
            found = super().forward(model, batch)
            self._noted(batch, found.per_token_bt, (batch.targets_bt != IGNORE).float())
            return found
        hidden_btd, _, auxiliary = model(batch.tokens_bt, _span(batch))
        return self._loss(model, batch, hidden_btd, auxiliary)

    def _selected_loss(self, model: Any, batch: Batch, hidden_btd: Tensor, auxiliary: Tensor | None) -> LossOutput:
        targets_bt, hidden_nd = batch.targets_bt, hidden_btd.flatten(0, 1)
        losses_n = head_losses(model.head, hidden_nd.detach(), targets_bt.flatten(), self.chunk)
        losses_bt = losses_n.view(targets_bt.shape)
        weights_bt = batch.weights_bt
        if weights_bt is None:
            ranked_bt = losses_bt
            if self.score_eval:
                ranked_bt = self._without_dropout(model, batch)
            weights_bt = self._choose([batch], [self._evidence(model, batch, ranked_bt)])[0]
        loss_sum, _ = head_cross_entropy(
            model.head, hidden_nd, targets_bt.flatten(), self.chunk, self._untraced, weights_bt.flatten()
        )
        self._note(batch, losses_bt, weights_bt)
        counted_bt = targets_bt != IGNORE if self.rule.score == "soft" else weights_bt > 0
        return LossOutput(loss_sum, counted_bt.sum(), losses_bt, auxiliary=auxiliary, weights_bt=weights_bt)

    @torch.no_grad()
    def plan(self, model: Any, batches: list[Batch], autocast: Autocast) -> list[Batch]:
        """The micro-batches of a step with the weights of their tokens, ranked together with those of all ranks."""
        if self.rule.everything or self.rule.scope != "global":
            return batches
        _check_model(model)
        evidence = []
        for batch in batches:
            with autocast():
                losses_bt = None
                if self.rule.score in READS_LOSS:
                    losses_bt = self._without_dropout(model, batch) if self.score_eval else self._losses(model, batch)
                evidence.append(self._evidence(model, batch, losses_bt))
        weights = self._choose(batches, evidence)
        return [replace(batch, weights_bt=one_bt) for batch, one_bt in zip(batches, weights, strict=True)]

    def _choose(self, batches: Sequence[Batch], evidence: Sequence[Evidence]) -> list[Tensor]:
        found: list[Choice] = chosen(self.rule, [scored(self.rule, one) for one in evidence], self._peers)
        self._threshold = found[-1].threshold
        return [one.weights_bt for one in found]

    def _evidence(self, model: Any, batch: Batch, losses_bt: Tensor | None) -> Evidence:
        reference_bt, entropy_bt = batch.reference_bt, None
        if self.reference_run is not None and self.rule.score in READS_REFERENCE | {"entropy"}:
            found = self._referred(model, batch)
            reference_bt, entropy_bt = found.losses_bt, found.entropy_bt
        return Evidence(
            batch.targets_bt != IGNORE, losses_bt, reference_bt, entropy_bt, batch.noise_bt, batch.rows
        )  # fmt: skip

    @torch.no_grad()
    def _referred(self, model: Any, batch: Batch) -> _Scored:
        """What the reference model says of a batch."""
        if batch.reference_bt is not None:
            raise ConfigError(
                f"the reference model {self.reference_run} is named and the data brings stored reference losses; set "
                "objective.reference to null to use these, or give the data without them."
            )
        if not self._reference:
            raise ConfigError(
                f"the reference model {self.reference_run} is not loaded; `torchstone train` does that, and your own loop calls "
                "objective.attach_reference(model) with the frozen model in evaluation mode."
            )
        reference = self._reference[0]
        theirs, ours = (len(one.head.weight_vd) for one in (reference, model))
        if theirs != ours:
            raise ConfigError(
                f"reference vocab {theirs} ≠ model vocab {ours}; give a reference that was trained with the model's tokenizer."
            )
        hidden_nd = reference(batch.tokens_bt, _span(batch))[0].flatten(0, 1)
        shape = batch.targets_bt.shape
        if self.rule.score == "entropy":
            entropy_bt = head_entropies(reference.head, hidden_nd, self.chunk).view(shape)
            return _Scored(torch.zeros_like(entropy_bt), entropy_bt)
        losses_n = head_losses(reference.head, hidden_nd, batch.targets_bt.flatten(), self.chunk)
        return _Scored(losses_n.view(shape))

    @torch.no_grad()
    def _losses(self, model: Any, batch: Batch) -> Tensor:
        """The model's losses [b, t], in the mode that it is in."""
        hidden_btd = model(batch.tokens_bt, _span(batch))[0]
        targets_bt = batch.targets_bt
        losses_n = head_losses(model.head, hidden_btd.flatten(0, 1), targets_bt.flatten(), self.chunk)
        return losses_n.view(targets_bt.shape)

    def _without_dropout(self, model: Any, batch: Batch) -> Tensor:
        was_training = model.training
        model.eval()
        try:
            return self._losses(model, batch)
        finally:
            model.train(was_training)

    def _note(self, batch: Batch, losses_bt: Tensor, weights_bt: Tensor) -> None:
        """Add a batch to the numbers of the step."""
        valid_bt, selected_bt = batch.targets_bt != IGNORE, weights_bt > 0
        noise = (selected_bt & batch.noise_bt).sum() if batch.noise_bt is not None else losses_bt.new_zeros(())
        sums = (valid_bt.sum(), selected_bt.sum(), (losses_bt * selected_bt).sum(), losses_bt.sum(), noise)
        tally = torch.stack([one.double() for one in sums])
        self._tally = tally if self._tally is None else self._tally + tally
        self._flagged = self._flagged or batch.noise_bt is not None

    def step_metrics(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Numbers of the step: `mean_loss` of all tokens and, of a selection, `selected_share`, `selection_threshold` (scope
        global), `unselected_loss`, and `selected_noise` (its share among selected targets) where the data knows it."""
        if self._tally is None:
            return {}
        tokens, selected, selected_loss, loss, noise = total(self._tally).tolist()
        self._tally = None
        found = {"mean_loss": loss / max(tokens, 1)}
        if self.rule.score == "soft":
            return found
        found["selected_share"] = selected / max(tokens, 1)
        if tokens > selected:
            found["unselected_loss"] = (loss - selected_loss) / (tokens - selected)
        if self.rule.scope == "global" and not self.rule.everything:
            found["selection_threshold"] = float(self._threshold)
        if self._flagged:
            found["selected_noise"] = noise / max(selected, 1)
        return found

    def flops(self, model: Any, length: int) -> float:
        """Forward FLOPs per token of which training costs three times as many.

        The backward pass of the head is that of selected tokens; the head's scores, the reference model and a pass for
        `score_eval` have no backward pass and count a third.

        Raises:
            ConfigError: the reference's directory holds no recipe.
        """
        _check_model(model)
        plain = model.flops(length)
        if self.rule.everything:
            return float(plain)
        share = 1.0 if self.rule.score == "soft" else self.rule.ratio
        without_gradient = model.head.flops() + (plain if self.score_eval else 0.0) + self._reference_flops(length)
        return float(plain - (1 - share) * model.head.flops() + without_gradient / 3)

    def planned_flops(self, model: Any, length: int) -> float:
        """What `plan` adds to `flops` where a rank has several micro-batches: the model's forward pass, if scores read its loss.

        With `score_eval` that pass is counted in `flops`, and takes place in `plan` instead.
        """
        rule = self.rule
        planned = rule.score in READS_LOSS and rule.scope == "global" and not rule.everything and not self.score_eval
        return float(model.flops(length)) / 3 if planned else 0.0

    def _reference_flops(self, length: int) -> float:
        if self.reference_run is None:
            return 0.0
        path = Path(self.reference_run) / "recipe.yaml"
        if not path.is_file():
            raise ConfigError(
                f"objective.reference is {self.reference_run}, which holds no run (no {path.name}); give the directory that "
                "`torchstone train` wrote for the reference model."
            )
        recipe = load_recipe(path)
        return float(recipe.model.skeleton(recipe.data.vocabulary(), length).flops(length))


def _span(batch: Batch) -> Span:
    return Span(positions_bt=batch.positions_bt, documents_bt=batch.documents_bt)


def _check_model(model: Any) -> None:
    """Raise ConfigError for a model whose head cannot score tokens in chunks."""
    if not isinstance(getattr(model, "head", None), Head):
        raise ConfigError(
            f"the objective selective scores tokens with a decoder's head, and a {type(model).__name__} has none; set model to "
            "decoder. In a loop of your own, torchstone.objectives.selective_loss takes logits or hidden states of any model."
        )


@torch.no_grad()
def head_losses(head: Head, hidden_nd: Tensor, targets_n: Tensor, chunk: int | None = None) -> Tensor:
    """Cross-entropies [n], fp32, 0 where there is no target: `head_scores` without asking what is most likely.

    Works in place, so that twice the tokens of a training chunk take the same memory.
    """
    states, log_prior_nk = head.features(hidden_nd)
    size = chunk or max(1, 2 * chunk_size(head.weight_vd) // head.components)
    losses_n = hidden_nd.new_empty(len(targets_n), dtype=torch.float32)
    for start in range(0, len(targets_n), size):
        rows = slice(start, start + size)
        features = Features(states[rows], None if log_prior_nk is None else log_prior_nk[rows])
        logits_cv = logits_of(features, head.weight_vd, head.soft_cap).float()
        target_c = logits_cv.gather(1, targets_n[rows].clamp(min=0).unsqueeze(1)).squeeze(1)
        most_c1 = logits_cv.amax(1, keepdim=True)
        normaliser_c = logits_cv.sub_(most_c1).exp_().sum(1).log_().add_(most_c1.squeeze(1))
        losses_n[rows] = (normaliser_c - target_c).masked_fill_(targets_n[rows] == IGNORE, 0.0)
    return losses_n


@torch.no_grad()
def head_entropies(head: Head, hidden_nd: Tensor, chunk: int | None = None) -> Tensor:
    """Entropies [n] of the predictions of a head, in nats, fp32."""
    size = chunk or max(1, chunk_size(head.weight_vd) // head.components)
    found = []
    for start in range(0, len(hidden_nd), size):
        log_p_cv = head.logits(hidden_nd[start : start + size]).float().log_softmax(-1)
        found.append(-(log_p_cv.exp() * log_p_cv.clamp_min(torch.finfo(log_p_cv.dtype).min)).sum(-1))
    return torch.cat(found)


class SelectiveConfig(Part):
    """`objective: selective`: predict the tokens with the largest scores, cross-entropy in nats."""

    family: ClassVar[str] = "objective"
    kind: Literal["selective"] = "selective"
    ratio: float = Field(default=0.6, gt=0, le=1, description="share of the targets that is trained on; 1: next-token")
    score: Score = Field(
        default="excess",
        description="what ranks targets: excess (loss − reference's), reference (low reference loss), hard (high loss), ratio, "
        "entropy (low entropy of the reference), oracle (known noise last), random; soft weights all by excess",
    )
    scope: Literal["global", "micro", "sequence"] = Field(
        default="global", description="targets that are ranked together: of the global batch, a micro-batch, a sequence"
    )
    reference: str | None = Field(
        default=None, description="run directory of the reference model; null: the data brings reference losses"
    )
    score_eval: bool = Field(
        default=False, description="rank by losses without dropout, for one more forward pass of the model"
    )
    temperature: float | None = Field(default=None, gt=0, description="τ of the score soft; null: 1, and other scores")
    seed: int = Field(default=0, ge=0, description="of the score random")
    chunk: int | None = Field(
        default=None, gt=0, description="tokens whose logits exist at once; null: about a million logits"
    )

    @model_validator(mode="after")
    def _settings_have_a_use(self) -> SelectiveConfig:
        score = self.score
        try:
            self._rule()
        except ConfigError as error:
            raise ValueError(str(error).rstrip(".")) from error
        if score != "soft" and self.temperature is not None:
            raise ValueError(f"temperature belongs to the score soft and score is {score}; leave temperature out")
        if score == "entropy" and self.reference is None:
            raise ValueError(
                "score entropy needs the predictions of a reference model, which stored losses do not hold; set reference to a "
                "run directory"
            )
        if self.reference is not None and score not in READS_REFERENCE | {"entropy"}:
            raise ValueError(f"score {score} reads no reference and reference is {self.reference}; set it to null")
        if self.score_eval and score not in READS_LOSS:
            raise ValueError(f"score {score} does not read the model's loss, so score_eval has no use; leave it out")
        return self

    def check_batch(self, batch: Batch) -> None:
        """Raise ConfigError where the data, of which this is a batch, does not bring what the score reads."""
        rule, valid_bt = self._rule(), batch.targets_bt != IGNORE
        if rule.everything:
            return
        known_bt = torch.zeros(valid_bt.shape)  # of a reference model, which is opened later
        reference_bt = batch.reference_bt if self.reference is None else known_bt
        check_evidence(rule, Evidence(valid_bt, None, reference_bt, known_bt, batch.noise_bt, batch.rows))

    def build(self) -> SelectiveObjective:
        """The objective."""
        return SelectiveObjective(self._rule(), self.reference, self.score_eval, self.chunk)

    def _rule(self) -> Rule:
        return Rule(self.ratio, self.score, self.scope, self.temperature or 1.0, self.seed)
