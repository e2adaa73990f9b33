"""The study of HGRN2: arms of equal size, the control of equal cost, the rule, smoke."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchstone.errors import StudyError
from torchstone.lab.matching import counts_of
from torchstone.lab.runner import RunOptions, run_study
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.studies import _hgrn2 as shown
from torchstone.studies import hgrn2
from torchstone.studies.hgrn2 import HGRN2Study


def recipes(scale: str) -> dict[str, Recipe]:
    study = HGRN2Study()
    return {arm.name: load_recipe(arm.settings["recipe"]) for arm in study.check(study.scales[scale])}


@pytest.mark.parametrize("scale", ["smoke", "toy", "gpu"])
def test_arms_of_other_ratios_differ_in_nothing_else(scale: str) -> None:
    found = recipes(scale)
    groups = shown.equal_in_size(dict.fromkeys(found, 0))
    assert groups[0] == ["e1", "e8", "e64"] and groups[1][0] == "text.e1" and "text.e64" in groups[1]
    for names in groups:
        first = found[names[0]]
        for name in names:
            ratio = int(name.rpartition("e")[2])
            assert found[name].model.block.mixer.expand_ratio == ratio
            assert load_recipe(found[name], ["model.block.mixer.expand_ratio=1"]) == first
            assert counts_of(found[name]).parameters == counts_of(first).parameters


def test_arms_of_unequal_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hgrn2, "ratio", lambda number: f"model.block.feedforward.hidden={8 * number}")
    with pytest.raises(StudyError, match="must be equal in size"):
        HGRN2Study().arms(HGRN2Study.scales["toy"])


def test_the_control_costs_as_much_as_the_largest_state() -> None:
    found = recipes("toy")
    control, largest, smallest = (counts_of(found[name]) for name in ("e1-flops", "e64", "e1"))
    assert control.training_flops_per_token == pytest.approx(largest.training_flops_per_token, rel=0.005)
    assert control.training_flops_per_token > 1.05 * smallest.training_flops_per_token
    assert control.parameters > largest.parameters and found["e1-flops"].model.block.mixer.expand_ratio == 1
    assert found["e8-unbounded"].model.block.mixer.lower_bound == "none"
    parameters = counts_of(recipes("gpu")["text.attention"]).parameters
    assert parameters == pytest.approx(counts_of(recipes("gpu")["text.e1"]).parameters, rel=0.005)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.2, 0.3, 0.9], "holds"),
        ([0.05, 0.0, -0.3], "fails"),
        ([0.2, 0.3, 0.19], "open"),
        ([0.5, 0.5], "open"),
        ([], "open"),
    ],
)
def test_the_rule(gains: list[float], verdict: str) -> None:
    assert shown.rule(gains) == verdict


def test_smoke_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    result = run_study(HGRN2Study(), RunOptions(scale="smoke", seeds=1, out=tmp_path, on="inline")).result
    assert all(cell.status == "done" for cell in result.cells), [cell.error for cell in result.cells]
    arms = {cell.arm for cell in result.cells}
    tables = {table.title: table for table in result.tables}
    cost = {
        row[0]: dict(zip(tables["Size and cost"].columns, row, strict=True)) for row in tables["Size and cost"].rows
    }
    assert set(cost) == arms
    assert cost["e1"]["parameters"] == cost["e8"]["parameters"] == cost["e64"]["parameters"]
    state = {name: cost[name]["state bytes"] for name in ("e1", "e8", "e64")}
    assert [value - 8 for value in state.values()] == [
        4 * 64 * ratio for ratio in (1, 8, 64)
    ]  # one layer, and a document
    remembered = {row[0] for row in tables["What layers remember"].rows}
    assert remembered == arms - {"attention"}
    assert [row[0] for row in tables["The rule written beforehand"].rows] == ["e8", "e64"]
    titles = {figure.title: figure for figure in result.figures}
    assert {"Recall at equal parameters", "Memory of e8", "Memory of text.e64"} <= set(titles)
    for line in titles["Memory of e8"].lines:
        assert sum(value or 0 for value in line.y) == pytest.approx(1)
