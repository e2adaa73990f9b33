"""A bigram language half of which is certain: every token's entropy is known, and so is what a model misses of each half.

The language of the river valley picture of learning rates (Wen et al. 2024, arXiv 2410.05192). Half of the v tokens have one
possible successor, the other half a random distribution of successors:

    certain     contexts 0 … v/2−1: one successor each;  frequency of context i ∝ (i + 1)^−zipf,  total mass ½
    uncertain   contexts v/2 … v−1: softmax(scale · N(0, 1)) over all v tokens;  equal frequencies, total mass ½

Cross-entropy of a softmax row with next-token distribution q has, in the row's logits, the Hessian

    H_x = f(x) · (diag(q) − q qᵀ)                                       f the context's frequency

which vanishes as q becomes one-hot and is largest where q is spread out. Rare certain rows are therefore flat directions in which
a model improves slowly for a long time, uncertain rows steep ones in which the gradient is noisy.

Layout of sequences: pairs (context, successor). Contexts are drawn independently with frequencies f, only successors are
scored: position 2i holds a context, its target is token 2i+1, and odd positions have the target IGNORE. So contexts have exactly
the frequencies above, which no chain over this table has, and sequence models see targets that are the following token.

Shapes: b sequences · t tokens · v vocabulary (rows: contexts) · n pairs.

Pitfall: half of the positions are not scored; a batch of `sequences` rows scores `sequences · pairs` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from torchstone.data.batch import IGNORE
from torchstone.data.keyed import Keys, key, mix, uniform
from torchstone.data.synthetic.task import Rows, Task
from torchstone.errors import DataError
from torchstone.recipe.part import Part


class MixedBigramConfig(Part):
    """Pairs of tokens from a random table whose rows are half certain, half uncertain."""

    family: ClassVar[str] = "data"
    kind: Literal["mixed-bigram"] = "mixed-bigram"
    vocab_size: int = Field(
        default=64, gt=3, description="token ids, an even number; the first half are certain contexts"
    )
    pairs: int = Field(default=32, gt=0, description="pairs of context and successor in a sequence")
    zipf: float = Field(default=1.5, ge=0, description="exponent of the frequencies of certain contexts")
    scale: float = Field(default=1.0, gt=0, description="standard deviation of the logits of uncertain contexts")
    table_seed: int = Field(default=0, ge=0, description="which table; training seeds do not change it")

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.vocab_size % 2:
            raise ValueError(f"vocab_size {self.vocab_size} has no two equal halves; give an even number.")
        return self

    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.vocab_size

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.pairs

    def build(self, cache: Path | None = None) -> MixedBigram:
        """The task; nothing is cached."""
        return MixedBigram(self)


@dataclass(frozen=True)
class Excess:
    """Exact cross-entropy minus entropy in nats per token: of all contexts, of certain and of uncertain ones alone.

    `total` is the mean of the other two, for either half has the mass ½.
    """

    total: float
    certain: float
    uncertain: float


class MixedBigram(Task[MixedBigramConfig]):
    """DataSource of pairs from one table."""

    @cached_property
    def certain_v(self) -> NDArray[np.bool_]:
        """True for contexts with one successor."""
        mask_v: NDArray[np.bool_] = np.arange(self.vocab_size) < self.vocab_size // 2
        return mask_v

    @cached_property
    def frequency_v(self) -> NDArray[np.float64]:
        """How often each token is a context; sums to 1."""
        half = self.vocab_size // 2
        certain = np.arange(1, half + 1, dtype=np.float64) ** -self.settings.zipf
        return np.concatenate([0.5 * certain / certain.sum(), np.full(half, 0.5 / half)])

    @cached_property
    def table_vv(self) -> NDArray[np.float64]:
        """Probabilities: row = context, column = successor."""
        v, half, seed = self.vocab_size, self.vocab_size // 2, self.settings.table_seed
        table_vv = np.zeros((v, v))
        order_v = np.argsort(uniform(key("mixed bigram successors", seed), v)[0], kind="stable")
        table_vv[np.arange(half), order_v[:half]] = 1.0
        draws = uniform(key("mixed bigram logits", seed, np.arange(half)), 2 * v)
        normal = np.sqrt(-2 * np.log1p(-draws[:, :v])) * np.cos(2 * np.pi * draws[:, v:])  # Box and Muller
        weights = np.exp(self.settings.scale * normal)
        table_vv[half:] = weights / weights.sum(axis=1, keepdims=True)
        return table_vv

    @cached_property
    def entropy_v(self) -> NDArray[np.float64]:
        """Entropy of every context's successors in nats; 0 for certain ones."""
        return -np.where(
            self.table_vv > 0, self.table_vv * np.log(np.where(self.table_vv > 0, self.table_vv, 1.0)), 0.0
        ).sum(axis=1)

    @property
    def entropy(self) -> float:
        """Nats per scored token: the least loss that any model can reach on average."""
        return float(self.frequency_v @ self.entropy_v)

    def hessian_block(self, context: int) -> NDArray[np.float64]:
        """f(x) · (diag(q) − q qᵀ), [v, v]: the Hessian of the exact loss in the logits of one context, where they are right.

        Raises:
            DataError: no such context.
        """
        if not 0 <= context < self.vocab_size:
            raise DataError(f"context {context} is not among the tokens 0 … {self.vocab_size - 1}.")
        q_v = self.table_vv[context]
        block: NDArray[np.float64] = self.frequency_v[context] * (np.diag(q_v) - np.outer(q_v, q_v))
        return block

    def draw(self, keys_b: Keys, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`count` independent contexts and their successors for every key, int64 [b, n] each."""
        contexts_bn = _search(np.cumsum(self.frequency_v), uniform(mix(keys_b ^ np.uint64(1)), count))
        draws_bn = uniform(mix(keys_b ^ np.uint64(2)), count)
        found_bn = (
            np.searchsorted(self._cumulative, draws_bn + contexts_bn, side="right") - contexts_bn * self.vocab_size
        )
        return contexts_bn, np.clip(found_bn, 0, self._last_v[contexts_bn])

    @cached_property
    def _cumulative(self) -> NDArray[np.float64]:
        """All rows' cumulative sums in one rising list: row x lies between x and x + 1."""
        sums_vv = np.cumsum(self.table_vv, axis=1)
        rising_vv: NDArray[np.float64] = sums_vv / sums_vv[:, -1:] + np.arange(self.vocab_size)[:, None]
        return rising_vv.ravel()

    @cached_property
    def _last_v(self) -> NDArray[np.int64]:
        """The last successor that a context can have, so that rounding never draws an impossible one."""
        last_v: NDArray[np.int64] = self.vocab_size - 1 - np.argmax(self.table_vv[:, ::-1] > 0, axis=1)
        return last_v

    def rows(self, keys_b: Keys) -> Rows:
        """Sequences of pairs; only successors are targets."""
        contexts_bn, successors_bn = self.draw(keys_b, self.settings.pairs)
        tokens_bt = np.stack([contexts_bn, successors_bn], axis=2).reshape(len(keys_b), -1)
        targets_bt = np.full_like(tokens_bt, IGNORE)
        targets_bt[:, 0::2] = successors_bn
        return tokens_bt, targets_bt

    def excess(self, logits_vv: Tensor) -> Excess:
        """Exact excess of a table of logits or log-probabilities, [..., v, v]: row = context; leading dimensions are averaged."""
        if logits_vv.shape[-2:] != (self.vocab_size, self.vocab_size):
            raise DataError(
                f"a table of {self.vocab_size} tokens is [{self.vocab_size}, {self.vocab_size}]; given {list(logits_vv.shape)}."
            )
        kl_v = self._kl(logits_vv, torch.arange(self.vocab_size, device=logits_vv.device))
        kl_v = kl_v.reshape(-1, self.vocab_size).mean(0).cpu()
        share_v = 2 * torch.from_numpy(self.frequency_v) * kl_v
        half = self.vocab_size // 2
        certain, uncertain = float(share_v[:half].sum()), float(share_v[half:].sum())
        return Excess((certain + uncertain) / 2, certain, uncertain)

    def token_excess(self, tokens_bt: Tensor, logits_btv: Tensor) -> Tensor:
        """KL(q of the token ‖ softmax(logits)) in nats, fp64 [b, t]: exact for every position that holds a context."""
        return self._kl(logits_btv, tokens_bt)

    def _kl(self, logits_xv: Tensor, contexts_x: Tensor) -> Tensor:
        q_xv = torch.from_numpy(self.table_vv).to(logits_xv.device)[contexts_x]
        log_p_xv = logits_xv.double().log_softmax(-1)
        return (torch.special.xlogy(q_xv, q_xv) - torch.where(q_xv > 0, q_xv * log_p_xv, 0.0)).sum(-1)


def _search(sums_v: NDArray[np.float64], draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """The entry that each number in [0, 1) falls into."""
    found: NDArray[np.int64] = np.searchsorted(sums_v / sums_v[-1], draws, side="right")
    return np.minimum(found, len(sums_v) - 1)
