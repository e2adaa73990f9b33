"""Head and tail of the page: title and summary; design, small print, environment, recipe, how to run it
again."""

from __future__ import annotations

from torchstone.report import numbers, words
from torchstone.report.markup import Markup, element
from torchstone.report.result import Result
from torchstone.report.sections.pieces import badge, details, facts, grid, section
from torchstone.report.tables import Grid

MOST_OUTCOMES = 12


def masthead(result: Result) -> Markup:
    """Title, question, the outcome in a line, and the size of the experiment."""
    kind = ["study ", element("b", result.slug)] if result.slug else "comparison"
    scale = [" · ", result.scale, " scale"] if result.scale else None
    return element(
        "header",
        element("p", element("span", "torchstone", class_="wordmark"), " ", kind, scale, class_="eyebrow"),
        element("h1", result.title),
        element("p", result.question, class_="question") if result.question else None,
        element("div", element("p", numbers.typeset(words.summary(result))), _outcomes(result), class_="summary"),
        _size(result),
        class_="masthead",
    )


def _outcomes(result: Result) -> Markup | None:
    """One line per claim, or only counts where there are many."""
    states = [verdict.status for verdict in result.verdicts]
    if not 1 < len(states) <= MOST_OUTCOMES:
        counts = [(status, states.count(status)) for status in ("holds", "fails", "inconclusive")]
        badges = [[badge(status), f" × {count}" if count > 1 else None] for status, count in counts if count]
        return element("div", [element("span", one) for one in badges], class_="tally") if badges else None
    lines = []
    for index, verdict in enumerate(result.verdicts):
        effect = words.scale_for([verdict], result.metrics).text(verdict.effect)
        sentence = element("a", verdict.sentence, href=f"#claim-{index}")
        shown = element("span", numbers.typeset(effect), class_="effect-of")
        lines.append(element("li", element("span", badge(verdict.status)), sentence, shown))
    return element("ul", lines, class_="outcomes")


def _size(result: Result) -> Markup | None:
    seeds = len({cell.seed for cell in result.cells})
    broken = sum(cell.status != "done" for cell in result.cells)
    cells = f"{len(result.cells):,}" + (f" ({broken} not done)" if broken else "")
    created = result.created[:16].replace("T", " ") + (" UTC" if "T" in result.created else "")
    return facts(
        ("arms", str(len(result.arms))),
        ("seeds", str(seeds) if seeds else None),
        ("cells", cells if result.cells else None),
        ("created", created),
        ("fingerprint", element("code", result.fingerprint[:12])),
    )


def about(result: Result) -> Markup:
    """Design, small print, environment and how to run it again."""
    notes = [element("li", note) for note in result.notes]
    return section(
        "about",
        "About this result",
        [element("h3", "Design"), element("p", result.design)] if result.design else None,
        [element("h3", "Small print"), element("ul", notes, class_="notes")] if notes else None,
        _again(result),
        _environment(result),
        details("Recipe", element("pre", element("code", result.recipe_yaml), tabindex=0))
        if result.recipe_yaml
        else None,
    )


def _again(result: Result) -> Markup:
    download = element("button", "Save numbers as JSON", type="button", id="download", hidden=True)
    command = element("pre", element("code", result.command), tabindex=0, class_="command") if result.command else None
    source = element(
        "p",
        "Everything here is made from ",
        element("a", "result.json", href="./result.json"),
        " in the report’s folder. Fingerprint ",
        element("code", result.fingerprint, class_="fingerprint"),
        ".",
    )
    return element("div", element("h3", "Run it again"), command, source, download, class_="again")


def _environment(result: Result) -> Markup | None:
    if not result.environment:
        return None
    rows = tuple(result.environment.items())
    return details("Environment", grid(Grid(("what", "value"), rows, (False, False)), "Environment"))
