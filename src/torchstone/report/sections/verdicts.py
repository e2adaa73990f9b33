"""Verdict cards, and the overview that puts effects on one axis."""

from __future__ import annotations

from collections import defaultdict

from torchstone.report import forest, numbers, tables, words
from torchstone.report.charts import arm_colors
from torchstone.report.markup import Child, Markup, element
from torchstone.report.result import Result, Verdict
from torchstone.report.sections.pieces import arm_name, badge, details, facts, grid, section


def verdicts(result: Result) -> Markup | None:
    """One card per claim."""
    if not result.verdicts:
        return None
    cards = [_card(verdict, index, result) for index, verdict in enumerate(result.verdicts)]
    return section(
        "verdicts",
        "Verdicts" if len(cards) > 1 else "Verdict",
        element("div", cards, class_="cards"),
        element("p", words.LEGEND, class_="note"),
    )


def effects(result: Result) -> Markup | None:
    """Forest plots of claims that share a metric, where there is more than one."""
    groups: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for verdict in result.verdicts:
        if verdict.effect is None:
            continue
        groups[verdict.metric, verdict.contrast].append(verdict)
    shared = [group for group in groups.values() if len(group) > 1]
    if not shared:
        return None
    colors = arm_colors(result)
    parts = []
    for group in shared:
        label = words.metric_label(group[0].metric, result.metrics)
        parts += [element("h3", label), forest.overview(group, result.metrics, colors)]
    return section("effects", "Effects side by side", element("div", parts, class_="panel"), _key())


def _key() -> Markup:
    return element(
        "p",
        "Large dot and bar: effect with its interval. Small dots: single pairs. Solid line: "
        "no effect. Dashed line: "
        "the margin. Tinted: where the claim holds.",
        class_="note",
    )


def _card(verdict: Verdict, index: int, result: Result) -> Markup:
    colors = arm_colors(result)
    scale = words.scale_for([verdict], result.metrics)
    head = element(
        "div",
        badge(verdict.status),
        element("span", verdict.claim, class_="claim-id"),
        class_="card-head",
    )
    contrast = element(
        "p",
        element("span", words.metric_label(verdict.metric, result.metrics), class_="metric"),
        element(
            "span",
            arm_name(verdict.arm, colors.get(verdict.arm, 1)),
            " minus " if verdict.contrast == "difference" else " relative to ",
            arm_name(verdict.baseline, colors.get(verdict.baseline, 0)),
        ),
        class_="contrast",
    )
    return element(
        "article",
        head,
        element("h3", verdict.sentence),
        contrast,
        forest.plot(verdict, result.metrics, colors.get(verdict.arm, 1)) if verdict.effect is not None else None,
        _numbers(verdict, scale),
        element("p", words.reason(verdict), class_="reason") if verdict.reason else None,
        _looks(verdict),
        _pairs(verdict),
        class_=f"card {verdict.status}",
        id=f"claim-{index}",
    )


def _numbers(verdict: Verdict, scale: words.EffectScale) -> Markup | None:
    def text(value: str) -> str:
        return numbers.typeset(value)

    needed = f"about {verdict.n_needed:,} {verdict.unit_of_n}" if verdict.n_needed is not None else None
    return facts(
        ("effect", element("strong", text(scale.text(verdict.effect)))),
        (
            words.interval_name(verdict),
            text(words.interval_text(verdict, scale)) if verdict.interval else None,
        ),
        ("claimed", text(words.claimed(verdict, scale))),
        ("n", words.counted(verdict)),
        ("detectable past the margin", _detectable(verdict, scale)),
        ("would decide it", needed),
    )


def _detectable(verdict: Verdict, scale: words.EffectScale) -> Child:
    """Minimum detectable distance from the margin: as designed, before the run, and from the spread that was
    observed."""
    known = [("as designed", verdict.mde_before), ("as observed", verdict.mde_after)]
    parts = [[scale.detectable(value), element("small", name)] for name, value in known if value is not None]
    return element("span", [element("span", part) for part in parts], class_="several") if parts else None


def _looks(verdict: Verdict) -> Markup | None:
    if not verdict.looks:
        return None
    table = grid(tables.looks(verdict.looks), f"Looks of {verdict.claim}")
    return details(f"Sequential looks ({len(verdict.looks)})", table)


def _pairs(verdict: Verdict) -> Markup | None:
    if not verdict.pairs:
        return None
    table = grid(tables.pairs(verdict.pairs, verdict.unit_of_n), f"Pairs of {verdict.claim}")
    logs = element("p", "The contrast is ln(arm / baseline).", class_="note")
    return details(f"Pairs ({len(verdict.pairs):,})", table, logs if verdict.contrast == "log ratio" else None)
