"""What every output head is: an output matrix that multiplies one or several feature vectors per token.

    one vector f(h)       logits = cap(W f(h))                                linear (f = h) and factored (f = B h) heads
    K vectors f_k(h)      p = Σ_k π_k(h) · softmax(W f_k(h))                  mixture of softmaxes

Losses need no more than `features` and `weight_vd`, so that they can work through the tokens in chunks and never hold all
logits; a new head that fits either line needs no loss of its own.

Soft cap: logits become c·tanh(logits / c), which keeps them within ±c (Bello et al. 2017; Gemma 2). It is applied in fp32.

Shapes: … any leading sizes · d channels of a feature vector · k components · v vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchstone.nn.roles import Roles


class Features(NamedTuple):
    """What the output matrix multiplies.

    Attributes:
        states: […, d], or […, k, d] in a mixture.
        log_prior: fp32 […, k], log π_k, whose exponentials sum to 1; None where there is one softmax.
    """

    states: Tensor
    log_prior: Tensor | None = None


class Head(nn.Module, ABC):
    """Maps hidden states to logits.

    Attributes:
        tied: whether the output matrix is the token embedding.
        soft_cap: bound of the logits, or None.
        components: feature vectors per token, each with logits of its own.
    """

    tied: bool
    soft_cap: float | None = None
    components: int = 1

    @property
    @abstractmethod
    def weight_vd(self) -> Tensor:
        """The output matrix [v, d], d being the channels of the features."""

    @abstractmethod
    def features(self, hidden: Tensor) -> Features:
        """Features of hidden states […, width]."""

    @abstractmethod
    def flops(self) -> float:
        """Forward FLOPs per token."""

    def full_matrix(self) -> Tensor | None:
        """The matrix [v, width] of the whole map from hidden state to logits; None where the map is not linear."""
        return None

    def parameter_roles(self) -> Roles:
        """All matrices of a head count with the embeddings; a tied one is the embedding's."""
        return {name: "embeddings" for name, parameter in self.named_parameters() if parameter.dim() >= 2}

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, width] → […, v]. A mixture gives log-probabilities, which are logits of the same distribution."""
        return logits_of(self.features(hidden), self.weight_vd, self.soft_cap)

    def forward(self, hidden: Tensor) -> Tensor:
        """The same as `logits`."""
        return self.logits(hidden)


class TiedOrOwn(Head):
    """A head with an output matrix as wide as the model: its own, or the embedding's.

    A tied head owns no output matrix: it looks the weight up in the embedding, so that state dicts hold it once.
    """

    def __init__(self, width: int, embedding: nn.Embedding, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        self._embedding = (embedding,)  # in a tuple, so that it is no submodule
        if not tied:
            self.project = nn.Linear(width, embedding.num_embeddings, bias=False)

    @property
    def weight_vd(self) -> Tensor:
        """The output matrix [v, d]."""
        return self._embedding[0].weight if self.tied else self.project.weight


def logits_of(features: Features, weight_vd: Tensor, soft_cap: float | None = None) -> Tensor:
    """Logits […, v] of features; log-probabilities (fp32) of a mixture."""
    logits = F.linear(features.states, weight_vd)
    if features.log_prior is None:
        return logits if soft_cap is None else capped(logits.float(), soft_cap).to(logits.dtype)
    return torch.logsumexp(logits.float().log_softmax(-1) + features.log_prior.unsqueeze(-1), dim=-2)


def capped(logits: Tensor, soft_cap: float) -> Tensor:
    """soft_cap · tanh(logits / soft_cap)."""
    return (logits / soft_cap).tanh() * soft_cap
