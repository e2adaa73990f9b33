"""Layer gradients of responses of different kinds, next to what length, loss and an untrained model explain of them.

Li, Li and Zhou (arXiv 2410.23743) plot the nuclear norm of ∂loss/∂W over the layers for bare answers and for reasoning, and
for responses that belong to another prompt. Two kinds of responses rarely differ in one way only, so that every comparison
stands beside its controls:

    matched     the loss over a random subset of the longer response's tokens, as many as the shorter one has; a mean over
                more tokens has a smaller gradient whatever they say
    per loss    norms divided by the loss; a token that is well predicted has a small gradient whatever it says
    irrelevant  every prompt with the next different response of its condition
    untrained   the same architecture with fresh weights, which knows nothing of responses; matched alike

    torchstone diagnose layer-gradients MODEL --pairs pairs.jsonl --conditions style

One line of the pairs file: {"id": "7", "prompt": "…", "response": "…", "style": "reasoned"}. Conditions that answer the same
prompts should share ids: they are then compared example by example. The first condition of the file is the reference.
Where there are texts and no pairs, the first half of each text's beginning is the prompt and the second the response.

Pitfall: special tokens are not added. Write them into the prompt, as the model's chat template does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from torchstone.data.stdlib import StdlibConfig
from torchstone.diagnose.gradients.capture import select_matrices
from torchstone.diagnose.gradients.pairs import (
    CONDITIONS,
    Boundary,
    Example,
    Pair,
    halved,
    matched,
    read_pairs,
    rotated,
    tokenise,
)
from torchstone.diagnose.gradients.profile import Normalize, Profile, gradient_profile, length_limit
from torchstone.diagnose.gradients.ratio import Contrast, Foreign, Ratio, ratio_of
from torchstone.diagnose.gradients.tables import Condition, conditions_table, curves, differences_table, ratios_table
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.report.finding import Finding
from torchstone.report.result import PaperFigure, Table

UNLIKE = 0.1  # mean lengths further apart than this share are matched
LISTED = 8
ANSWERED = 3  # irrelevant responses of that many conditions are in the answer
PAPER = "Qwen2-1.5B on AQuA, Q, K, V, O; from a secondary summary of the paper"


def layer_gradients_finding(
    subject: Subject,
    texts: Sequence[str] = (),
    *,
    pairs: str | Path | Sequence[Pair] | None = None,
    conditions: str = CONDITIONS,
    modules: str = "attention",
    normalize: Normalize | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    boundary: Boundary = "joint",
    seed: int = 0,
) -> Finding:
    """Gradients by condition, with the controls of the module's docstring.

    Args:
        subject: the model.
        texts: used where there are no pairs: the first half of each text's first 200 words is the prompt, the second half the
            response; at most 64 texts.
        pairs: a JSONL file with `prompt` and `response`, or `text` and `response`, a line; or pairs in Python. Not together with
            texts.
        conditions: the file's column that names a row's condition; the first condition is the reference.
        modules: `attention` (q, k, v, o), `all` (every linear layer of the blocks), or a regular expression for their paths.
        normalize: `loss` divides norms by the example's loss, `tokens` multiplies them by √(scored tokens); default: neither.
        batch_size: examples in one forward and backward pass, at most; fewer where their logits would need too much memory.
        max_length: tokens after which an example is cut; the model's own limit holds too. Default: 1024, or what the model saw
            at once in training if that is less.
        boundary: how the response's first token is found: in the tokens of the whole text (`joint`), by tokenising prompt and
            response `apart`, or by the prompt's own number of tokens (`official`, as the authors).
        seed: of the random tokens in matching, of resampling, and of the untrained model.

    Raises:
        DataError: no pairs and no texts, a damaged file, or no response token within `max_length`.
        ConfigError: a column `conditions` that no row has, texts beside pairs; see also `gradient_profile`.
    """
    rows = _rows(texts, pairs, conditions)
    select_matrices(subject, modules)  # a pattern that matches nothing fails before anything is measured
    measure = _Measure(subject, modules, normalize, batch_size, max_length, boundary, seed)
    found = [
        measure.condition(name, [pair for pair in rows if pair.condition == name])
        for name in dict.fromkeys(pair.condition for pair in rows)
    ]
    contrasts = [measure.contrast(found[0], other) for other in found[1:]]
    foreign = {c.name: ratios for c in found if (ratios := measure.foreign(c)) is not None}
    return Finding(
        analysis="layer-gradients",
        title="Gradients of responses, layer by layer",
        question="Which responses pull hardest at which layers, and how much of that is length and loss?",
        subject=subject.describe(),
        answer=" ".join(_statements(found, contrasts, foreign)),
        control=(
            "Matched: the loss over as many random tokens of the longer response as the shorter one has. Divided by the loss: "
            "well predicted tokens have small gradients whatever they say. Irrelevant: the next different response. Untrained: "
            "the same architecture with fresh weights, on the same tokens, which cannot know a response's kind."
        ),
        tables=_tables(found, contrasts, foreign, seed),
        figures=curves(found),
        paper=_paper(found),
        notes=tuple(_notes(subject, found, contrasts, normalize, measure.max_length)),
    )


def _tables(
    found: Sequence[Condition], contrasts: Sequence[Contrast], foreign: dict[str, Foreign], seed: int
) -> tuple[Table, ...]:
    rows = [row for contrast in contrasts for row in contrast.rows(found[0].name)]
    rows += [row for name, ratios in foreign.items() for row in ratios.rows(name)]
    tables = [conditions_table(found), ratios_table(rows)]
    for other in found[1:]:
        comparison = found[0].own.compare(other.own, seed=seed)
        tables += [differences_table(comparison, found[0].name, other.name)]
        tables += [comparison.table(f"Layer by layer: {other.name} against {found[0].name}")]
    tables += [c.own.ranking().model_copy(update={"title": f"Examples by gradient: {c.name}"}) for c in found]
    return tuple(tables)


def _rows(texts: Sequence[str], pairs: str | Path | Sequence[Pair] | None, conditions: str) -> list[Pair]:
    """Pairs from what was given, every one with a condition's name."""
    if pairs is not None and _named(texts):
        raise ConfigError(
            f"{len(texts)} texts and pairs were given; the texts would not be read. Give the pairs, or texts without them."
        )
    if conditions != CONDITIONS and not isinstance(pairs, (str, Path)):
        raise ConfigError(
            f"conditions={conditions!r} names a column of a file of pairs, and there is no file; give one, or leave it out."
        )
    if isinstance(pairs, (str, Path)):
        rows = read_pairs(pairs, conditions)
    elif pairs:
        rows = list(pairs)
    elif texts:
        rows = halved(texts)
    else:
        raise DataError(
            "layer-gradients needs pairs (a JSONL file with prompt and response), or texts to part in halves."
        )
    if any(pair.condition for pair in rows) and not all(pair.condition for pair in rows):
        raise DataError(f"some pairs have no condition in the column {conditions!r}; give every row one, or none.")
    return [Pair(p.prompt, p.response, p.id or str(i), p.condition or "all pairs") for i, p in enumerate(rows)]


def _named(texts: Sequence[str]) -> bool:
    """Whether the user named texts; where none are named, the command line hands over the embedded corpus."""
    return bool(texts) and texts[0] != next(StdlibConfig().build().documents()).text


class _Measure:
    """Profiles of conditions under one set of settings."""

    def __init__(
        self, subject: Subject, modules: str, normalize: Normalize | None, batch_size: int,
        max_length: int | None, boundary: Boundary, seed: int,
    ) -> None:  # fmt: skip
        self.subject, self.boundary, self.seed = subject, boundary, seed
        self.modules, self.normalize = modules, normalize
        self.batch_size = batch_size
        self.max_length = length_limit(subject, max_length)
        self.untrained = subject.untrained(seed)

    def profile(self, examples: Sequence[Example], untrained: bool = False) -> Profile:
        """Gradients of tokenised examples."""
        return gradient_profile(
            self.untrained if untrained else self.subject,
            examples,
            modules=self.modules,
            normalize=self.normalize,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )

    def condition(self, name: str, pairs: Sequence[Pair]) -> Condition:
        """Own responses and foreign ones, in the model and in the untrained one."""
        examples = tuple(tokenise(self.subject, pair, self.boundary) for pair in pairs)
        foreign = [tokenise(self.subject, pair, self.boundary) for pair in rotated(pairs)]
        return Condition(
            name,
            examples,
            own=self.profile(examples),
            irrelevant=self.profile(foreign) if foreign else None,
            untrained=self.profile(examples, untrained=True),
            untrained_irrelevant=self.profile(foreign, untrained=True) if foreign else None,
            without_foreign=len(pairs) - len(foreign),
        )

    def contrast(self, reference: Condition, other: Condition) -> Contrast:
        """The other condition's gradients relative to the reference's."""
        lengths = [float(c.own.targets_n.double().mean()) for c in (reference, other)]
        raw = ratio_of(other.own, reference.own, self.seed)
        untrained = ratio_of(other.untrained, reference.untrained, self.seed)
        if abs(lengths[1] / lengths[0] - 1) <= UNLIKE:
            return Contrast(other.name, raw, untrained, None, None, self._per_loss(other.own, reference.own))
        first, second = self._equal(reference.examples, other.examples)
        below, above = self.profile(first), self.profile(second)
        fresh_below, fresh_above = self.profile(first, untrained=True), self.profile(second, untrained=True)
        return Contrast(
            other.name,
            raw,
            untrained,
            matched=ratio_of(above, below, self.seed),
            untrained_matched=ratio_of(fresh_above, fresh_below, self.seed),
            per_loss=self._per_loss(above, below),
        )

    def foreign(self, condition: Condition) -> Foreign | None:
        """Irrelevant responses relative to the condition's own; None where there are none."""
        if condition.irrelevant is None or condition.untrained_irrelevant is None:
            return None
        return Foreign(
            ratio_of(condition.irrelevant, condition.own, self.seed),
            ratio_of(condition.untrained_irrelevant, condition.untrained, self.seed),
            self._per_loss(condition.irrelevant, condition.own),
        )

    def _per_loss(self, above: Profile, below: Profile) -> Ratio:
        return ratio_of(above.normalised("loss"), below.normalised("loss"), self.seed)

    def _equal(
        self, first: Sequence[Example], second: Sequence[Example]
    ) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """Both conditions with equally many scored tokens: by example where ids agree, else up to the smaller mean."""
        first, second = ([e.truncated(self.max_length) for e in side] for side in (first, second))
        generator = np.random.default_rng(self.seed)
        sizes = [{e.id: len(e.scored) for e in side} for side in (first, second)]
        means = [round(float(np.mean([n for n in size.values() if n] or [0]))) for size in sizes]

        def cut(side: Sequence[Example]) -> tuple[Example, ...]:
            found = []
            for example in side:
                both = [size[example.id] for size in sizes if example.id in size]
                count = min(both) if len(both) == 2 else max(1, min(means))
                found.append(matched(example, count, generator))
            return tuple(found)

        return cut(first), cut(second)


def _statements(found: Sequence[Condition], contrasts: Sequence[Contrast], foreign: dict[str, Foreign]) -> list[str]:
    """What the numbers say, controls included; at most three sentences."""
    said = []
    if contrasts:
        said.append(contrasts[0].sentence(found[0].name))
        more = len(contrasts) - 1
        said += (
            [f"{more} more {'contrast is' if more == 1 else 'contrasts are'} in the table of ratios."] if more else []
        )
    if foreign:
        shown = "; ".join(f"{name}: {ratios.words()}" for name, ratios in list(foreign.items())[:ANSWERED])
        rest = f"; {len(foreign) - ANSWERED} more in the table" if len(foreign) > ANSWERED else ""
        said.append(f"Gradients of responses that belong to other prompts, relative to the right ones': {shown}{rest}.")
    if not contrasts:
        own, fresh = (float(p.overall().nanmean()) for p in (found[0].own, found[0].untrained))
        said.insert(
            0, f"The mean nuclear norm is {own:.3g} over {len(found[0].own.ids)} examples; untrained, {fresh:.3g}."
        )
    return said


def _notes(
    subject: Subject,
    found: Sequence[Condition],
    contrasts: Sequence[Contrast],
    normalize: Normalize | None,
    limit: int,
) -> list[str]:
    notes = []
    lengths = {c.name: float(c.own.targets_n.double().mean()) for c in found}
    notes += [
        f"Warning: {name} has {lengths[name]:.1f} scored tokens on average, {found[0].name} {lengths[found[0].name]:.1f}. A mean "
        "over more tokens has smaller gradients; read the matched ratio."
        for name in (contrast.name for contrast in contrasts if contrast.matched is not None)
    ]
    for c in found:
        if c.own.skipped:
            listed = ", ".join(c.own.skipped[:LISTED]) + (", …" if len(c.own.skipped) > LISTED else "")
            notes.append(f"{c.name}: {len(c.own.skipped)} examples without a response token were skipped: {listed}.")
        if c.own.not_finite:
            listed = "; ".join(c.own.not_finite[:LISTED])
            notes.append(f"{c.name}: {len(c.own.not_finite)} gradients are not finite and were left out: {listed}.")
        if c.without_foreign:
            notes.append(
                f"{c.name}: {c.without_foreign} of {len(c.examples)} examples have no irrelevant response, because no other "
                "response of the condition differs from theirs; they are left out there."
            )
    notes += _beyond(subject, found, limit)
    dtype = next(subject.model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        notes.append(f"Weights are {dtype}: forward and backward pass have that precision, spectra are in float32.")
    notes.append("One number per example: mean over layers, then geometric mean over matrices.")
    return notes + ([f"Norms are normalised by {normalize}."] if normalize else [])


def _beyond(subject: Subject, found: Sequence[Condition], limit: int) -> list[str]:
    """A note on examples longer than what the model saw in training; the last token is only predicted."""
    trained = subject.trained_length
    if trained is None:
        return []
    beyond = sum(min(len(example.tokens), limit) - 1 > trained for c in found for example in c.examples)
    return [f"Examples longer than the {trained} tokens that the model was trained on: {beyond}."] if beyond else []


def _paper(found: Sequence[Condition]) -> tuple[PaperFigure, ...]:
    """The paper's unevenness of curves, with ours for the first two conditions."""
    shown = [", ".join(f"{value:.3g}" for value in c.own.mad().values()) for c in found[:2]]
    names = " → ".join(c.name for c in found[:2])
    return (
        PaperFigure(
            setting="MAD over layers, bare answer → detailed reasoning",
            paper="4.42, 7.06, 17.32, 12.91 → 0.28, 0.27, 0.64, 0.64",
            ours=f"{names}: {' → '.join(shown)}",
            note=PAPER,
        ),
    )
