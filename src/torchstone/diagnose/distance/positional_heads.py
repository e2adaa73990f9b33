"""Positional heads: the finding of `distance_heads` on one model, next to its two controls, with an optional ablation.

    finding = positional_heads_finding(open_subject("path/to/model"), load_texts([]), ablate="mean")

The controls are the permutation null of each head (z) and the same architecture with untrained weights on the same tokens: a
rotation makes the centre of dimension depend on distance even where nothing was learnt, so that only what exceeds both
is worth a look. Scores do not prove a function; the ablation does: it takes the distance heads out and compares the loss on
late and early tokens with random heads of the same layers.

The name is the paper's (arXiv 2410.08703). The heads are called distance heads here; the positional heads of arXiv 2410.06205
are offset heads, see `torchstone.diagnose.rotary.rope_usage`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.diagnose.adapters.ablation import make_ablation
from torchstone.diagnose.distance import positional_heads_tables as tables
from torchstone.diagnose.distance.ablation import AblationReport, ablation_report
from torchstone.diagnose.distance.attended_pairs import PairChoice
from torchstone.diagnose.distance.heads import DistanceSettings, HeadTable, Maps, check_top, distance_heads
from torchstone.diagnose.subject import AblationMode, Subject
from torchstone.diagnose.texts import token_rows
from torchstone.errors import ConfigError
from torchstone.report.finding import Finding

DEFAULT_LENGTH = 1024
NULL_SD = 3.0
LEAST_NULL = 200


def positional_heads_finding(
    subject: Subject,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    sequences: int = 8,
    pairs: PairChoice = "attended",
    skip_sink: int = 4,
    null: int = 200,
    top: float = 0.1,
    maps: Maps = "recompute",
    ablate: AblationMode | None = None,
    window: int | None = None,
    seed: int = 0,
) -> Finding:
    """Score every head of a rotary model, name its distance heads, and, if asked, take them out.

    Args:
        texts: at least one of `max_length` tokens.
        max_length: tokens of a row; None: 1024, or what the model saw at once in training if that is less.
        sequences: rows.
        pairs: `attended` weighs pairs of tokens by attention, `random` draws them evenly.
        skip_sink: first keys of a row that do not count.
        null: random reassignments of distances per head, at least 200 for a report.
        top: share of all heads that may be called distance heads.
        maps: `recompute` attention from queries and keys, or read the `model`'s own, which takes more memory.
        ablate: `mean`, `zero` or `window`; None: no ablation.
        window: tokens that ablated heads still see, for `window` only.
        seed: of random pairs, null, untrained weights and random heads.

    Raises:
        ConfigError: no rotary layer, unusable settings. DataError: texts too short.
    """
    settings = DistanceSettings(pairs=pairs, skip_sink=skip_sink, null=null, maps=maps, seed=seed)
    length = max_length if max_length is not None else min(subject.trained_length or DEFAULT_LENGTH, DEFAULT_LENGTH)
    _check(subject, settings, length, top, ablate, window)
    tokens_bt = token_rows(subject, texts, length, sequences)
    trained = distance_heads(subject, tokens_bt, settings)
    untrained = distance_heads(subject.untrained(seed), tokens_bt, settings)
    chosen = trained.selected(top)
    report = None
    if ablate is not None and chosen:
        report = ablation_report(
            subject, tokens_bt, chosen, lowest=trained.lowest(len(chosen)), mode=ablate, window=window, seed=seed
        )
    return Finding(
        analysis="positional-heads",
        title="Distance heads",
        question="In which heads do slow rotary pairs take over with distance, and does the model need those heads?",
        subject=subject.describe(),
        answer=_answer(trained, untrained, top, report),
        control=_control(null, report),
        tables=tables.head_tables(trained, untrained, top, report),
        heatmaps=tables.heatmaps(trained, chosen),
        figures=tables.centre_figure(trained, untrained, chosen),
        notes=_notes(subject, trained, ablate is not None and not chosen),
    )


def _check(
    subject: Subject,
    settings: DistanceSettings,
    length: int,
    top: float,
    ablate: AblationMode | None,
    window: int | None,
) -> None:
    """Refuse what cannot be honoured, before any text is encoded."""
    check_top(top)
    if settings.null < LEAST_NULL:
        raise ConfigError(f"null is {settings.null}; a report needs at least {LEAST_NULL} reassignments.")
    if window is not None and ablate != "window":
        raise ConfigError(f"window is {window}, but ablate is {ablate!r}; a window is for ablate='window'.")
    if ablate is not None:
        make_ablation(subject.layers, (), ablate, window)
    settings.edges(length)


def _control(null: int, report: AblationReport | None) -> str:
    words = (
        f"{null} random reassignments of the distances of each head give z. The same architecture with untrained weights, on the "
        "same tokens, gives what rotation does by itself."
    )
    return words + (" Ablations stand beside random heads of the same layers." if report else "")


def strong(table: HeadTable) -> int:
    """Heads more than three null standard deviations above the null mean."""
    return int((table.column("z") > NULL_SD).sum())


def _answer(trained: HeadTable, untrained: HeadTable, top: float, report: AblationReport | None) -> str:
    heads = len(trained.heads())
    words = (
        f"{strong(trained)} of {heads} heads have a shift more than {NULL_SD:g} null standard deviations above chance "
        f"(untrained: {strong(untrained)})"
    )
    control = untrained.column("score")
    if untrained.undefined() < heads:
        band = float(control[~control.isnan()].abs().max())
        beyond = int((trained.column("score") > band).sum())
        words += f", and {beyond} exceed the largest |shift| of the untrained model, {band:.2f}"
    words += ". "
    named = ", ".join(f"{layer}.{head}" for layer, head in trained.selected(top)) or "none"
    words += f"Distance heads (the top {top:.0%}, as layer.head): {named}. "
    if report is not None:
        words += (
            f"Without them ({report.mode}) the loss rises by {report.late.chosen:.3f} nats on late and "
            f"{report.early.chosen:.3f} on early tokens, more than {report.late.percentile:.0%} and "
            f"{report.early.percentile:.0%} of {len(report.late.random)} random draws do."
        )
    return words.strip()


def _notes(subject: Subject, table: HeadTable, nothing_to_ablate: bool) -> tuple[str, ...]:
    settings = table.settings
    weights = "weighted by attention" if settings.pairs == "attended" else "drawn evenly, with equal weight"
    few = settings.pairs == "attended" and settings.keys is not None and settings.keys < table.length - 1
    notes = [
        f"{table.sequences} rows of {table.length} tokens; pairs of tokens are {weights}; the first {settings.skip_sink} keys of "
        "a row are left out"
        + (f", and of each query only the {settings.keys} most attended keys count." if few else "."),
        "The scores are this project's definitions: the formulas of arXiv 2410.08703 were not open to us and no code is out.",
        "Distance heads are the paper's positional heads; offset heads are those of arXiv 2410.06205, with at least 90 % of "
        "their attention on one offset.",
    ]
    if table.skipped:
        notes.append(f"Layers without rotary positions were skipped: {', '.join(map(str, table.skipped))}.")
    if subject.trained_length is not None and table.length > subject.trained_length:
        notes.append(f"Rows are longer than the {subject.trained_length} tokens that the model was trained on.")
    if table.undefined():
        notes.append(
            f"Heads without a shift, left out: {table.undefined()} (their centre of dimension or their distances do not vary)."
        )
    if nothing_to_ablate:
        notes.append(
            "No head has a shift above 0 and a mean distance above its layer's median, so nothing was ablated."
        )
    return tuple(notes)
