"""Mixture of softmaxes: p(y | h) = Σ_k π_k(h) · softmax(W h_k)[y] with h_k = tanh(W_k h) (Yang et al., ICLR 2018).

The logarithm of a sum of exponentials of rank-d maps has no bound on its rank, so the mixture lifts the bottleneck of a
narrow model at the price of K softmaxes. π = softmax(P h), a linear layer. All components share W, which may be the token
embedding (tied). Mixing happens in probability space, as log-sum-exp in fp32.

W_k start with standard deviation 1/√d, which puts tanh in its range for states of unit size; W and P as the model's
other weights.

Pitfall: features are K·d numbers a token, and logits K·v; losses take K times fewer tokens at a time.

Shapes: … any leading sizes · d width · k components · v vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.nn.heads.base import Features, TiedOrOwn
from torchstone.nn.initialisation import Fill
from torchstone.recipe.part import Part


class MixtureOfSoftmaxes(TiedOrOwn):
    """K softmaxes over one output matrix.

    Args:
        width: channels of the hidden states.
        embedding: the token embedding, whose weight a tied head reads.
        components: K.
        tied: whether W is the embedding.
    """

    def __init__(self, width: int, embedding: nn.Embedding, components: int, tied: bool) -> None:
        super().__init__(width, embedding, tied)
        self.components = components
        self.w_latent = nn.Linear(width, components * width, bias=False)
        self.w_prior = nn.Linear(width, components, bias=False)

    def own_initialisation(self) -> dict[str, Fill]:
        """W_k by fan-in."""
        std = self.w_latent.in_features**-0.5
        return {"w_latent.weight": lambda value, generator: value.normal_(0.0, std, generator=generator)}

    def features(self, hidden: Tensor) -> Features:
        """tanh(W_k h) […, k, d] and log π [… , k]."""
        states = torch.tanh(self.w_latent(hidden)).unflatten(-1, (self.components, hidden.shape[-1]))
        return Features(states, F.log_softmax(self.w_prior(hidden).float(), dim=-1))

    def flops(self) -> float:
        """Forward FLOPs per token."""
        inner = self.w_latent.weight.numel() + self.w_prior.weight.numel()
        return 2 * (inner + self.components * self.weight_vd.numel())


class MixtureOfSoftmaxesConfig(Part):
    """`head: mixture-of-softmaxes`."""

    family: ClassVar[str] = "head"
    kind: Literal["mixture-of-softmaxes"] = "mixture-of-softmaxes"
    components: int = Field(default=8, gt=0, description="number of softmaxes")
    tied: bool = Field(default=True, description="true: the output matrix is the token embedding")

    def build(self, context: BuildContext, embedding: nn.Embedding) -> MixtureOfSoftmaxes:
        """The head; a tied one reads the embedding's weight."""
        return MixtureOfSoftmaxes(context.width, embedding, self.components, self.tied)
