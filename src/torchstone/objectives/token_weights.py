"""Weights of tokens from two losses: compare → transform → truncate → sparsify → normalise → interpolate.

Helm et al., token weighting for long-range language modelling (arXiv 2503.09202), put many losses into one form, mean(w · loss),
where w is made of the loss with much knowledge (long) and of one with less or other knowledge (base):

    compare      difference: long − base                 quotient: (long + 1e-5) / (base + 1e-5)
    transform    minus: −w    abs: |w|    exp: eʷ    max: negatives become 0    {shift: c}: w − ln c
    truncate     w above the bound becomes the bound
    sparsify     κ: of a row's T weights the int(κT) largest become 1 and the rest 0; ties: the lowest index first
    normalise    l1: |w| / Σ|w| · T      softmax: softmax(w) · T      both make the mean weight 1; a row of zeros becomes uniform
    interpolate  λ: λ + (1 − λ) w, only together with a normalisation

    longce   minus, exp, truncate 5                      (LongCE, arXiv 2410.23771; base: short context)
    dense    abs, l1, interpolate 0.75                   sparse   abs, sparsify 0.2, l1
    ppmi     minus, shift 1.5, max, l1
    slm      sparsify 0.6 over the whole batch, l1       (Rho-1, arXiv 2404.07965; base: a reference model)

Steps run in this order, transforms in the order given. Everything is in fp32 and detached.

Shapes: b rows · t tokens. `weights` takes [b, t], or [t] for one row.

Pitfalls
- T counts the valid tokens of a row. Tokens that are not valid weigh 0, and so does a row without valid tokens.
- int(κT) may be 0, as in the published code: a short row then becomes uniform under l1, and is left out without it.
- The published code breaks ties of zeros by chance and others by the highest index, and keeps the sign of w under l1.
- `slm` ranks the tokens that one call sees. The objective `selective` ranks those of all ranks and micro-batches.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchstone.errors import DataError
from torchstone.recipe.part import Strict

QUOTIENT_GUARD = 1e-5
LEAST_NORM = 1e-12


class Shift(Strict):
    """The transform w − ln c."""

    shift: float = Field(gt=0, description="c: the weight that a factor of c between the two probabilities leaves at 0")


Transform = Literal["minus", "abs", "exp", "max"] | Shift


class TokenWeights(Strict):
    """The pipeline; see the module's docstring."""

    compare: Literal["difference", "quotient"] = Field(
        default="difference", description="difference: long − base; quotient: (long + 1e-5) / (base + 1e-5)"
    )
    transforms: tuple[Transform, ...] = Field(
        default=(), description="in this order: minus, abs, exp, max (negatives become 0), {shift: c} (minus ln c)"
    )
    truncate: float | None = Field(default=None, description="upper bound of the weights; null: none")
    sparsify: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of a row's tokens that weigh 1, the others 0; null: keep the weights",
    )
    normalise: Literal["l1", "softmax"] | None = Field(
        default=None, description="makes the mean weight of a row 1; null: leaves the weights as they are"
    )
    interpolate: float | None = Field(
        default=None, ge=0, le=1, description="λ of λ + (1 − λ) w, after a normalisation; null: no interpolation"
    )
    over: Literal["row", "batch"] = Field(
        default="row", description="what is sparsified and normalised together: each row, or all rows of the call"
    )

    @model_validator(mode="after")
    def _interpolates_what_is_normalised(self) -> TokenWeights:
        if self.interpolate is not None and self.normalise is None:
            raise ValueError(
                f"interpolate is {self.interpolate} and normalise null: weights are interpolated with 1 only where their mean "
                "is 1; set normalise to l1 or softmax, or leave interpolate out"
            )
        return self

    @torch.no_grad()
    def weights(self, long_bt: Tensor, base_bt: Tensor, valid_bt: Tensor | None = None) -> Tensor:
        """Weights of tokens, fp32 and detached, in the shape of the losses.

        Args:
            long_bt: losses with the long context, or of the model that is trained.
            base_bt: losses with the short context, or of the reference.
            valid_bt: bool, where there is a target; None: everywhere. Losses elsewhere are not looked at.

        Raises:
            DataError: shapes differ, or a weight is no finite number; the message names row and position.
        """
        if long_bt.shape != base_bt.shape or (valid_bt is not None and valid_bt.shape != long_bt.shape):
            shapes = [list(one.shape) for one in (long_bt, base_bt, valid_bt) if one is not None]
            raise DataError(
                f"losses and mask have the shapes {', '.join(map(str, shapes))}; give one value per token in each, [b, t], all "
                "aligned to the predicted token."
            )
        shape = long_bt.shape
        rows = (1, -1) if self.over == "batch" or long_bt.dim() < 2 else (shape[0], -1)
        valid = torch.ones_like(long_bt, dtype=torch.bool) if valid_bt is None else valid_bt
        weights_bt = self._transformed(long_bt.float(), base_bt.float()).masked_fill(~valid, 0.0)
        if not bool(weights_bt.isfinite().all()):
            raise DataError(_not_finite(weights_bt, long_bt, base_bt))
        if not weights_bt.numel():
            return weights_bt
        weights_bt, valid_rows = weights_bt.reshape(rows), valid.reshape(rows)
        if self.sparsify is not None:
            number_b = (valid_rows.sum(1).double() * self.sparsify).long()
            weights_bt = largest(weights_bt, valid_rows, number_b).float()
        weights_bt = self._normalised(weights_bt, valid_rows)
        return weights_bt.masked_fill(~valid_rows, 0.0).reshape(shape)

    def _transformed(self, long: Tensor, base: Tensor) -> Tensor:
        """Compared, transformed and truncated: what looks at one token at a time."""
        if self.compare == "quotient":
            weights = (long + QUOTIENT_GUARD) / (base + QUOTIENT_GUARD)
        else:
            weights = long - base
        for transform in self.transforms:
            weights = _apply(transform, weights)
        return weights if self.truncate is None else weights.clamp(max=self.truncate)

    def _normalised(self, weights_bt: Tensor, valid_bt: Tensor) -> Tensor:
        if self.normalise is None:
            return weights_bt
        count_b1 = valid_bt.sum(1, keepdim=True)
        if self.normalise == "l1":
            zero_b1 = (weights_bt == 0).all(1, keepdim=True)
            weights_bt = torch.where(zero_b1, valid_bt.float(), weights_bt.abs())
            weights_bt = weights_bt / weights_bt.sum(1, keepdim=True).clamp_min(LEAST_NORM) * count_b1
        else:
            weights_bt = weights_bt.masked_fill(~valid_bt, -torch.inf).softmax(1) * count_b1
        return weights_bt if self.interpolate is None else self.interpolate + (1 - self.interpolate) * weights_bt


def _apply(transform: Transform, weights: Tensor) -> Tensor:
    if isinstance(transform, Shift):
        return weights - torch.log(torch.tensor(transform.shift))
    if transform == "minus":
        return -weights
    if transform == "abs":
        return weights.abs()
    return weights.exp() if transform == "exp" else weights.clamp(min=0)


def largest(values_bt: Tensor, valid_bt: Tensor, number_b: Tensor) -> Tensor:
    """bool [b, t]: the `number_b` largest valid values of every row; among equals those of the lowest index.

    Args:
        values_bt: scores above −∞ where they are valid; nan counts as the largest.
        valid_bt: bool; what is not valid is never chosen.
        number_b: int64, at most the valid values of the row.
    """
    order_bt = values_bt.masked_fill(~valid_bt, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    first_bt = torch.arange(values_bt.shape[1], device=values_bt.device) < number_b.unsqueeze(1)
    return torch.zeros_like(valid_bt).scatter_(1, order_bt, first_bt)


def _not_finite(weights_bt: Tensor, long_bt: Tensor, base_bt: Tensor) -> str:
    """What to say of the first weight that is no finite number."""
    place = tuple((~weights_bt.isfinite()).nonzero()[0].tolist())
    found = f"the weight of the token at {_said(place)} is {float(weights_bt[place])}"
    long, base = float(long_bt[place]), float(base_bt[place])
    if long != long or base != base:
        return f"{found}: its losses are {long} and {base}. Look for the model or the stored losses that left them."
    return (
        f"{found}, from losses of {long:g} and {base:g}: a transform overflows. Set truncate, which bounds the weights from "
        "above, or take other transforms."
    )


def _said(place: tuple[int, ...]) -> str:
    return f"(row {place[0]}, position {place[1]})" if len(place) == 2 else f"(position {place[0]})"


PRESETS: MappingProxyType[str, TokenWeights] = MappingProxyType(
    {
        "longce": TokenWeights(transforms=("minus", "exp"), truncate=5.0),
        "dense": TokenWeights(transforms=("abs",), normalise="l1", interpolate=0.75),
        "sparse": TokenWeights(transforms=("abs",), sparsify=0.2, normalise="l1"),
        "ppmi": TokenWeights(transforms=("minus", Shift(shift=1.5), "max"), normalise="l1"),
        "slm": TokenWeights(sparsify=0.6, normalise="l1", over="batch"),
    }
)
