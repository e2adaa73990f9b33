"""Choosing the next token from logits: temperature, top-k, top-p, and one random stream per row.

Shapes: b rows · v vocabulary.

Order: temperature, then top-k, then top-p on what is left. Every row draws one uniform number per token from a
generator of its own and inverts the cumulative distribution, so what a prompt receives does not depend on which other
prompts share the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: logits are divided by it; > 0.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach p; None keeps all.
        greedy: take the most likely token and ignore chance.

    Raises:
        ConfigError: a value outside its range, or chance settings together with greedy.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.temperature < float("inf")):
            raise ConfigError(
                f"temperature is {self.temperature}; it must be above 0 and finite (for the most likely token, greedy=True)."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be 1 or more, or None for all tokens.")
        if self.top_p is not None and not (0 < self.top_p <= 1):
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1, or None for all tokens.")
        if self.greedy and (self.temperature != 1.0 or self.top_k is not None or self.top_p is not None):
            raise ConfigError(
                "greedy=True takes the most likely token; remove temperature, top_k and top_p, or greedy."
            )

    def probabilities(self, logits_bv: Tensor) -> Tensor:
        """fp64 distribution that tokens are drawn from, [b, v]."""
        logits_bv = logits_bv.double() / self.temperature
        if self.top_k is not None and self.top_k < logits_bv.shape[-1]:
            weakest_b1 = logits_bv.topk(self.top_k).values[:, -1:]
            logits_bv = logits_bv.masked_fill(logits_bv < weakest_b1, -torch.inf)
        probabilities_bv = logits_bv.softmax(dim=-1)
        if self.top_p is None or self.top_p == 1:
            return probabilities_bv
        ordered_bv, order_bv = probabilities_bv.sort(dim=-1, descending=True, stable=True)
        before_bv = ordered_bv.cumsum(dim=-1) - ordered_bv
        ordered_bv = ordered_bv.masked_fill(before_bv >= self.top_p, 0.0)
        kept_bv = torch.zeros_like(ordered_bv).scatter(-1, order_bv, ordered_bv)
        return kept_bv / kept_bv.sum(dim=-1, keepdim=True)

    def choose(self, logits_bv: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One token id per row, [b] on the CPU."""
        if self.greedy:
            return logits_bv.argmax(dim=-1).cpu()
        cumulative_bv = self.probabilities(logits_bv.cpu()).cumsum(dim=-1)
        draw_b1 = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
        draw_b1 = draw_b1 * cumulative_bv[:, -1:]
        token_b1 = torch.searchsorted(cumulative_bv, draw_b1, right=True)
        return token_b1.squeeze(-1).clamp_max(logits_bv.shape[-1] - 1)


def choose_each(logits_bv: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """One token id per row, [b] on the CPU, each row with its own sampling and generator."""
    token_b = torch.empty(len(samplings), dtype=torch.long)
    for sampling in dict.fromkeys(samplings):
        rows = [row for row, own in enumerate(samplings) if own == sampling]
        chosen_bv = logits_bv if len(rows) == len(samplings) else logits_bv[rows]
        token_b[rows] = sampling.choose(chosen_bv, [generators[row] for row in rows])
    return token_b
