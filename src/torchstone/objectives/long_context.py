"""LongCE: cross-entropy weighted by how much a token needs its long context (Fang et al., arXiv 2410.23771, section 4).

    LSD_i = short loss of token i, with trunc_len … trunc_len + stride - 1 tokens before it, minus its loss with all of them
    w_i = min(exp(LSD_i), γ), without gradient; 1 for the first trunc_len tokens
    loss = mean over all targets of w_i · loss_i

A token that only far context explains weighs up to γ, one that any context explains weighs 1. The short losses are the model's
own, computed over sliding windows without gradient (`long_context_windows`), or those of a frozen scorer.

Rows of a batch are sequences: windows stay inside rows, tokens of one document do not see another where documents are masked, and
a document that begins inside a window has the same context in both passes, so that its tokens weigh 1.

`weights` takes other pipelines over the same two losses (`token_weights`): the long loss is that of the whole row.

In evaluation (no gradient) the objective is plain cross-entropy, so that validation losses compare.

Shapes: b rows · t inputs of a row (t + 1 ids) · n tokens, batch and time flattened.

Pitfalls
- The weighted sum is divided by the number of targets, not by Σw, as published: loss and gradients grow by the mean weight.
  `normalize` rescales the weights of the global batch to mean 1.
- A weight is below 1 where the short context predicts better. It is noise in the loss where the model has dropout: windows and
  rows draw masks of their own.
- trunc_len counts ids: of a row of t inputs, the targets from position trunc_len - 1 on are scored.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.errors import ConfigError
from torchstone.nn.span import Span
from torchstone.objectives.long_context_windows import local_positions, window_cost, windowed
from torchstone.objectives.next_token import LossOutput, NextToken, head_cross_entropy, head_scores
from torchstone.objectives.token_weights import PRESETS, TokenWeights
from torchstone.recipe.part import Part

GAMMA = 5.0
CHUNK = 2048  # targets whose logits exist at once, where a plain callable makes them
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 1 << 16}  # on CPUs activations then stay in the cache
Preset = Literal["longce", "dense", "sparse", "ppmi"]


def pipeline_of(weights: Preset | TokenWeights, gamma: float | None = GAMMA) -> TokenWeights:
    """The steps from two losses to a weight; `gamma` bounds those of `longce`."""
    if isinstance(weights, TokenWeights):
        return weights
    return PRESETS[weights].model_copy(update={"truncate": gamma} if weights == "longce" else {})


def weigh(long_bt: Tensor, short_bs: Tensor, pipeline: TokenWeights, valid_bt: Tensor | None = None) -> Tensor:
    """Weights of all targets, fp32 [b, t]: those of the last s from the pipeline, 1 before."""
    first = long_bt.shape[1] - short_bs.shape[1]
    valid_bs = None if valid_bt is None else valid_bt[:, first:]
    if not short_bs.shape[1]:
        return torch.ones_like(long_bt, dtype=torch.float32)
    scored_bs = pipeline.weights(long_bt[:, first:], short_bs, valid_bs)
    return torch.cat([torch.ones_like(long_bt[:, :first], dtype=torch.float32), scored_bs], dim=1)


@torch.no_grad()
def long_context_weights(
    model: Callable[[Tensor], Tensor],
    tokens_bt: Tensor,
    *,
    trunc_len: int = 4096,
    stride: int = 1024,
    gamma: float | None = GAMMA,
    weights: Preset | TokenWeights = "longce",
    long_bt: Tensor | None = None,
) -> Tensor:
    """Weights of the targets 1 … t-1 of rows of t ids, for a training loop of one's own: `(w * losses).mean()`.

    Args:
        model: ids [b, t] → logits [b, t, v]; it is called as it is, in the mode that it is in.
        tokens_bt: int64 ids.
        trunc_len, stride: K and S of the windows.
        gamma: bound of the weights of `longce`; None: none.
        weights: a preset of `token_weights`, or a pipeline.
        long_bt: losses [b, t-1] with the whole row as context, where the loop has them already; None computes them.

    Returns:
        fp32 [b, t-1].

    Raises:
        ConfigError: trunc_len or stride below 1, or rows of fewer than two ids.
    """
    if tokens_bt.dim() != 2 or tokens_bt.shape[1] < 2:
        raise ConfigError(f"tokens_bt has the shape {list(tokens_bt.shape)}; give rows of at least two ids, [b, t].")

    def losses(window_nw: Tensor, targets: int) -> Tensor:
        return callable_losses(model, window_nw, targets)

    length = tokens_bt.shape[1]
    at_once = TOKENS_AT_ONCE.get(tokens_bt.device.type, TOKENS_AT_ONCE["cpu"])
    short_bs = windowed(tokens_bt, trunc_len, stride, losses, length=length, at_once=at_once)
    if long_bt is None:
        long_bt = torch.cat([losses(row_1t, length - 1) for row_1t in tokens_bt.split(1)])
    return weigh(long_bt.detach().float(), short_bs, pipeline_of(weights, gamma))


@torch.no_grad()
def callable_losses(model: Callable[[Tensor], Tensor], tokens_bt: Tensor, last: int) -> Tensor:
    """fp32 losses [b, last] of the last ids of rows, of a function that gives all logits."""
    logits_bsv = model(tokens_bt[:, :-1])[:, -last:]
    targets_bs = tokens_bt[:, -last:]
    pieces = zip(logits_bsv.flatten(0, 1).split(CHUNK), targets_bs.flatten().split(CHUNK), strict=True)
    losses = [F.cross_entropy(logits_cv.float(), y_c, reduction="none") for logits_cv, y_c in pieces]
    return torch.cat(losses).view(targets_bs.shape)


class LongContext(NextToken):
    """The objective; see the module's docstring.

    Args:
        config: its settings.
    """

    reference_field = "scorer"

    def __init__(self, config: LongContextConfig) -> None:
        super().__init__(config.chunk)
        self.trunc_len, self.stride = config.trunc_len, config.stride
        self.pipeline = pipeline_of(config.weights, config.gamma)
        self.reference_run = config.scorer
        self._scorer: tuple[Any, ...] = ()  # in a tuple, so that it is no submodule
        self._seen = torch.zeros(4, dtype=torch.float64)

    def attach_reference(self, model: Any) -> None:
        """Take the frozen model whose short losses are used."""
        self._scorer = (model,)

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        """Loss of `model` (a decoder) on a batch."""
        if not torch.is_grad_enabled():
            return super().forward(model, batch)
        hidden_btd, _, auxiliary = model(batch.tokens_bt, _span(batch))
        targets_bt = batch.targets_bt
        weights_bt = batch.weights_bt
        if weights_bt is None:
            weights_bt = self.balanced([self.weigh(model, batch, hidden_btd)], [batch])[0]
        flat = model.head, hidden_btd.flatten(0, 1), targets_bt.flatten()
        loss_sum, losses_n = head_cross_entropy(*flat, self.chunk, self._untraced, weights_bt.flatten())
        count = (targets_bt != IGNORE).sum()
        self._note(weights_bt, targets_bt)
        per_token_bt = losses_n.view(targets_bt.shape)
        return LossOutput(loss_sum, count, per_token_bt, auxiliary=auxiliary, weights_bt=weights_bt)

    @torch.no_grad()
    def weigh(self, model: Any, batch: Batch, hidden_btd: Tensor) -> Tensor:
        """Weights [b, t] of a batch whose final hidden states are known; 0 where there is no target."""
        targets_bt = batch.targets_bt
        first = min(self.trunc_len - 1, targets_bt.shape[1])
        valid_bt = targets_bt != IGNORE
        if first == targets_bt.shape[1]:
            return valid_bt.float()
        scored = hidden_btd[:, first:].flatten(0, 1), targets_bt[:, first:].flatten()
        long_bs = head_scores(model.head, *scored, self.chunk)[0].view(targets_bt[:, first:].shape)
        long_bt = F.pad(long_bs, (first, 0))
        scorer = self._scorer[0] if self._scorer else model
        return weigh(long_bt, self.short_losses(scorer, batch), self.pipeline, valid_bt) * valid_bt

    @torch.no_grad()
    def short_losses(self, model: Any, batch: Batch) -> Tensor:
        """Losses with the short context of the positions from trunc_len - 1 on; 0 where there is no target."""
        tokens_bt = batch.tokens_bt
        index_bt = torch.arange(tokens_bt.numel(), device=tokens_bt.device).view(tokens_bt.shape)

        def losses(index_nw: Tensor, targets: int) -> Tensor:
            def at(x_bt: Tensor | None) -> Tensor | None:
                return None if x_bt is None else x_bt.flatten()[index_nw]

            documents_nw = at(batch.documents_bt)
            span = Span(positions_bt=local_positions(at(batch.positions_bt), documents_nw), documents_bt=documents_nw)
            hidden_nwd, _, _ = model(tokens_bt.flatten()[index_nw], span)
            targets_ns = batch.targets_bt.flatten()[index_nw[:, -targets:]]
            flat = hidden_nwd[:, -targets:].flatten(0, 1), targets_ns.flatten()
            return head_scores(model.head, *flat, self.chunk)[0].view(targets_ns.shape)

        at_once = TOKENS_AT_ONCE.get(tokens_bt.device.type, TOKENS_AT_ONCE["cpu"])
        length = tokens_bt.shape[1] + 1
        return windowed(index_bt, self.trunc_len, self.stride, losses, length=length, at_once=at_once)

    def balanced(self, weights: list[Tensor], batches: list[Batch]) -> list[Tensor]:
        """The weights as they are; `Normalised` rescales them."""
        return weights

    def flops(self, model: Any, length: int) -> float:
        """Forward FLOPs per token of which training costs three: the row, and a third of what runs without gradient.

        That is the windows, and the head once more on the scored targets. A scorer counts as if it had the model's own size.

        Raises:
            ConfigError: rows so short that no target would be scored.
        """
        if length < self.trunc_len:
            raise ConfigError(
                f"rows have {length} tokens and objective.trunc_len is {self.trunc_len}, so no token has a longer context than "
                f"the short one; give objective.trunc_len below {length}, or longer rows (data.length)."
            )
        ids = length + 1
        windows = window_cost(ids, self.trunc_len, self.stride, model.stack_flops, model.head.flops())
        again = (ids - self.trunc_len) * model.head.flops()
        return float(model.flops(length) + (windows + again) / (3 * length))

    def step_metrics(self, total: Callable[[Tensor], Any]) -> dict[str, float]:
        """Mean weight of the step's targets, and the shares of those at the bound and below 1."""
        seen = self._seen.clone()
        total(seen)
        self._seen.zero_()
        count, weight, bounded, below = seen.tolist()
        if not count:
            return {}
        return {"mean_weight": weight / count, "share_at_bound": bounded / count, "share_below_one": below / count}

    @torch.no_grad()
    @torch.compiler.disable
    def _note(self, weights_bt: Tensor, targets_bt: Tensor) -> None:
        """Add a batch to what `step_metrics` tells."""
        chosen_n = weights_bt[targets_bt != IGNORE].double()
        bound = self.pipeline.truncate
        sums = [chosen_n.new_tensor(chosen_n.numel()), chosen_n.sum()]
        sums += [(chosen_n >= bound).sum() if bound is not None else chosen_n.new_zeros(()), (chosen_n < 1).sum()]
        self._seen = self._seen.to(chosen_n.device) + torch.stack([value.double() for value in sums])


class NormalisedLongContext(LongContext):
    """The objective with the weights of the global batch rescaled to mean 1: the loss is Σ w·loss / Σ w."""

    _world: tuple[Any, ...] = ()

    def join(self, world: Any) -> None:
        """Take the ranks among which weights are summed."""
        self._world = (world,)

    def plan(
        self, model: Any, batches: list[Batch], autocast: Callable[[], AbstractContextManager[Any]]
    ) -> list[Batch]:
        """Weights of several micro-batches, which need the sum over all of them."""
        weights = []
        for batch in batches:
            with autocast():
                hidden_btd, _, _ = model(batch.tokens_bt, _span(batch))
                weights.append(self.weigh(model, batch, hidden_btd))
        balanced = self.balanced(weights, batches)
        return [replace(batch, weights_bt=w_bt) for batch, w_bt in zip(batches, balanced, strict=True)]

    @torch.no_grad()
    @torch.compiler.disable
    def balanced(self, weights: list[Tensor], batches: list[Batch]) -> list[Tensor]:
        """The weights divided by their mean over the targets of the global batch."""
        counts = torch.stack([(batch.targets_bt != IGNORE).sum() for batch in batches])
        sums = torch.stack([counts.sum().double(), torch.stack([w_bt.sum() for w_bt in weights]).sum().double()])
        if self._world:
            self._world[0].total(sums)
        scale = torch.where(sums[1] > 0, sums[0] / sums[1].clamp_min(1e-30), 1.0).float()
        return [w_bt * scale for w_bt in weights]


def _span(batch: Batch) -> Span:
    return Span(positions_bt=batch.positions_bt, documents_bt=batch.documents_bt)


class LongContextConfig(Part):
    """`objective: long-context` (LongCE): next-token cross-entropy, weighted by what long context is worth to each token."""

    family: ClassVar[str] = "objective"
    kind: Literal["long-context"] = "long-context"
    trunc_len: int = Field(default=4096, ge=1, description="tokens of short context; the first ones of a row weigh 1")
    stride: int = Field(
        default=1024, ge=1, description="targets per window; larger is cheaper and mixes more context lengths"
    )
    gamma: float | None = Field(default=GAMMA, gt=0, description="bound of the weights of longce; null: none")
    normalize: bool = Field(default=False, description="rescale the weights of every step to mean 1")
    weights: Preset | TokenWeights = Field(
        default="longce", description="longce, dense, sparse, ppmi, or the steps of a pipeline over long and short loss"
    )
    scorer: str | None = Field(
        default=None, description="run whose frozen model gives the short losses; null: the model that is trained"
    )
    chunk: int | None = Field(
        default=None, gt=0, description="tokens whose logits exist at once; null: about a million logits"
    )

    @model_validator(mode="after")
    def _gamma_is_used(self) -> LongContextConfig:
        if self.weights != "longce" and self.gamma != GAMMA:
            raise ValueError(
                f"gamma is {self.gamma} and bounds the weights of longce only, but weights is "
                f"{self.weights if isinstance(self.weights, str) else 'a pipeline'}; leave gamma out, or set truncate in weights"
            )
        return self

    def build(self) -> LongContext:
        """The objective."""
        return NormalisedLongContext(self) if self.normalize else LongContext(self)
