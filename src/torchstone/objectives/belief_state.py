"""Belief-state objective: next token of every prefix and previous token of every suffix, for all pairs (arXiv 2410.23506).

    loss of a row  =  mean over its pairs of (w_next · CE_next + w_prev · CE_prev) / (w_next + w_prev)
    loss           =  mean over rows that have pairs: each weighs the same, whatever its number of pairs

Which pairs count and what they should say stands in `belief_pairs`, how the head is applied to all of them in
`pair_cross_entropy`. The objective reads the tokens of a batch; their targets are not used, because both ends are in the row.

Only what some pair reads is encoded: the forward encoder stops gap_min tokens before the end of the row, the backward encoder
begins at context_length + gap_min. With `context_length` at the "=" of a star graph the second encoder reads four tokens of 26.

Shapes: b rows · t tokens · n pairs · s sides.

In evaluation the loss is the objective's own, in nats per pair and side, and `accuracy` the share of right answers of a row's
pairs. Neither compares with a next-token model; pair the prefixes with the empty suffix for that (objective `next-token`).

Pitfall: `loss_sum` is a sum over rows, so a batch is to be divided by the number of rows with pairs: `count_targets`.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from torchstone.data.batch import Batch
from torchstone.errors import ConfigError
from torchstone.models.belief_state import BeliefState
from torchstone.nn.span import Span
from torchstone.objectives.belief_pairs import PairRule, Pairs, SingleGap, pairs_of, rows_with_pairs
from torchstone.objectives.next_token import LossOutput
from torchstone.objectives.pair_cross_entropy import PairTargets, pair_cross_entropy, pair_scores
from torchstone.recipe.part import Part

EVALUATION_SEED = 0  # of the pairs that evaluation samples: always the same ones


class BeliefStateObjective(nn.Module):
    """The objective.

    Args:
        rule: which pairs count.
        weights: of the next and of the previous token.
        chunk: pairs that the head works on at once; None: about a million numbers.

    Attributes:
        per_token: False: the loss is a mean over pairs and rows, which bits per byte cannot be made of.
    """

    per_token = False

    def __init__(self, rule: PairRule, weights: tuple[float, float] = (1.0, 1.0), chunk: int | None = None) -> None:
        super().__init__()
        self.rule, self.chunk = rule, chunk
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self._warned = False
        self._loss, self._pairs = pair_cross_entropy, self._pairs_of

    def before_compile(self) -> None:
        """Keep pairs, whose number changes from batch to batch, out of `torch.compile`; the encoders are compiled."""
        self._loss = torch.compiler.disable(pair_cross_entropy)
        self._pairs = torch.compiler.disable(self._pairs_of)

    def count_targets(self, batch: Batch, model: Any) -> int:
        """What the sum of losses of a batch is divided by: rows that have a pair."""
        return int(rows_with_pairs(batch.tokens_bt, model.end_token, self.rule, batch.documents_bt).sum())

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        """Loss of a belief-state model on a batch.

        Raises:
            ConfigError: another kind of model, or rows too short for one pair.
        """
        self._check(batch.tokens_bt.shape[1], model)
        tokens_bt, documents_bt = batch.tokens_bt, batch.documents_bt
        rows, length = tokens_bt.shape
        training = torch.is_grad_enabled()
        pairs, count = self._pairs(batch, model.end_token, training)
        stop, first = length - self.rule.gap_min, self.rule.context_length + self.rule.gap_min
        ahead = model(tokens_bt[:, :stop], _documents(documents_bt, slice(0, stop)))
        behind = model.suffixes(tokens_bt[:, first:], _documents(documents_bt, slice(first, length)))
        prefix_md, suffix_md = ahead.hidden_btd.flatten(0, 1), behind.hidden_btd.flatten(0, 1)
        targets = self._targets(pairs, rows, stop, first, length)
        score = (model.head, prefix_md, suffix_md, targets, self.chunk)
        place = (pairs.row_n, pairs.prefix_n)
        if not training:
            losses_ns, correct_ns = pair_scores(*score)
            per_token_bt = _spread(losses_ns * targets.weight_ns, place, tokens_bt)
            correct_bt = _spread(correct_ns * targets.weight_ns, place, tokens_bt)
            return LossOutput(per_token_bt.sum(), count, per_token_bt, correct_bt)
        loss_sum, losses_ns = self._loss(*score)
        left = [one.auxiliary for one in (ahead, behind) if one.auxiliary is not None]
        per_token_bt = _spread(losses_ns * targets.weight_ns, place, tokens_bt)
        return LossOutput(loss_sum, count, per_token_bt, auxiliary=torch.stack(left).sum() if left else None)

    def _targets(self, pairs: Pairs, rows: int, stop: int, first: int, length: int) -> PairTargets:
        """Pairs by their places in the encoded tokens, with targets and weights of the sides that count."""
        sides = slice(0 if self.weights[0] else 1, 2 if self.weights[1] else 1)
        side_s = torch.tensor(self.weights[sides], device=pairs.row_n.device)
        return PairTargets(
            pairs.row_n * stop + pairs.prefix_n,
            pairs.row_n * (length - first) + pairs.suffix_n - first,
            pairs.targets_n2[:, sides],
            pairs.weight_n(rows)[:, None] * side_s,
            sides,
        )

    def _pairs_of(self, batch: Batch, end_token: int, training: bool) -> tuple[Pairs, Tensor]:
        """The pairs of a batch and the number of rows that have any; training draws anew what sampling keeps."""
        generator = None if training else torch.Generator().manual_seed(EVALUATION_SEED)
        pairs = pairs_of(batch.tokens_bt, end_token, self.rule, batch.documents_bt, generator)
        rows = batch.tokens_bt.shape[0]
        count = torch.bincount(pairs.row_n, minlength=rows).count_nonzero()
        self._warn(rows - int(count))
        return pairs, count

    def _check(self, length: int, model: Any) -> None:
        """Raise ConfigError for another kind of model, or rows too short for one pair."""
        if not isinstance(model, BeliefState):
            raise ConfigError(
                "the objective belief-state needs a model with a backward encoder, and this one has none; set model to "
                "belief-state, or take the objective next-token."
            )
        least = self.rule.context_length + self.rule.gap_min + 1
        if length < least:
            raise ConfigError(
                f"sequences have {length} tokens, and the shortest pair needs {least}: context_length "
                f"{self.rule.context_length} + gap_min {self.rule.gap_min} + 1. Give longer sequences, or lower these."
            )

    def _warn(self, empty: int) -> None:
        if empty and not self._warned:
            self._warned = True
            warnings.warn(
                f"{empty} sequences of a batch have no pair with a gap of {self.rule.gap_min} or more inside one document "
                "and are skipped; this is said once.",
                stacklevel=2,
            )

    def flops(self, model: Any, length: int) -> float:
        """Forward FLOPs per token of a row of `length` tokens that is one document, encoders and pairs together.

        Raises:
            ConfigError: another kind of model, or rows too short for one pair.
        """
        self._check(length, model)
        ahead, behind = length - self.rule.gap_min, length - self.rule.context_length - self.rule.gap_min
        encoders = ahead * model.stack_flops(ahead) + behind * model.backward_encoder.stack_flops(behind)
        tables = (ahead + behind) * model.head.table_flops()
        pairs = self.rule.per_row(length) * self.rule.rate * model.head.pair_flops(sum(map(bool, self.weights)))
        return (encoders + tables + pairs) / length


def _documents(documents_bt: Tensor | None, part: slice) -> Span | None:
    return None if documents_bt is None else Span(documents_bt=documents_bt[:, part])


def _spread(values_ns: Tensor, place: tuple[Tensor, Tensor], tokens_bt: Tensor) -> Tensor:
    """Sums of the pairs' values at the last token of their prefix, [b, t]."""
    zeros_bt = torch.zeros(tokens_bt.shape, dtype=values_ns.dtype, device=tokens_bt.device)
    return zeros_bt.index_put_(place, values_ns.sum(1), accumulate=True)


class BeliefStateObjectiveConfig(Part):
    """`objective: belief-state`: next and previous tokens of all pairs of prefix and suffix."""

    family: ClassVar[str] = "objective"
    kind: Literal["belief-state"] = "belief-state"
    gap_min: int = Field(default=1, gt=0, description="least distance of the two ends of a pair, in tokens")
    gap_max: int | None = Field(default=None, gt=1, description="distances are below it; null: no bound")
    context_length: int = Field(
        default=0, ge=0, description="least index of a prefix's last token; star graphs: that of '=', 3 · edges + 2"
    )
    single_gap: SingleGap = Field(
        default="eos",
        description="targets of a pair of neighbours: eos, 'nothing in between', or next-token, the neighbours",
    )
    pair_rate: float = Field(
        default=1.0, gt=0, le=1, description="share of pairs that are trained on; those at an end token always are"
    )
    next_weight: float = Field(default=1.0, ge=0, description="weight of the next token's loss")
    prev_weight: float = Field(default=1.0, ge=0, description="weight of the previous token's loss")
    chunk: int | None = Field(
        default=None, gt=0, description="pairs that the head works on at once; null: about a million numbers"
    )

    @model_validator(mode="after")
    def _something_counts(self) -> BeliefStateObjectiveConfig:
        if self.gap_max is not None and self.gap_max <= self.gap_min:
            raise ValueError(
                f"gap_min is {self.gap_min} and gap_max {self.gap_max}: no distance is at least the first and below the "
                "second; raise gap_max"
            )
        if self.next_weight == self.prev_weight == 0:
            raise ValueError("next_weight and prev_weight are both 0, so that nothing is learned; raise one of them")
        return self

    def build(self) -> BeliefStateObjective:
        """The objective."""
        rule = PairRule(self.gap_min, self.gap_max, self.context_length, self.single_gap, self.pair_rate)
        return BeliefStateObjective(rule, (self.next_weight, self.prev_weight), self.chunk)
