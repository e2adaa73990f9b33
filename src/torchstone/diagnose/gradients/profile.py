"""Gradient profile: statistics of every weight gradient, for every example, before any update.

For each example on its own (evaluation mode, no update; Li, Li and Zhou, arXiv 2410.23743):

    loss = mean over scored tokens t of −log p(x_t | x_<t),     G = ∂loss/∂W for every wanted matrix W [out, in]

and of each G its nuclear norm Σσ (the paper's statistic), largest σ, Frobenius norm, effective rank and more. Examples share
one batched backward pass: each example's loss is scaled by its own number of tokens, and the gradient is split by example
(`capture`) and reduced in factored form (`spectra`); neither a batch's nor an example's weight gradient is
stored.

    subject = open_subject("path/to/model")
    profile = gradient_profile(subject, [Pair("2+2=", "4"), …])
    profile.curve()          layers × matrices, mean over examples
    profile.mad()            how uneven the curves are, per matrix
    profile.compare(other)   relative difference per layer, with intervals

Shapes: n examples · l layers · m matrices per layer · b examples of a batch · t tokens · v vocabulary.

`normalize`: None; "loss" divides by the example's loss, to which gradients are roughly proportional; "tokens" multiplies by
the square root of the number of scored tokens, which undoes what averaging over as many unrelated token gradients does to a
Frobenius norm. Nuclear norms shrink less than that, so that the better control for length is to score as few tokens of the
longer response (`pairs.matched`). Ratio and effective rank have no scale and stay.

Pitfalls: batches are padded on the right, which a causal model cannot see. Logits exist at scored tokens only, and a batch with
too many of them is parted (`scored`). In bf16 weights the forward pass has three digits, however fine the spectra; use fp32
for published numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from torchstone.diagnose.gradients.capture import ATTENTION, Capture, Matrix, select_matrices
from torchstone.diagnose.gradients.comparison import Comparison, compare_curves, mean_curve, thirds, variation
from torchstone.diagnose.gradients.pairs import Boundary, Example, Pair, tokenise
from torchstone.diagnose.gradients.scored import Scored, batches, scored_logits
from torchstone.diagnose.gradients.spectra import SCALE_FREE, STATS, Factors
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.report.result import Figure, Line, Table

Normalize = Literal["loss", "tokens"]
DEFAULT_STATS = ("nuclear", "sigma1", "effective_rank", "frobenius")
LISTED = 8  # ids named in a message
LENGTH = 1024  # tokens after which examples are cut, where the model was trained on as many


@dataclass(frozen=True, eq=False)
class Profile:
    """Statistics of gradients: examples × layers × matrices.

    Attributes:
        ids: of the examples, in the given order.
        layers: numbers of the blocks.
        matrices: `q`, `k`, `v`, `o`, or paths inside a block.
        values: statistic → fp64 [n, l, m]; NaN where a layer lacks the matrix or a number is not finite.
        losses_n: mean loss over each example's scored tokens, nats.
        targets_n: int64, scored tokens.
        skipped: ids of examples without a scored token (cut off by the length limit, or empty).
        not_finite: "example, matrix" of gradients with infinite or undefined entries.
        normalize: what the statistics with a scale were divided or multiplied by.
    """

    ids: tuple[str, ...]
    layers: tuple[int, ...]
    matrices: tuple[str, ...]
    values: Mapping[str, Tensor]
    losses_n: Tensor
    targets_n: Tensor
    skipped: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()
    normalize: Normalize | None = None

    def normalised(self, normalize: Normalize | None) -> Profile:
        """These numbers with another normalisation, without measuring again.

        Raises:
            ConfigError: numbers divided by the loss are to be had without, which a loss of 0 has made impossible.
        """
        if normalize == self.normalize:
            return self
        if self.normalize == "loss":
            raise ConfigError("this profile is divided by the loss already; take the profile without normalisation.")
        scale_n11 = (_scales(self, normalize) / _scales(self, self.normalize))[:, None, None]
        values = {name: x if name in SCALE_FREE else x * scale_n11 for name, x in self.values.items()}
        return replace(self, values=values, normalize=normalize)

    def statistic(self, name: str = "nuclear") -> Tensor:
        """One statistic, fp64 [n, l, m]; raises ConfigError where the profile does not have it."""
        if name not in self.values:
            raise ConfigError(f"this profile has no {name!r}; it has {', '.join(self.values)}: ask for it with stats=.")
        return self.values[name]

    def curve(self, name: str = "nuclear") -> Tensor:
        """Mean over examples, fp64 [l, m]; an example with a number that is not finite is left out of that matrix's mean."""
        return mean_curve(self.statistic(name))

    def mad(self, name: str = "nuclear") -> dict[str, float]:
        """Mean absolute difference of neighbouring layers on the mean curve, by matrix."""
        return {matrix: variation(c) for matrix, c in zip(self.matrices, self.curve(name).T, strict=True)}

    def mad_thirds(self, name: str = "nuclear") -> dict[str, tuple[float, float, float]]:
        """The same over the early, middle and late third of the neighbouring pairs; NaN for a third without pairs."""
        return {matrix: thirds(c) for matrix, c in zip(self.matrices, self.curve(name).T, strict=True)}

    def compare(self, other: Profile, name: str = "nuclear", *, seed: int = 0) -> Comparison:
        """This profile's curve as the reference, the other's against it; examples are paired where ids agree.

        Raises:
            ConfigError: the profiles have different layers, matrices or normalisation.
        """
        mine, theirs = (self.layers, self.matrices, self.normalize), (other.layers, other.matrices, other.normalize)
        if mine != theirs:
            raise ConfigError(
                f"profiles to compare must have the same layers, matrices and normalisation; these have {mine} and {theirs}."
            )
        paired = self.ids == other.ids
        return compare_curves(
            self.statistic(name), other.statistic(name), self.layers, self.matrices, paired=paired, seed=seed
        )

    def overall(self, name: str = "nuclear") -> Tensor:
        """One number per example, fp64 [n]: mean over layers, then the geometric mean over matrices, so that matrices with
        large gradients do not drown the others. 0 if one matrix's gradients are all 0; NaN where one is not finite."""
        return _absent_ignored(self.statistic(name)).log().mean(-1).exp()

    def plot(self, name: str = "nuclear") -> Figure:
        """The mean curve of every matrix against the layer, for a report."""
        x, curve = tuple(map(float, self.layers)), self.curve(name)
        lines = [
            Line(name=matrix, x=x, y=tuple(None if v != v else v for v in values.tolist()))
            for matrix, values in zip(self.matrices, curve.T, strict=True)
        ]
        return Figure(title=f"{name} of gradients by layer", x_label="layer", y_label=name, lines=tuple(lines))

    def ranking(self, name: str = "nuclear", count: int = 20) -> Table:
        """Examples with the largest gradients first: wrong or foreign responses gather at the top, known ones at the end."""
        size_n, rank_n = self.overall(name), self.values.get("effective_rank")
        order = size_n.nan_to_num(-1.0).argsort(descending=True).tolist()
        kept = order if len(order) <= count else [*order[: count // 2], *order[-(count - count // 2) :]]
        ranks = _absent_ignored(rank_n).mean(-1).tolist() if rank_n is not None else [None] * len(order)
        rows = tuple(
            (order.index(i) + 1, self.ids[i], _shown(float(size_n[i])), _shown(ranks[i]), _shown(float(self.losses_n[i])),
             int(self.targets_n[i]))
            for i in kept
        )  # fmt: skip
        note = f"{count // 2} largest and {count - count // 2} smallest of {len(order)}" if len(order) > count else ""
        columns = ("place", "example", name, "effective rank", "loss", "scored tokens")
        return Table(title=f"Examples by {name} of their gradients", columns=columns, rows=rows, note=note)


def _scales(profile: Profile, normalize: Normalize | None) -> Tensor:
    """By what a normalisation multiplies every example's numbers, fp64 [n]."""
    if normalize == "loss":
        return torch.where(profile.losses_n == 0, 0.0, 1 / profile.losses_n)  # no loss, no gradient
    return profile.targets_n.double().sqrt() if normalize == "tokens" else torch.ones_like(profile.losses_n)


def _shown(value: float | None) -> float | None:
    return None if value is None or value != value else float(f"{value:.4g}")


def _absent_ignored(values_nlm: Tensor) -> Tensor:
    """Mean over the layers that have the matrix, [n, m]; matrices that no layer has are left out."""
    present_lm = (~values_nlm.isnan()).any(0)
    columns = [values_nlm[:, present_lm[:, m], m].mean(1) for m in range(values_nlm.shape[2]) if present_lm[:, m].any()]
    return torch.stack(columns, dim=1) if columns else values_nlm.new_full((len(values_nlm), 1), torch.nan)


def gradient_profile(
    subject: Subject,
    pairs: Sequence[Pair | Example],
    *,
    modules: str = "attention",
    stats: Sequence[str] = DEFAULT_STATS,
    normalize: Normalize | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    boundary: Boundary = "joint",
) -> Profile:
    """Statistics of the gradients of every example.

    Args:
        subject: the model; fp32 weights for numbers as published.
        pairs: texts, or tokenised examples.
        modules: see `select_matrices`.
        stats: of nuclear, sigma1, sigma_min, ratio, frobenius, effective_rank, mean, max, min; the last three read every entry
            and need the products themselves.
        normalize: None, `loss` or `tokens`, see the module's docstring.
        batch_size: examples in one pass, at most; results do not depend on it beyond rounding.
        max_length: longer examples are cut; the model's own limit holds too. None: see `length_limit`.
        boundary: see `pairs`.

    Raises:
        ConfigError: an unknown statistic or normalisation, a pattern that matches nothing, a layer without examples.
        DataError: no example has a scored token.
    """
    _check(stats, normalize, batch_size, max_length)
    examples, skipped = _prepared(subject, pairs, length_limit(subject, max_length), boundary)
    matrices = select_matrices(subject, modules)
    table = _Collector(len(examples), matrices, tuple(stats))
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    for batch in batches(order, examples, batch_size, subject.vocab_size):
        table.measure(subject, batch, examples)
    targets_n = torch.tensor([len(example.scored) for example in examples])
    ids = tuple(example.id for example in examples)
    raw = Profile(
        ids, table.layers, table.names, table.arranged(), table.losses_n, targets_n, skipped, table.not_finite(ids)
    )
    return raw.normalised(normalize)


def length_limit(subject: Subject, max_length: int | None) -> int:
    """Tokens after which an example is cut.

    None: `LENGTH`, or what training showed the model at once if that is less, and one more token, which is only predicted. The
    model's own limit holds whatever is asked for.
    """
    trained = subject.trained_length
    wanted = max_length if max_length is not None else LENGTH if trained is None else min(LENGTH, trained + 1)
    return wanted if subject.max_length is None else min(wanted, subject.max_length)


def _check(stats: Sequence[str], normalize: str | None, batch_size: int, max_length: int | None) -> None:
    unknown = [name for name in stats if name not in STATS]
    if unknown or not stats:
        raise ConfigError(f"stats={list(stats)!r}: give at least one of {', '.join(STATS)}.")
    if normalize not in (None, "loss", "tokens"):
        raise ConfigError(f"normalize={normalize!r} is unknown; give None, 'loss' or 'tokens'.")
    if batch_size < 1 or (max_length is not None and max_length < 2):
        raise ConfigError(f"batch_size is at least 1 and max_length at least 2; given {batch_size} and {max_length}.")


def _prepared(
    subject: Subject, pairs: Sequence[Pair | Example], limit: int, boundary: Boundary
) -> tuple[list[Example], tuple[str, ...]]:
    """Tokenised, cut and numbered examples, and the ids of those without a scored token."""
    kept, skipped = [], []
    for number, pair in enumerate(pairs):
        example = tokenise(subject, pair, boundary) if isinstance(pair, Pair) else pair
        example = example.truncated(limit)
        name = example.id or str(number)
        if example.scored:
            kept.append(Example(example.tokens, example.scored, example.start, name, example.condition))
        else:
            skipped.append(name)
    if not kept:
        listed = ", ".join(skipped[:LISTED]) + (", …" if len(skipped) > LISTED else "")
        raise DataError(
            f"none of the {len(skipped)} examples has a response token within {limit} tokens"
            f"{f' (skipped: {listed})' if skipped else ''}; raise max_length, shorten the prompts, or give responses."
        )
    return kept, tuple(skipped)


class _Collector:
    """Fills the table of statistics batch by batch."""

    def __init__(self, count: int, matrices: Sequence[Matrix], stats: tuple[str, ...]) -> None:
        self.matrices, self.stats = matrices, stats
        self.losses_n = torch.zeros(count, dtype=torch.float64)
        self.raw = torch.full((len(stats), count, len(matrices)), torch.nan, dtype=torch.float64)
        self.layers = tuple(sorted({matrix.layer for matrix in matrices}))
        self.names = _ordered([matrix.name for matrix in matrices])

    def measure(self, subject: Subject, indices: Sequence[int], examples: Sequence[Example]) -> None:
        """One forward and backward pass over some of the examples."""
        chosen, device = [examples[i] for i in indices], subject.device
        length = max(len(example.tokens) for example in chosen) - 1  # nothing is predicted from the last token
        tokens_bt = torch.zeros(len(chosen), length, dtype=torch.long)
        for row, example in enumerate(chosen):
            kept = torch.tensor(example.tokens[:length])
            tokens_bt[row, : len(kept)] = kept

        def sink(matrix: int, factors: Factors) -> None:
            for s, values_b in enumerate(factors.statistics(self.stats).values()):
                self.raw[s, indices, matrix] = values_b.double().cpu()

        with torch.enable_grad(), Capture(subject, self.matrices, (len(chosen), length), sink) as capture:
            scored = Scored.of(chosen, device)
            losses_b = scored.losses(scored_logits(subject, tokens_bt.to(device), scored))
            capture.backward(losses_b.sum())
        self.losses_n[indices] = losses_b.detach().double().cpu()

    def arranged(self) -> dict[str, Tensor]:
        """Statistic → [n, l, m]."""
        values = torch.full((*self.raw.shape[:2], len(self.layers), len(self.names)), torch.nan, dtype=torch.float64)
        for i, matrix in enumerate(self.matrices):
            values[:, :, self.layers.index(matrix.layer), self.names.index(matrix.name)] = self.raw[:, :, i]
        return dict(zip(self.stats, values, strict=True))

    def not_finite(self, ids: Sequence[str]) -> tuple[str, ...]:
        """Which example and matrix has a gradient that is not finite."""
        places = self.raw[0].isnan().nonzero().tolist()
        return tuple(f"example {ids[n]}, {self.matrices[i].path}" for n, i in places)


def mean_losses(logits_btv: Tensor, examples: Sequence[Example]) -> Tensor:
    """Mean loss over every example's scored tokens, fp32 [b], differentiable; logits are of the tokens before."""
    scored = Scored.of(examples, logits_btv.device)
    return scored.losses(logits_btv[scored.rows_n, scored.places_n])


def _ordered(names: Sequence[str]) -> tuple[str, ...]:
    """Different names, attention's first."""
    unique = list(dict.fromkeys(names))
    return tuple([name for name in ATTENTION if name in unique] + [name for name in unique if name not in ATTENTION])
