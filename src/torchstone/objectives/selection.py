"""Selection of tokens: a score for each, and the exact top share of a batch (Rho-1, Lin et al., arXiv 2404.07965).

    excess     L − L_ref                      what the model has yet to learn and the reference knows
    reference  −L_ref                         what the reference knows
    hard       L                              what the model does not know
    ratio      (L + 1e-5) / (L_ref + 1e-5)    excess loss, relatively
    entropy    −H(reference's prediction)     where the reference is sure
    oracle     0, and −1 for noise            clean tokens first; needs data that knows its noise
    random     a number in [0, 1)             of (seed, number of the sequence, position)

Of N tokens n = clamp(floor(k·N + 1e-6), 1, N) are selected: those with the largest scores, among equals those of the lowest index
in the global batch. `soft` selects nothing: token i weighs N · softmax(excess / τ)_i.

The N tokens are those of the global batch (all ranks and micro-batches), of a micro-batch, or of a sequence. For the global batch
all ranks gather all scores, 4 bytes per token, and come to the same answer, however the batch is shared among them.

Shapes: b sequences · t tokens · n tokens, flat.

Pitfall: positions without a target have the score −∞. A score that is nan (a model that has diverged) counts as the largest, so
that the loss becomes nan and the trainer stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from torchstone.data.keyed import key, uniform
from torchstone.errors import ConfigError, DataError
from torchstone.objectives.token_weights import QUOTIENT_GUARD, largest

Score = Literal["excess", "reference", "hard", "ratio", "entropy", "oracle", "random", "soft"]
Scope = Literal["global", "micro", "sequence"]
SCORES: tuple[Score, ...] = ("excess", "reference", "hard", "ratio", "entropy", "oracle", "random", "soft")
SCOPES: tuple[Scope, ...] = ("global", "micro", "sequence")
READS_REFERENCE = frozenset({"excess", "reference", "ratio", "soft"})
READS_LOSS = frozenset({"excess", "hard", "ratio", "soft"})
ROUNDING = 1e-6  # so that 0.29 · 100 = 28.999… counts as 29


class Peers(Protocol):
    """Ranks that select together; `torchstone.train.distributed.World` is one."""

    @property
    def rank(self) -> int:
        """Number of this process."""

    @property
    def size(self) -> int:
        """Processes."""

    def gather(self, values_n: Tensor) -> Tensor:
        """The ranks' values in the order of ranks."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def gather(self, values_n: Tensor) -> Tensor:
        """The values themselves."""
        return values_n


@dataclass(frozen=True)
class Rule:
    """How tokens are selected.

    Attributes:
        ratio: share k of the tokens.
        score: what ranks them.
        scope: among which tokens.
        temperature: τ of `soft`.
        seed: of `random`.

    Raises:
        ConfigError: a setting out of bounds, or one that the score does not read.
    """

    ratio: float = 0.6
    score: Score = "excess"
    scope: Scope = "global"
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(
                f"ratio is {self.ratio}; it is the share of tokens that are trained on, above 0 and at most 1."
            )
        for name, value, allowed in (("score", self.score, SCORES), ("scope", self.scope, SCOPES)):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")
        if not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature}; it divides scores and is above 0.")
        score = self.score
        if score == "soft" and self.ratio != 1:
            raise ConfigError(f"score soft weights all targets and ratio is {self.ratio}; set ratio to 1.")
        if score != "soft" and self.temperature != 1:
            raise ConfigError(f"temperature belongs to the score soft and score is {score}; leave temperature out.")
        if score != "random" and self.seed:
            raise ConfigError(f"seed belongs to the score random and score is {score}; leave seed out.")

    @property
    def everything(self) -> bool:
        """Whether all tokens weigh 1, so that no score is needed."""
        return self.ratio == 1 and self.score != "soft"

    def number(self, tokens: int) -> int:
        """Tokens selected of `tokens`; 0 of 0."""
        return min(max(int(self.ratio * tokens + ROUNDING), 1), tokens)


@dataclass(frozen=True)
class Evidence:
    """What the scores of some sequences are made of; what the score does not read may be None.

    Attributes:
        valid_bt: bool, where there is a target.
        losses_bt: the model's losses. reference_bt: the reference's. entropy_bt: of the reference's predictions, nats.
        noise_bt: bool, known noise. rows: numbers of the sequences.
    """

    valid_bt: Tensor
    losses_bt: Tensor | None = None
    reference_bt: Tensor | None = None
    entropy_bt: Tensor | None = None
    noise_bt: Tensor | None = None
    rows: Sequence[int] = ()


@dataclass(frozen=True)
class Choice:
    """Weights and what they came from.

    Attributes:
        weights_bt: fp32; of a selection 1 and 0.
        threshold: scalar, the lowest score selected, if the scope is one set of tokens; nan otherwise.
    """

    weights_bt: Tensor
    threshold: Tensor


def scored(rule: Rule, given: Evidence) -> Tensor:
    """Scores fp32 [b, t], −∞ where there is no target.

    Raises:
        ConfigError: the score reads what is not given. DataError: a reference loss is no finite number.
    """
    check_evidence(rule, given)
    losses_bt, reference_bt = given.losses_bt, given.reference_bt
    if rule.score in ("excess", "soft"):
        assert losses_bt is not None and reference_bt is not None
        scores_bt = losses_bt.float() - reference_bt.float()
    elif rule.score == "ratio":
        assert losses_bt is not None and reference_bt is not None
        scores_bt = (losses_bt.float() + QUOTIENT_GUARD) / (reference_bt.float() + QUOTIENT_GUARD)
    elif rule.score == "reference":
        assert reference_bt is not None
        scores_bt = -reference_bt.float()
    elif rule.score == "hard":
        assert losses_bt is not None
        scores_bt = losses_bt.float()
    elif rule.score == "entropy":
        assert given.entropy_bt is not None
        scores_bt = -given.entropy_bt.float()
    elif rule.score == "oracle":
        assert given.noise_bt is not None
        scores_bt = -given.noise_bt.float()
    else:
        keys_b = key("selective", rule.seed, np.asarray(given.rows, dtype=np.uint64))
        drawn_bt = uniform(keys_b, given.valid_bt.shape[1]).astype(np.float32)
        scores_bt = torch.from_numpy(drawn_bt).to(given.valid_bt.device)
    return scores_bt.masked_fill(~given.valid_bt, -torch.inf)


def chosen(rule: Rule, scores: Sequence[Tensor], peers: Peers | None = None) -> list[Choice]:
    """Weights of the tokens of consecutive pieces of this rank's share of the batch.

    Args:
        rule: which tokens.
        scores: [b, t] of each piece, in the order of the batch; −∞ where there is no target.
        peers: ranks that select together; for the scope `global` all of them must call this at the same time. None: alone.
    """
    if rule.scope == "sequence":
        return [Choice(_weights(rule, one_bt), one_bt.new_tensor(torch.nan)) for one_bt in scores]
    if rule.scope == "micro":
        return [piece for one_bt in scores for piece in _among(rule, [one_bt], Alone())]
    return _among(rule, scores, peers or Alone())


def _among(rule: Rule, scores: Sequence[Tensor], peers: Peers) -> list[Choice]:
    """The same where all tokens of all peers compete."""
    own_n = torch.cat([one_bt.flatten() for one_bt in scores])
    all_n = peers.gather(own_n)
    before = 0 if peers.size == 1 else int(peers.gather(own_n.new_tensor([len(own_n)]))[: peers.rank].sum())
    weights_n = _weights(rule, all_n.unsqueeze(0)).squeeze(0)
    threshold = torch.where(weights_n > 0, all_n, torch.inf).min() if len(all_n) else all_n.new_tensor(torch.nan)
    pieces = weights_n[before : before + len(own_n)].split([one_bt.numel() for one_bt in scores])
    return [Choice(piece.view(one_bt.shape), threshold) for piece, one_bt in zip(pieces, scores, strict=True)]


def _weights(rule: Rule, scores_bt: Tensor) -> Tensor:
    """Weights where the tokens of a row compete."""
    valid_bt = scores_bt != -torch.inf
    count_b = valid_bt.sum(1)
    if rule.score == "soft":
        share_bt = (scores_bt / rule.temperature).softmax(1) * count_b.unsqueeze(1)
        return share_bt.masked_fill(~valid_bt, 0.0)
    number_b = (count_b.double() * rule.ratio + ROUNDING).long().clamp(min=1).minimum(count_b)
    return largest(scores_bt, valid_bt, number_b).float()


def check_evidence(rule: Rule, given: Evidence) -> None:
    """Raise what is wrong with the evidence for this score, the model's own losses left aside; errors as in `scored`."""
    score = rule.score
    if score in READS_REFERENCE and given.reference_bt is None:
        raise ConfigError(
            f"score {score} needs reference losses, and there are none; name a reference model (objective.reference: a run "
            "directory), give data with stored losses (data: {kind: scored, …}), or take the score hard or random."
        )
    if score == "entropy" and given.entropy_bt is None:
        raise ConfigError(
            "score entropy needs the reference's predictions, and stored losses do not hold them; name a reference model "
            "(objective.reference: a run directory), or take the score reference."
        )
    if score == "oracle" and given.noise_bt is None:
        raise ConfigError(
            "score oracle needs to know which targets are noise, and this batch does not say; use data that flags its noise "
            "(data: noisy-trigram, corpus: noisy), or another score."
        )
    if score == "random" and len(given.rows) != len(given.valid_bt):
        raise ConfigError(
            f"score random draws by the numbers of sequences; {len(given.rows)} are given for {len(given.valid_bt)} sequences. "
            "Give a number for each, different from step to step."
        )
    if score in READS_REFERENCE and given.reference_bt is not None:
        if given.reference_bt.shape != given.valid_bt.shape:
            raise DataError(
                f"reference losses have the shape {list(given.reference_bt.shape)} and targets {list(given.valid_bt.shape)}; "
                "give one loss per target, aligned to the predicted token."
            )
        wrong_bt = ~given.reference_bt.isfinite() & given.valid_bt
        if bool(wrong_bt.any()):
            row, position = wrong_bt.nonzero()[0].tolist()
            number = f", sequence {given.rows[row]} of the stream" if given.rows else ""
            raise DataError(
                f"the reference loss at (row {row}, position {position}) is {float(given.reference_bt[row, position])}{number}; "
                "score these tokens again with a reference that gives finite losses."
            )
