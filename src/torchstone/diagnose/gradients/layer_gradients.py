"""Layer gradients of responses of different kinds, next to what length, loss and an untrained model explain of them.

Li, Li and Zhou (arXiv 2410.23743) plot the nuclear norm of ∂loss/∂W over the layers for bare answers and for reasoning, and
for responses that belong to another prompt. Two kinds of responses rarely differ in one way only, so that every comparison
stands beside its controls:

    matched     the loss over a random subset of the longer response's tokens, as many as the shorter one has; a mean over
                more tokens has a smaller gradient whatever they say
    per loss    norms divided by the loss; a token that is well predicted has a small gradient whatever it says
    irrelevant  every prompt with the next one's response, within its condition
    untrained   the same architecture with fresh weights, which knows nothing of responses

    torchstone diagnose layer-gradients MODEL --pairs pairs.jsonl --conditions style

One line of the pairs file: {"id": "7", "prompt": "…", "response": "…", "style": "reasoned"}. Conditions that answer the same
prompts should share ids: they are then compared example by example. The first condition of the file is the reference.
Where there are texts and no pairs, the first half of each text's beginning is the prompt and the second the response.

Pitfall: special tokens are not added. Write them into the prompt, as the model's chat template does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from torchstone.diagnose.gradients.capture import select_matrices
from torchstone.diagnose.gradients.pairs import Boundary, Example, Pair, halved, matched, read_pairs, rotated, tokenise
from torchstone.diagnose.gradients.profile import Normalize, Profile, gradient_profile
from torchstone.diagnose.gradients.ratio import Ratio, ratio_of
from torchstone.diagnose.gradients.tables import Condition, conditions_table, curves, differences_table, ratios_table
from torchstone.diagnose.subject import Subject
from torchstone.errors import DataError
from torchstone.report.finding import Finding
from torchstone.report.result import PaperFigure, Table

UNLIKE = 0.1  # mean lengths further apart than this share are matched
LISTED = 8
PAPER = "Qwen2-1.5B on AQuA, Q, K, V, O; from a secondary summary of the paper"


@dataclass(frozen=True, eq=False)
class Contrast:
    """A condition against the reference: raw, matched where lengths differ, and the matched one in an untrained model."""

    name: str
    raw: Ratio
    matched: Ratio | None
    per_loss: Ratio
    untrained: Ratio
    untrained_matched: Ratio | None


def layer_gradients_finding(
    subject: Subject,
    texts: Sequence[str] = (),
    *,
    pairs: str | Path | Sequence[Pair] | None = None,
    conditions: str = "condition",
    modules: str = "attention",
    normalize: Normalize | None = None,
    batch_size: int = 8,
    max_length: int = 1024,
    boundary: Boundary = "joint",
    seed: int = 0,
) -> Finding:
    """Gradients by condition, with the controls of the module's docstring.

    Args:
        subject: the model.
        texts: used where there are no pairs: the first half of each text's first 200 words is the prompt, the second half the
            response; at most 64 texts.
        pairs: a JSONL file with `prompt` and `response`, or `text` and `response`, a line; or pairs in Python.
        conditions: the file's column that names a row's condition; the first condition is the reference.
        modules: `attention` (q, k, v, o), `all` (every linear layer of the blocks), or a regular expression for their paths.
        normalize: `loss` divides norms by the example's loss, `tokens` multiplies them by √(scored tokens); default: neither.
        batch_size: examples in one forward and backward pass.
        max_length: tokens after which an example is cut; the model's own limit holds too.
        boundary: how the response's first token is found: in the tokens of the whole text (`joint`), by tokenising prompt and
            response `apart`, or by the prompt's own number of tokens (`official`, as the authors).
        seed: of the random tokens in matching, of resampling, and of the untrained model.

    Raises:
        DataError: no pairs and no texts, a damaged file, or no response token within `max_length`.
        ConfigError: see `gradient_profile`.
    """
    rows = _rows(texts, pairs, conditions)
    select_matrices(subject, modules)  # a pattern that matches nothing fails before anything is measured
    measure = _Measure(subject, modules, normalize, batch_size, max_length, boundary, seed)
    found = [
        measure.condition(name, [pair for pair in rows if pair.condition == name])
        for name in dict.fromkeys(pair.condition for pair in rows)
    ]
    contrasts = [measure.contrast(found[0], other) for other in found[1:]]
    foreign = {c.name: ratio_of(c.irrelevant, c.own, seed) for c in found if c.irrelevant is not None}
    statements = _statements(found, contrasts, foreign)
    return Finding(
        analysis="layer-gradients",
        title="Gradients of responses, layer by layer",
        question="Which responses pull hardest at which layers, and how much of that is length and loss?",
        subject=subject.describe(),
        answer=" ".join(statements),
        control=(
            "Matched: the loss over as many random tokens of the longer response as the shorter one has. Irrelevant: the next "
            "prompt's response. Untrained: the same architecture with fresh weights, which cannot know a response's kind."
        ),
        tables=_tables(found, contrasts, foreign, seed),
        figures=curves(found),
        paper=_paper(found),
        notes=tuple(_notes(subject, found, contrasts, normalize)),
    )


def _tables(
    found: Sequence[Condition], contrasts: Sequence[Contrast], foreign: dict[str, Ratio], seed: int
) -> tuple[Table, ...]:
    tables = [conditions_table(found), ratios_table(_ratio_rows(found, contrasts, foreign))]
    for other in found[1:]:
        comparison = found[0].own.compare(other.own, seed=seed)
        tables += [differences_table(comparison, found[0].name, other.name)]
        tables += [comparison.table(f"Layer by layer: {other.name} against {found[0].name}")]
    tables += [c.own.ranking().model_copy(update={"title": f"Examples by gradient: {c.name}"}) for c in found]
    return tuple(tables)


def _rows(texts: Sequence[str], pairs: str | Path | Sequence[Pair] | None, conditions: str) -> list[Pair]:
    """Pairs from what was given, every one with a condition's name."""
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


class _Measure:
    """Profiles of conditions under one set of settings."""

    def __init__(
        self, subject: Subject, modules: str, normalize: Normalize | None, batch_size: int, max_length: int,
        boundary: Boundary, seed: int,
    ) -> None:  # fmt: skip
        self.subject, self.boundary, self.seed = subject, boundary, seed
        self.modules, self.normalize = modules, normalize
        self.batch_size = batch_size
        self.max_length = max_length if subject.max_length is None else min(max_length, subject.max_length)
        self.untrained = subject.untrained(seed)

    def profile(self, examples: Sequence[Example], untrained: bool = False, per_loss: bool = False) -> Profile:
        """Gradients of tokenised examples."""
        return gradient_profile(
            self.untrained if untrained else self.subject,
            examples,
            modules=self.modules,
            normalize="loss" if per_loss else self.normalize,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )

    def condition(self, name: str, pairs: Sequence[Pair]) -> Condition:
        """Own responses, foreign ones, and own ones in the untrained model."""
        examples = tuple(tokenise(self.subject, pair, self.boundary) for pair in pairs)
        foreign = [tokenise(self.subject, pair, self.boundary) for pair in rotated(pairs)]
        irrelevant = self.profile(foreign) if len(pairs) > 1 else None
        return Condition(name, examples, self.profile(examples), irrelevant, self.profile(examples, untrained=True))

    def contrast(self, reference: Condition, other: Condition) -> Contrast:
        """The other condition's gradients relative to the reference's."""
        lengths = [float(c.own.targets_n.double().mean()) for c in (reference, other)]
        raw, untrained = ratio_of(other.own, reference.own, self.seed), self._untrained(reference, other)
        if abs(lengths[1] / lengths[0] - 1) <= UNLIKE:
            pair = (reference.examples, other.examples)
            return Contrast(other.name, raw, None, self._ratio(*pair, per_loss=True), untrained, None)
        pair = self._equal(reference.examples, other.examples)
        return Contrast(
            other.name, raw, self._ratio(*pair), self._ratio(*pair, per_loss=True), untrained,
            self._ratio(*pair, untrained=True),
        )  # fmt: skip

    def _untrained(self, reference: Condition, other: Condition) -> Ratio:
        return ratio_of(other.untrained, reference.untrained, self.seed)

    def _ratio(
        self, first: Sequence[Example], second: Sequence[Example], untrained: bool = False, per_loss: bool = False
    ) -> Ratio:
        profiles = [self.profile(examples, untrained, per_loss) for examples in (second, first)]
        return ratio_of(profiles[0], profiles[1], self.seed)

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


def _ratio_rows(
    found: Sequence[Condition], contrasts: Sequence[Contrast], foreign: dict[str, Ratio]
) -> list[tuple[str, Ratio]]:
    rows: list[tuple[str, Ratio]] = []
    for c in contrasts:
        name = f"{c.name} / {found[0].name}"
        rows += [(name, c.raw)]
        rows += [(f"{name}, matched tokens", c.matched)] if c.matched else []
        rows += [(f"{name}, {'matched tokens, ' if c.matched else ''}divided by loss", c.per_loss)]
        rows += [(f"{name}, untrained model", c.untrained)]
        rows += [(f"{name}, untrained model, matched tokens", c.untrained_matched)] if c.untrained_matched else []
    return rows + [(f"{name}: irrelevant / own", ratio) for name, ratio in foreign.items()]


def _statements(found: Sequence[Condition], contrasts: Sequence[Contrast], foreign: dict[str, Ratio]) -> list[str]:
    """What the numbers say, control included; at most three sentences."""
    said = []
    if contrasts:
        c = contrasts[0]
        text = f"Gradients of {c.name} are {c.raw.words()} those of {found[0].name}"
        text += f", {c.matched.words()} with as many scored tokens" if c.matched else ""
        said.append(f"{text}; an untrained model gives {c.untrained.words()}.")
    if foreign:
        shown = ", ".join(f"{ratio.words()} ({name})" for name, ratio in list(foreign.items())[:3])
        said.append(f"Responses that belong to other prompts have gradients {shown} those of the right ones.")
    if not contrasts:
        own, fresh = (float(p.overall().nanmean()) for p in (found[0].own, found[0].untrained))
        said.insert(
            0, f"The mean nuclear norm is {own:.3g} over {len(found[0].own.ids)} examples; untrained, {fresh:.3g}."
        )
    return said


def _notes(
    subject: Subject, found: Sequence[Condition], contrasts: Sequence[Contrast], normalize: Normalize | None
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
    dtype = next(subject.model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        notes.append(f"Weights are {dtype}: forward and backward pass have that precision, spectra are in float32.")
    notes.append("One number per example: mean over layers, then geometric mean over matrices.")
    return notes + ([f"Norms are normalised by {normalize}."] if normalize else [])


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
