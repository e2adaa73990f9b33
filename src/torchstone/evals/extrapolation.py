"""Length extrapolation: the loss on the *same* last tokens with more and more context.

    loss(L) = mean of −log p(x_t | x_{n−L} … x_{t−1}) over the last `last` targets of each window

A perplexity that is averaged over whole windows falls with their length even if the model uses no more context: in a
longer window a smaller share of the tokens stands near the beginning, where there is little to go by. Here every length
predicts the same tokens, so a difference between two lengths is due to the added context, and losses pair by window.

Two things can raise the loss at long range: positions that training never saw, and text that distracts. The control tells
them apart: with `near`, everything before the last `near` tokens is replaced by tokens of another *document*. A model that really
uses far context has a lower loss on its own text than on foreign text; one that only survives the length does not.

Shapes: n windows · l lengths · t tokens.

Pitfall: windows come from single documents, so that more context is never another document's; `Windows` says which document
each comes from, because the control needs strangers: the stretch before a window in the same book is no foreign text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
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
class Windows:
    """Stretches of text that end in the tokens to be predicted.

    Attributes:
        tokens_nt: int64 [n, context + 1].
        documents_n: int64, which document each window is from.
    """

    tokens_nt: Tensor
    documents_n: Tensor

    def strangers(self) -> Tensor:
        """int64 [n]: for each window another one from another document, the next in order.

        Raises:
            DataError: all windows are from one document.
        """
        count = len(self.documents_n)
        found = []
        for n, document in enumerate(self.documents_n.tolist()):
            later = ((n + step) % count for step in range(1, count))
            other = next((m for m in later if int(self.documents_n[m]) != document), None)
            if other is None:
                raise DataError(
                    "foreign context needs windows of at least two documents; give more texts, or shorter lengths."
                )
            found.append(other)
        return torch.tensor(found)


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

    def rise(self, length: int, start: int | None = None, seed: int = 0) -> Estimate:
        """Loss at `length` minus the loss at `start` (None: the shortest), paired by window."""
        before = 0 if start is None else self._row(start)
        return _over_windows(self.losses_ln[self._row(length)] - self.losses_ln[before], seed)

    def above(self, other: Extrapolation, length: int, seed: int = 0) -> Estimate:
        """Loss minus another's (of the same windows) at one length, paired by window."""
        return _over_windows(self.losses_ln[self._row(length)] - other.losses_ln[other._row(length)], seed)

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
    model: Subject | Losses, windows: Windows, lengths: Sequence[int], *, last: int = LAST, near: int | None = None
) -> Extrapolation:
    """Losses of the last `last` tokens of each window, given the `length` tokens before the very last one.

    Args:
        model: a subject, or a function of (tokens [b, t], last) that gives the last losses [b, last].
        windows: from `held_out_windows` or `text_windows`, at least max(lengths) + 1 tokens long.
        lengths: context lengths, each at least `last`.
        last: targets per window.
        near: when given, the control: tokens further back than this come from another document's window.

    Raises:
        ConfigError: lengths that are too short, too long for the windows, or too long for the model.
        DataError: the control with windows of a single document.
    """
    wanted, tokens_nt = tuple(sorted(set(lengths))), windows.tokens_nt
    if isinstance(model, Subject):
        tokens_nt = tokens_nt.to(model.device)
    width = tokens_nt.shape[1]
    if not wanted or last < 1 or wanted[0] < last or wanted[-1] + 1 > width:
        raise ConfigError(
            f"lengths {list(lengths)} do not fit: each must be at least the {last} scored tokens (at least 1) and at most "
            f"{width - 1}, the length of the windows less one target."
        )
    losses = model.losses if isinstance(model, Subject) else model
    first = model.first_tokens() if isinstance(model, Subject) else []
    strange_nt = tokens_nt[windows.strangers().to(tokens_nt.device)] if near is not None else tokens_nt
    rows = []
    for length in wanted:
        seen_nt = tokens_nt[:, width - length - 1 :]
        if near is not None and length > near:
            kept = near + 1
            seen_nt = torch.cat([strange_nt[:, width - length - 1 : width - kept], seen_nt[:, -kept:]], dim=1)
        if first:  # what the tokenizer puts before a text takes the place of the earliest context
            seen_nt = torch.cat([tokens_nt.new_tensor(first).expand(len(seen_nt), -1), seen_nt[:, len(first) :]], dim=1)
        parts = [_losses(losses, part_bt, last) for part_bt in seen_nt.split(max(1, TOKENS_AT_ONCE // length))]
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


def text_windows(subject: Subject, texts: Sequence[str], length: int, count: int) -> Windows:
    """Windows of `length` tokens of context, each inside one text, from as many texts as there are.

    Raises:
        DataError: no text is long enough, or there are fewer windows than wanted.
    """
    found: list[list[Tensor]] = []
    longest = 0
    for text in texts:
        tokens_t = torch.tensor(subject.encode(text), dtype=torch.long)
        longest = max(longest, len(tokens_t))
        stretches = [tokens_t[start : start + length + 1] for start in range(0, len(tokens_t) - length, length + 1)]
        found.append(stretches)
        if sum(map(bool, found)) >= count:
            break
    ordered = [(stretch, n) for row in zip_longest(*found) for n, stretch in enumerate(row) if stretch is not None]
    if len(ordered) < count:
        raise DataError(
            f"text too short: {count} windows of {length + 1} tokens are asked for, and the {len(found)} texts have "
            f"{len(ordered)} (the longest text has {longest} tokens); give more text, fewer windows (count) or shorter lengths."
        )
    chosen = ordered[:count]
    tokens_nt = torch.stack([stretch for stretch, _ in chosen])
    return Windows(tokens_nt, torch.tensor([n for _, n in chosen]))


def held_out_windows(data: Any, length: int, count: int) -> Windows:
    """Windows of held-out text of a recipe, each inside one document, evenly spread.

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
    end, found, documents, before = source.tokenizer.end_of_document, [], [], 0
    for batch in source.evaluation(64, source.held_out):
        window_bt = torch.cat([batch.tokens_bt, batch.targets_bt[:, -1:]], dim=1)
        ends_b = (batch.tokens_bt == end).sum(dim=1)
        document_b = before + ends_b.cumsum(0) - ends_b
        whole_b = ~(window_bt == end).any(dim=1)
        found.append(window_bt[whole_b])
        documents.append(document_b[whole_b])
        before += int(ends_b.sum())
    tokens_nt, documents_n = torch.cat(found), torch.cat(documents)
    if tokens_nt.shape[0] < count:
        raise DataError(
            f"the held-out text has {tokens_nt.shape[0]} windows of {length} tokens inside one document, and {count} are "
            "asked for; ask for fewer or shorter windows, or hold out more text (data.validation_fraction)."
        )
    chosen_n = torch.arange(count) * tokens_nt.shape[0] // count
    return Windows(tokens_nt[chosen_n], documents_n[chosen_n])
