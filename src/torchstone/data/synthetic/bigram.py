"""Tokens from a random table of next-token probabilities, whose entropy is known: loss minus entropy is what a model misses.

Every row of the table P [v, v] is a distribution of the next token given the present one; the past says nothing more. Two
tables, both of full rank in log P:

    free      log P = scale · G, row-normalised, with G of independent normal numbers: v² facts, which a model can only
              learn by having as many parameters
    mixture   P[x] = Σ_k π_k(x) · softmax(scale · W tanh(R_k u_x) · √(1/latent)), with `latent` channels per token:
              few facts, but no linear head of small rank expresses them (Yang et al. 2018)

The table depends on `table_seed` alone; training seeds choose sequences. The first token of a sequence is drawn from the
table's stationary distribution, so that every position looks alike.

Shapes: b sequences · t tokens · v vocabulary · e latent channels · k components.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from torchstone.data.keyed import Keys, key, uniform
from torchstone.data.synthetic.task import Rows, Task
from torchstone.recipe.part import Part

_STEPS = 200  # of the power iteration; dense random tables forget their start in a few


class BigramConfig(Part):
    """Sequences of a random Markov chain with known entropy."""

    family: ClassVar[str] = "data"
    kind: Literal["bigram"] = "bigram"
    vocab_size: int = Field(default=512, gt=1, description="token ids")
    length: int = Field(default=64, gt=0, description="tokens of a sequence")
    scale: float = Field(default=1.0, gt=0, description="standard deviation of the table's logits, about")
    latent: int | None = Field(
        default=None, gt=0, description="channels per token of a mixture table; null: free table"
    )
    components: int | None = Field(default=None, gt=0, description="softmaxes of a mixture table; null: free table")
    table_seed: int = Field(default=0, ge=0, description="which table; training seeds do not change it")

    @model_validator(mode="after")
    def _one_table(self) -> Self:
        if (self.latent is None) != (self.components is None):
            raise ValueError(
                "latent and components belong together: give both for a mixture table, neither for a free one."
            )
        return self

    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.vocab_size

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.length

    def build(self, cache: Path | None = None) -> Bigram:
        """The task; nothing is cached."""
        return Bigram(self)


class Bigram(Task[BigramConfig]):
    """DataSource of sequences from one table."""

    @cached_property
    def log_table_vv(self) -> NDArray[np.float64]:
        """log P: row = present token, column = next token."""
        return _free(self.settings) if self.settings.latent is None else _mixture(self.settings)

    @cached_property
    def stationary_v(self) -> NDArray[np.float64]:
        """How often each token occurs."""
        table_vv = np.exp(self.log_table_vv)
        share_v = np.full(self.vocab_size, 1 / self.vocab_size)
        for _ in range(_STEPS):
            share_v = share_v @ table_vv
        return share_v / share_v.sum()

    @property
    def entropy(self) -> float:
        """Nats per token: the least loss that any model can reach on average."""
        row_v = -(np.exp(self.log_table_vv) * self.log_table_vv).sum(axis=1)
        return float(self.stationary_v @ row_v)

    def rows(self, keys_b: Keys) -> Rows:
        """Sequences; every token has a target."""
        draws_bt = uniform(keys_b, self.length + 1)
        tokens_bt = np.empty(draws_bt.shape, dtype=np.int64)
        tokens_bt[:, 0] = np.searchsorted(np.cumsum(self.stationary_v), draws_bt[:, 0], side="right")
        tokens_bt[:, 0] = np.minimum(tokens_bt[:, 0], self.vocab_size - 1)
        for t in range(1, self.length + 1):
            before_b = tokens_bt[:, t - 1]
            found_b = np.searchsorted(self._cumulative, draws_bt[:, t] + before_b, side="right")
            tokens_bt[:, t] = np.minimum(found_b - before_b * self.vocab_size, self.vocab_size - 1)
        return tokens_bt[:, :-1], tokens_bt[:, 1:]

    @cached_property
    def _cumulative(self) -> NDArray[np.float64]:
        """All rows' cumulative sums in one rising list: row x lies between x and x + 1."""
        sums_vv = np.cumsum(np.exp(self.log_table_vv), axis=1)
        sums_vv /= sums_vv[:, -1:]
        rising_vv: NDArray[np.float64] = sums_vv + np.arange(self.vocab_size)[:, None]
        return rising_vv.ravel()

    def excess(self, tokens_bt: Tensor, logits_btv: Tensor) -> Tensor:
        """KL(P[token] ‖ softmax(logits)) in nats, fp64 [b, t]: the model's loss beyond the entropy, without sampling noise."""
        log_p_btv = torch.from_numpy(self.log_table_vv).to(logits_btv.device)[tokens_bt]
        return (log_p_btv.exp() * (log_p_btv - logits_btv.double().log_softmax(-1))).sum(-1)


def _normal(settings: BigramConfig, name: str, rows: int, columns: int) -> NDArray[np.float64]:
    """Independent normal numbers from the table's seed (Box and Muller, so that no library's version changes them)."""
    keys_r = key("bigram table", settings.table_seed, name, np.arange(rows))
    draws = uniform(keys_r, 2 * columns)
    normal: NDArray[np.float64] = np.sqrt(-2 * np.log1p(-draws[:, :columns])) * np.cos(2 * np.pi * draws[:, columns:])
    return normal


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    logits = logits - logits.max(axis=-1, keepdims=True)
    normalised: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return normalised


def _free(settings: BigramConfig) -> NDArray[np.float64]:
    return _log_softmax(settings.scale * _normal(settings, "logits", settings.vocab_size, settings.vocab_size))


def _mixture(settings: BigramConfig) -> NDArray[np.float64]:
    v, e, k = settings.vocab_size, settings.latent or 1, settings.components or 1
    context_ve, output_ve = _normal(settings, "context", v, e), _normal(settings, "output", v, e)
    turn_kee = _normal(settings, "components", k * e, e).reshape(k, e, e) / np.sqrt(e)
    states_kve = np.tanh(np.einsum("ve,kef->kvf", context_ve, turn_kee))
    states_kve *= np.sqrt(e / np.maximum((states_kve**2).sum(-1, keepdims=True), 1e-12))
    log_p_kvv = _log_softmax(settings.scale * states_kve @ output_ve.T / np.sqrt(e))
    prior_vk = _log_softmax(_normal(settings, "prior", v, e) @ _normal(settings, "gates", k, e).T / np.sqrt(e))
    joint_kvv = log_p_kvv + prior_vk.T[:, :, None]
    top_vv = joint_kvv.max(axis=0)
    return top_vv + np.log(np.exp(joint_kvv - top_vv).sum(axis=0))
