"""Selective language modelling in a training loop of your own: what `objective: selective` does, for any model.

    select = Selective(reference=small_model, ratio=0.6)
    found = select(logits_btv, ids_bt)                       # or (hidden_btd, output_matrix_vd): never holds all logits
    found.loss.backward()
    found.mask_bt, found.threshold, found.unselected_loss    # what was selected

`selective_loss` is the same with reference losses that are there already. Predictions are logits [b, t, v], or a pair of hidden
states [b, t, d] and the output matrix [v, d] (or a head of torchstone's), of which only chunks of logits exist at once.

Everything is aligned to the predicted token: `targets_bt[:, t]`, the reference loss, the noise flag and the mask at t all speak
of the token that the predictions at t are about.

Ranks: give `peers` (rank, size, gather; `torchstone.train.distributed.World` is one) to rank the tokens of all of them together.
The loss is then this rank's part of the mean over the global batch, times the number of ranks, so that DDP's mean over ranks is
that mean. Gradient accumulation is up to the loop: scores of later micro-batches are not known here.

Shapes: b sequences · t tokens · d width · v vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchstone.data.batch import IGNORE
from torchstone.errors import ConfigError
from torchstone.nn.heads.base import Features, Head
from torchstone.objectives.next_token import head_cross_entropy
from torchstone.objectives.selection import READS_REFERENCE, Alone, Evidence, Peers, Rule, Scope, Score, chosen, scored
from torchstone.objectives.selective import head_entropies, head_losses

Predictions = Tensor | tuple[Tensor, Tensor | Head]
ENTROPY_ROWS = 1024  # logits rows at a time in fp32


@dataclass(frozen=True)
class SelectiveOutput:
    """Loss and what was selected.

    Attributes:
        loss: scalar, differentiable: the mean over selected tokens of all peers; 0 where nothing has a target.
        mask_bt: bool, selected.
        weights_bt: fp32: 1 where selected, else 0; of the score soft, weights with mean 1.
        threshold: the lowest selected score; nan for the scope sequence, where there are several.
        losses_bt: fp32, detached: the loss of every token, 0 where there is no target.
        scores_bt: fp32, −∞ where there is no target.
        noise_share: of the selected tokens of this rank; None without flags.
    """

    loss: Tensor
    mask_bt: Tensor
    weights_bt: Tensor
    threshold: Tensor
    losses_bt: Tensor
    scores_bt: Tensor
    noise_share: Tensor | None = None

    @property
    def selected_loss(self) -> Tensor:
        """Mean loss of selected tokens; nan if there are none."""
        return self.losses_bt[self.mask_bt].mean()

    @property
    def unselected_loss(self) -> Tensor:
        """Mean loss of the other tokens that have a target; nan if there are none."""
        return self.losses_bt[~self.mask_bt & (self.scores_bt != -torch.inf)].mean()


class MatrixHead(Head):
    """A head that is one matrix of somebody else's, without bias."""

    tied = True

    def __init__(self, weight_vd: Tensor, soft_cap: float | None = None) -> None:
        super().__init__()
        self._weight = (weight_vd,)  # in a tuple, so that it is no parameter of this module
        self.soft_cap = soft_cap

    @property
    def weight_vd(self) -> Tensor:
        """The output matrix [v, d]."""
        return self._weight[0]

    def features(self, hidden: Tensor) -> Features:
        """The hidden states themselves."""
        return Features(hidden)

    def flops(self) -> float:
        """Forward FLOPs per token."""
        return 2 * self.weight_vd.numel()


def selective_loss(
    predictions: Predictions,
    targets_bt: Tensor,
    reference_bt: Tensor | None = None,
    ratio: float = 0.6,
    score: Score = "excess",
    scope: Scope = "global",
    noise_bt: Tensor | None = None,
    rows: Sequence[int] = (),
    peers: Peers | None = None,
    chunk: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> SelectiveOutput:
    """Mean loss of the tokens with the largest scores.

    Args:
        predictions: logits, or (hidden states, output matrix or head).
        targets_bt: int64 token ids; IGNORE (-100) where there is no target.
        reference_bt: losses of the reference on these targets.
        ratio: share of the targets that is selected, in (0, 1].
        score, scope, temperature, seed: see `torchstone.objectives.selection`.
        noise_bt: bool, targets known to be noise.
        rows: a number for each sequence, for the score random.
        peers: ranks that select together; None: alone.
        chunk: tokens whose logits exist at once.

    Raises:
        ConfigError: a setting that is not allowed, or a score without what it reads. DataError: a reference loss is not finite.
    """
    rule = Rule(ratio, score, scope, temperature, seed)
    given = Evidence(targets_bt != IGNORE, None, reference_bt, None, noise_bt, rows)
    return _selected(predictions, targets_bt, rule, given, peers or Alone(), chunk)


class Selective:
    """The same with a reference model that scores the same tokens.

    Args:
        reference: token ids [b, t] → logits, an object with `logits`, or a torchstone decoder; frozen, and a module is put into
            evaluation mode. None: losses are given in each call, or the score needs none.
        ratio, score, scope, temperature, seed, peers, chunk: see `selective_loss`.

    Raises:
        ConfigError: a setting that is not allowed, or a reference for a score that reads none.
    """

    def __init__(
        self,
        reference: Callable[[Tensor], Any] | None = None,
        ratio: float = 0.6,
        score: Score = "excess",
        scope: Scope = "global",
        *,
        temperature: float = 1.0,
        seed: int = 0,
        peers: Peers | None = None,
        chunk: int | None = None,
    ) -> None:
        self.rule = Rule(ratio, score, scope, temperature, seed)
        if reference is not None and score not in READS_REFERENCE | {"entropy"}:
            raise ConfigError(f"score {score} reads no reference, and a reference was given; leave it out.")
        self.reference, self.peers, self.chunk = reference, peers or Alone(), chunk
        if isinstance(reference, nn.Module):
            reference.eval()

    def __call__(
        self,
        predictions: Predictions,
        tokens_bt: Tensor,
        targets_bt: Tensor | None = None,
        reference_bt: Tensor | None = None,
        noise_bt: Tensor | None = None,
        rows: Sequence[int] = (),
    ) -> SelectiveOutput:
        """Mean loss of the selected tokens.

        Args:
            predictions: of the model, at every token.
            tokens_bt: what model and reference read.
            targets_bt: what they should say; None: the next token of the row, nothing at its last one.
            reference_bt: losses that are there already, in place of the reference.
            noise_bt, rows: see `selective_loss`.
        """
        if targets_bt is None:
            targets_bt = shifted(tokens_bt, IGNORE)
        entropy_bt = None
        if self.reference is not None and reference_bt is None and not self.rule.everything:
            reference_bt, entropy_bt = self._referred(predictions, tokens_bt, targets_bt)
        given = Evidence(targets_bt != IGNORE, None, reference_bt, entropy_bt, noise_bt, rows)
        return _selected(predictions, targets_bt, self.rule, given, self.peers, self.chunk)

    @torch.no_grad()
    def _referred(
        self, predictions: Predictions, tokens_bt: Tensor, targets_bt: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        theirs = predictions_of(self.reference, tokens_bt)
        sizes = [vocabulary_of(one) for one in (theirs, predictions)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"reference vocab {sizes[0]} ≠ model vocab {sizes[1]}; give a reference with the model's tokenizer, or compare "
                "texts by spans (torchstone.evals.longppl)."
            )
        losses_n, _ = token_losses(theirs, targets_bt, self.chunk)
        entropy_bt = None
        if self.rule.score == "entropy":
            entropy_bt = token_entropies(theirs, self.chunk).view(targets_bt.shape)
        return losses_n.view(targets_bt.shape), entropy_bt


def shifted(values_bt: Tensor, last: float) -> Tensor:
    """Values [b, t] of tokens, each moved to the position that predicts it; `last` at the end of a row."""
    return torch.cat([values_bt[:, 1:], values_bt.new_full((len(values_bt), 1), last)], dim=1)


def predictions_of(model: Any, tokens_bt: Tensor) -> Predictions:
    """What a callable says of token ids: logits, or hidden states and head of a torchstone decoder."""
    found = model(tokens_bt)
    head = getattr(model, "head", None)
    if isinstance(head, Head):
        return found[0], head
    return found if isinstance(found, Tensor) else found.logits


def vocabulary_of(predictions: Predictions) -> int:
    """Number of token ids that predictions speak of."""
    if isinstance(predictions, Tensor):
        return predictions.shape[-1]
    head = predictions[1]
    return len(head.weight_vd if isinstance(head, Head) else head)


def _selected(
    predictions: Predictions, targets_bt: Tensor, rule: Rule, given: Evidence, peers: Peers, chunk: int | None
) -> SelectiveOutput:
    losses_n, weighted = token_losses(predictions, targets_bt, chunk)
    losses_bt, valid_bt = losses_n.view(targets_bt.shape), given.valid_bt
    evidence = Evidence(valid_bt, losses_bt, given.reference_bt, given.entropy_bt, given.noise_bt, given.rows)
    if rule.everything:
        scores_bt = torch.zeros_like(losses_bt).masked_fill(~valid_bt, -torch.inf)
    else:
        scores_bt = scored(rule, evidence)
    choice = chosen(rule, [scores_bt], peers)[0]
    mask_bt = choice.weights_bt > 0
    own = (valid_bt if rule.score == "soft" else mask_bt).sum().unsqueeze(0)
    count = peers.gather(own).sum()
    if not int(count):
        warnings.warn("the batch has no target, and its loss is 0; check what is masked.", stacklevel=3)
    loss = weighted(choice.weights_bt.flatten()) / count.clamp(min=1) * peers.size
    noise = None if given.noise_bt is None else (mask_bt & given.noise_bt).sum() / mask_bt.sum()
    return SelectiveOutput(loss, mask_bt, choice.weights_bt, choice.threshold, losses_bt, scores_bt, noise)


def token_losses(
    predictions: Predictions, targets_bt: Tensor, chunk: int | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Losses [n], detached, and the function that makes their differentiable sum from weights [n]."""
    targets_n = targets_bt.flatten()
    if isinstance(predictions, Tensor):
        logits_nv = predictions.flatten(0, -2).float()
        losses_n = F.cross_entropy(logits_nv, targets_n, ignore_index=IGNORE, reduction="none")
        return losses_n.detach(), lambda weights_n: torch.where(weights_n > 0, losses_n * weights_n, 0.0).sum()
    hidden_nd, head = predictions[0].flatten(0, -2), predictions[1]
    owner = head if isinstance(head, Head) else MatrixHead(head)
    losses_n = head_losses(owner, hidden_nd.detach(), targets_n, chunk)
    return losses_n, lambda weights_n: head_cross_entropy(owner, hidden_nd, targets_n, chunk, weights_n=weights_n)[0]


def token_entropies(predictions: Predictions, chunk: int | None) -> Tensor:
    """Entropies [n] of predictions."""
    if not isinstance(predictions, Tensor):
        head = predictions[1]
        owner = head if isinstance(head, Head) else MatrixHead(head)
        return head_entropies(owner, predictions[0].flatten(0, -2), chunk)
    rows = predictions.flatten(0, -2).split(chunk or ENTROPY_ROWS)
    return torch.cat([torch.distributions.Categorical(logits=one_cv.float()).entropy() for one_cv in rows])
