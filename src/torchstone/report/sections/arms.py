"""Arms: what each one changes, how it was matched to the baseline, and with which learning rate it ran."""

from __future__ import annotations

import json
from typing import Any

from torchstone.report import numbers
from torchstone.report.charts import arm_colors
from torchstone.report.markup import Child, Markup, element
from torchstone.report.result import ArmRecord, Match, Result
from torchstone.report.sections.pieces import arm_name, facts, section

QUANTITIES = {"params": "parameters", "flops": "FLOPs per token"}
POLICIES = {"tuned": "tuned per arm", "shared": "shared by arms", "none": None}


def arms(result: Result) -> Markup | None:
    """One panel per arm, the baseline first."""
    if not result.arms:
        return None
    colors = arm_colors(result)
    ordered = sorted(result.arms, key=lambda arm: arm.name != result.baseline)
    panels = [_arm(arm, colors.get(arm.name, 0), result) for arm in ordered]
    return section("arms", "Arms", element("div", panels, class_="arms"))


def _arm(arm: ArmRecord, color: int, result: Result) -> Markup:
    role = "baseline" if arm.name == result.baseline else arm.role
    tag = element("span", role, class_="tag")
    return element(
        "article",
        element("h3", arm_name(arm.name, color), tag),
        element("p", arm.note) if arm.note else None,
        _diff(arm),
        facts(
            ("parameters", _quantity(arm.parameters)),
            ("active per token", _quantity(arm.active_parameters)),
            ("FLOPs per token", _quantity(arm.flops_per_token)),
            ("learning rate", _learning_rate(arm)),
        ),
        facts(("matched on", _match(arm.match)), wide=True) if arm.match else None,
        class_=f"arm {role}",
    )


def _quantity(value: float | None) -> str | None:
    return None if value is None else numbers.quantity(value)


def shown_value(value: Any) -> str:
    """A recipe value as text: JSON, but strings without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _diff(arm: ArmRecord) -> Markup | None:
    if not arm.intervention:
        return None
    rows: list[Child] = []
    for change in arm.intervention:
        rows.append(element("div", change.path, class_="path"))
        for sign, word, value in (("−", "baseline", change.baseline), ("+", "arm", change.value)):
            if value is None and word == "baseline" and change.value is not None:
                continue
            label = element("span", f"{word}: ", class_="hidden")
            mark = element("span", sign, aria_hidden="true", class_="sign")
            kind = "removed" if word == "baseline" else "added"
            rows.append(element("div", mark, label, element("code", shown_value(value)), class_=kind))
    return element("div", rows, class_="diff", role="group", aria_label=f"Intervention of {arm.name}")


def _match(match: Match | None) -> Child:
    if match is None:
        return None
    residual = numbers.typeset(numbers.percent(match.residual, 2))
    if match.after is None:
        how: list[Child] = [f"{QUANTITIES[match.on]}, as it is"]
    else:
        change = f" {shown_value(match.before)} → {shown_value(match.after)}"
        how = [f"{QUANTITIES[match.on]} through ", element("code", match.free), change]
    return [
        *how,
        element("small", f"residual {residual} (tolerance {100 * match.tolerance:g} %)"),
    ]


def _learning_rate(arm: ArmRecord) -> Child:
    policy = POLICIES[arm.learning_rate_policy]
    if arm.learning_rate is None:
        return policy
    return [f"{arm.learning_rate:g}", element("small", policy) if policy else None]
