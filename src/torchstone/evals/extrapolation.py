"""Length extrapolation: the loss on the *same* last tokens with more and more context.

    loss(L) = mean of −log p(x_t | x_{n−L} … x_{t−1}) over the last `last` targets of each window

A perplexity that is averaged over whole windows falls with their length even if the model uses no more context: in a
longer window a smaller share of the tokens stands near the beginning, where there is little to go by. Here every length
predicts the same tokens, so a difference between two lengths is due to the added context, and losses pair by window.

Two things can raise the loss at long range: positions that training never saw, and text that distracts. The control tells
them apart: `foreign` replaces everything before the last `trained` tokens by another window's tokens. A model that really
uses far context has a lower loss on its own text than on foreign text; one that only survives the length does not.

Shapes: n windows · l lengths · t tokens.

Pitfall: windows come from single documents, so that more context is never another document's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.stats.bootstrap import clustered_estimate
from torchstone.stats.estimate import Estimate

LAST = 32
TOKENS_AT_ONCE = 8192
Losses = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Extrapolation:
    """Losses of the same tokens at several context lengths.

    Attributes:
        lengths: context lengths in tokens, ascending.
        losses_ln: fp64, mean loss of the last targets of each window, nats per token.
    """

    lengths: tuple[int, ...]
    losses_ln: NDArray[np.float64]

    @property
    def means(self) -> dict[int, float]:
        """Mean loss at each length."""
        return dict(zip(self.lengths, self.losses_ln.mean(axis=1).tolist(), strict=True))

    def estimate(self, length: int, seed: int = 0) -> Estimate:
        """Loss at one length, bootstrapped over windows."""
        return _over_windows(self.losses_ln[self._row(length)], seed)

    def rise(self, length: int, seed: int = 0) -> Estimate:
        """Loss at `length` minus the loss at the shortest, paired by window."""
        return _over_windows(self.losses_ln[self._row(length)] - self.losses_ln[0], seed)

    @property
    def slopes_n(self) -> NDArray[np.float64]:
        """Least-squares slope of every window's loss against log2 of the length, nats per doubling."""
        if len(self.lengths) < 2:
            raise ConfigError("a slope needs at least two lengths; give more lengths.")
        x_l = np.log2(self.lengths)
        weight_l = (x_l - x_l.mean()) / ((x_l - x_l.mean()) ** 2).sum()
        return weight_l @ self.losses_ln

    def slope(self, seed: int = 0) -> Estimate:
        """Mean slope, bootstrapped over windows; below 0 where more context helps."""
        return _over_windows(self.slopes_n, seed)

    def items(self, length: int) -> dict[str, float]:
        """Window → loss at one length, for paired comparisons between models."""
        return {f"window {n}": value for n, value in enumerate(self.losses_ln[self._row(length)].tolist())}

    def _row(self, length: int) -> int:
        return self.lengths.index(length)


def _over_windows(values_n: NDArray[np.float64], seed: int) -> Estimate:
    return clustered_estimate(values_n, None, np.random.default_rng(seed))


@torch.no_grad()
def extrapolation(
    model: Subject | Losses, windows_nt: Tensor, lengths: Sequence[int], *, last: int = LAST, trained: int | None = None
) -> Extrapolation:
    """Losses of the last `last` tokens of each window, given the `length` tokens before the very last one.

    Args:
        model: a subject, or a function of (tokens [b, t], last) that gives the last losses [b, last].
        windows_nt: int64 [n, max(lengths) + 1], from `held_out_windows` or `diagnose.texts.token_rows`.
        lengths: context lengths, each longer than `last`.
        last: targets per window.
        trained: when given, the control: tokens further back than this come from the next window.

    Raises:
        ConfigError: lengths that are too short, too long for the windows, or too long for the model.
    """
    wanted = tuple(sorted(set(lengths)))
    count, width = windows_nt.shape
    if not wanted or wanted[0] < last or wanted[-1] + 1 > width:
        raise ConfigError(
            f"lengths {list(lengths)} do not fit: each must be at least the {last} scored tokens and at most {width - 1}, "
            "the length of the windows less one target."
        )
    if trained is not None and count < 2:
        raise ConfigError("foreign context needs at least two windows; give more text.")
    losses = model.losses if isinstance(model, Subject) else model
    rows = []
    for length in wanted:
        tokens_nt = windows_nt[:, width - length - 1 :]
        if trained is not None and length > trained:
            kept = trained + 1
            tokens_nt = torch.cat([tokens_nt.roll(1, dims=0)[:, : length + 1 - kept], tokens_nt[:, -kept:]], dim=1)
        at_once = max(1, TOKENS_AT_ONCE // length)
        parts = [_losses(losses, part_bt, last) for part_bt in tokens_nt.split(at_once)]
        rows.append(torch.cat(parts).double().mean(dim=1).cpu().numpy())
    return Extrapolation(wanted, np.stack(rows))


def _losses(losses: Losses, tokens_bt: Tensor, last: int) -> Tensor:
    try:
        return losses(tokens_bt, last)
    except IndexError as error:
        raise ConfigError(
            f"the model cannot read {tokens_bt.shape[1] - 1} tokens: it has a learned table of positions, or another fixed "
            "limit. Give lengths within its longest context."
        ) from error


def held_out_windows(data: Any, length: int, count: int) -> Tensor:
    """Windows [count, length + 1] of held-out text, each inside one document, evenly spread.

    Args:
        data: the `data` part of a recipe, of kind `text`; its own sequence length does not matter.
        length: tokens of context.
        count: windows.

    Raises:
        ConfigError: the data is not text.
        DataError: the held-out text has fewer such windows.
    """
    if getattr(data, "kind", None) != "text":
        raise ConfigError(
            f"length extrapolation needs text whose windows can be made longer; this recipe's data is {data.kind!r}."
        )
    source: Any = data.model_copy(update={"length": length, "mask_documents": False}).build(None)
    end, found = source.tokenizer.end_of_document, []
    for batch in source.evaluation(64, source.held_out):
        window_bt = torch.cat([batch.tokens_bt, batch.targets_bt[:, -1:]], dim=1)
        found.append(window_bt[~(window_bt == end).any(dim=1)])
    windows_nt = torch.cat(found)
    if windows_nt.shape[0] < count:
        raise DataError(
            f"the held-out text has {windows_nt.shape[0]} windows of {length} tokens inside one document, and {count} are "
            "asked for; ask for fewer or shorter windows, or hold out more text (data.validation_fraction)."
        )
    return windows_nt[torch.arange(count) * windows_nt.shape[0] // count]
