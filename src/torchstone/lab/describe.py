"""Say what a study will do before it runs: claims, arms with their interventions, sizes, detectable effects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torchstone.errors import StudyError
from torchstone.lab.study import Arm, Study
from torchstone.lab.verdict import Design, effect_before


def describe(study: Study, scale_name: str) -> Iterator[str]:
    """Lines of plain text.

    Raises:
        StudyError: the study has no such scale.
    """
    if scale_name not in study.scales:
        raise StudyError(f"scale {scale_name!r} is not one of this study's: {', '.join(study.scales)}.")
    scale = study.scales[scale_name]
    yield study.title
    yield study.question
    yield f"Scales: {', '.join(f'{name} ({size.seeds} seeds)' for name, size in study.scales.items())}"
    yield ""
    yield "Claims"
    for claim in study.claims:
        yield f"  {claim.id}: {claim.sentence}"
        pair = f"{claim.arm} against {claim.baseline}"
        if claim.gate is not None:
            yield f"    judged only if {claim.gate.metric} of {claim.gate.arm} is above {claim.gate.least:g} in every seed"
        yield f"    {claim.contrast} of {claim.metric}, {pair}, {claim.direction} than {claim.margin:g}"
        detectable = effect_before(claim, Design.of(scale.seeds, None))
        if detectable is not None:
            assumed = f"80 % power, assumed s.d. {claim.assumed_sd:g}"
            yield f"    detectable with {scale.seeds} seeds ({assumed}): {detectable:.3g}"
    yield ""
    yield f"Arms at scale {scale_name}"
    for arm in study.check(scale):
        record = study.arm_record(arm)
        size = f", {record.parameters:,} parameters" if record.parameters else ""
        yield f"  {arm.name} ({arm.role}{size}) {arm.note}".rstrip()
        for change in record.intervention:
            yield f"    {change.path}: {change.baseline} → {change.value}"


def before(study: Study, arms: Sequence[Arm], design: Design) -> Iterator[str]:
    """What is known before any cell runs: how each arm was matched, and what each claim could detect."""
    for arm in arms:
        match = study.arm_record(arm).match
        if match is not None and match.after is not None:
            yield f"{arm.name}: {match.free} {match.before} → {match.after}, {match.on} {match.residual:+.3%} of the baseline's"
        elif match is not None:
            yield f"{arm.name}: {match.on} {match.residual:+.3%} of the baseline's as it is"
    for claim in study.claims:
        detectable = effect_before(claim, design)
        if detectable is not None:
            yield f"{claim.id}: {design.looks[-1]} seeds detect {detectable:.3g} (80 % power, assumed s.d. {claim.assumed_sd:g})"
