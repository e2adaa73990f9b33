"""What a search for learning rates found, as a report."""

from __future__ import annotations

from torchstone.lab.rates.bracket import Bracket, RateSummary
from torchstone.lab.rates.divergence import WINDOW
from torchstone.lab.rates.search import Found
from torchstone.recipe.schema import Recipe
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, Table


def finding_of(found: Found, recipe: Recipe) -> Finding:
    """The report of a search on a recipe."""
    model, optimizer = recipe.model.kind, recipe.optimizer.kind
    return Finding(
        analysis="lr",
        title="Learning rates",
        question="At which peak learning rates does this recipe train well, and where does it become unstable?",
        subject=f"recipe with model {model}, optimizer {optimizer}, schedule {recipe.schedule.kind}",
        answer=" ".join(sentences(found)),
        control=f"Every rate is tried with the same {found.seeds} seed(s), so with the same initial values and the same data; "
        "differences between rates are taken seed by seed.",
        tables=(_table(found.bracket),),
        figures=(_figure(found),),
        notes=_notes(found),
    )


def sentences(found: Found) -> list[str]:
    """The answer: bracket, best rate, edge."""
    bracket = found.bracket
    if not bracket.told_apart:
        return [
            f"These runs of {found.steps:,} steps are too short to tell rates apart: the best rate gained hardly more than the "
            f"tolerance of {found.tolerance:g} nats. Search with more steps (--steps N)."
        ]
    opened = " (open: no lower rate was tried)" if bracket.open_low else ""
    lines = [f"Use a peak rate between {bracket.low:.3g}{opened} and {bracket.high:.3g}."]
    interval = bracket.best_interval
    spread = f" (95 % interval over seeds {interval[0]:.3g} to {interval[1]:.3g})" if interval else ""
    lines.append(f"The best is about {bracket.best_rate:.3g}{spread}.")
    if bracket.unstable_from is None:
        lines.append(f"No seed diverged up to {bracket.stable_to:.3g}, so the edge of stability was not seen.")
    else:
        lines.append(
            f"Every seed is stable up to {bracket.stable_to:.3g}; at {bracket.unstable_from:.3g} at least one diverges."
        )
    return lines


def _table(bracket: Bracket) -> Table:
    columns = ("peak rate", "mean loss", "above the lowest", "low", "high", "diverged seeds", "verdict")
    return Table(
        title="Loss by peak learning rate",
        columns=columns,
        rows=tuple(_row(one, bracket) for one in bracket.rates),
        note="held-out loss at the end of the short runs, nats per token; 95 % intervals of paired differences over seeds",
    )


def _row(one: RateSummary, bracket: Bracket) -> tuple[str | float | None, ...]:
    if one.mean is None or one.above is None:
        return (one.rate, None, None, None, None, ", ".join(map(str, one.diverged)), "unstable")
    inside = bracket.low <= one.rate <= bracket.high
    above_edge = bracket.unstable_from is not None and one.rate > bracket.unstable_from
    word = "above the edge" if above_edge else "recommended" if inside else "stable"
    same = one.rate == bracket.lowest  # its own difference is 0 by definition
    ends = (None, None) if same else (one.above.low, one.above.high)
    return (one.rate, one.mean, one.above.effect, *ends, "", word)


def _figure(found: Found) -> Figure:
    stable = [one for one in found.bracket.rates if one.mean is not None]
    losses = {one.rate: [t.loss for t in found.trials if t.rate == one.rate and t.loss is not None] for one in stable}
    line = Line(
        name="mean and range over seeds",
        x=tuple(one.rate for one in stable),
        y=tuple(one.mean for one in stable),
        low=tuple(min(losses[one.rate]) for one in stable),
        high=tuple(max(losses[one.rate]) for one in stable),
    )
    return Figure(
        title="Loss by peak learning rate",
        x_label="peak learning rate",
        y_label="held-out loss (nats per token)",
        log_x=True,
        lines=(line,),
        note="rates at which a seed diverged have no point",
    )


def _notes(found: Found) -> tuple[str, ...]:
    bracket = found.bracket
    notes = [
        f"Short runs of {found.steps:,} steps; the recipe itself has {found.whole:,}. The best rate of a short run is usually "
        "above that of a long one, and a long run may become unstable at a lower rate: start near the lower end of the bracket "
        "for a much longer run, or search again with more steps.",
        f"The bracket holds the rates around the best one whose mean loss is within {found.tolerance:g} nats of the lowest. A "
        "run has diverged once it has lost half of what it had learned, and at least half a nat (median of 10 steps).",
    ]
    if bracket.open_low:
        notes.append("The bracket's lower end is the lowest rate that was tried, not one at which the loss is higher.")
    if bracket.open_high:
        notes.append("The bracket's upper end is the highest stable rate that was tried: the loss is no higher there.")
    if found.steps < 3 * WINDOW:
        notes.append(
            f"Runs of fewer than {3 * WINDOW} steps end early only where the loss is no number: the rule needs medians of "
            f"{WINDOW} steps, so the edge may be lower than it seems."
        )
    return tuple(notes)
