"""The study of TokenFormer: equal FLOPs, equal parameters, growth into the large arms, curves over all FLOPs, smoke."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from torchstone.errors import DataError
from torchstone.lab.matching import counts_of, training_flops
from torchstone.lab.runner import RunOptions, run_study
from torchstone.lab.study import Arm, Cell, Measurement
from torchstone.lab.training import STREAM
from torchstone.recipe.load import load_recipe
from torchstone.studies import _tokenformer as parts
from torchstone.studies.tokenformer import TokenFormer

GROWN = (*parts.CHOICES, "mlp-grown")


def arms(scale: str) -> dict[str, Arm]:
    study = TokenFormer()
    return {arm.name: arm for arm in study.check(study.scales[scale])}


def all_flops(arm: Arm) -> float:
    """Training FLOPs over the arm's whole history."""
    recipe = load_recipe(arm.settings["recipe"])
    if "growth" not in arm.settings:
        return training_flops(recipe)
    step, after = arm.settings["growth"]["step"], load_recipe(parts.as_it_ends(arm).settings["recipe"])
    tokens = recipe.batch.sequences * recipe.data.sequence_length()
    first, then = (counts_of(one).training_flops_per_token for one in (recipe, after))
    return tokens * (step * first + (recipe.budget.steps - step) * then)


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_arms_that_are_compared_cost_the_same(scale: str) -> None:
    found = {name: all_flops(arm) for name, arm in arms(scale).items()}
    for name in (*GROWN, "small", "mlp-large"):
        assert found[name] == pytest.approx(found["large"], rel=0.005), name
    counts = {name: counts_of(load_recipe(arm.settings["recipe"])) for name, arm in arms(scale).items()}
    equal = {name: count for name, count in counts.items() if name.startswith("equal")}
    assert set(equal) >= {"equal", "equal.softmax", "equal.softmax-bare"}
    assert {count.parameters for count in equal.values()} == {counts["transformer"].parameters}
    assert {count.training_flops_per_token for count in equal.values()} == {
        counts["transformer"].training_flops_per_token
    }


def test_arms_that_grow_end_as_large_as_the_large_ones() -> None:
    study, found = TokenFormer(), arms("toy")
    records = {name: study.arm_record(arm) for name, arm in found.items()}
    assert {records[name].parameters for name in parts.CHOICES} == {records["large"].parameters}
    assert records["mlp-grown"].parameters == records["mlp-large"].parameters == records["large"].parameters
    assert records["small"].parameters < records["large"].parameters  # type: ignore[operator]


def test_arms_are_what_their_names_say() -> None:
    found = arms("gpu")
    growth = {name: arm.settings["growth"] for name, arm in found.items() if "growth" in arm.settings}
    assert {name: (one["keys"], one["tau"]) for name, one in growth.items() if "keys" in one} == parts.CHOICES
    modes = {
        name: load_recipe(arm.settings["recipe"]).model.block.feedforward  # type: ignore[attr-defined]
        for name, arm in found.items()
        if name.startswith("equal")
    }
    assert {name: (mode.norm_mode, mode.tau) for name, mode in modes.items()} == {
        "equal": ("l2-norm-gelu", None), "equal.softmax": ("softmax", None), "equal.softmax-bare": ("softmax", 1.0),
        "equal.gelu-l2-norm": ("gelu-l2-norm", None), "equal.none": ("none", None),
    }  # fmt: skip


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    study = TokenFormer()
    arm = arms("smoke")["zero-fixed"]
    prepared = study.prepare([arm, arms("smoke")["large"]], {}, tmp_path)
    return Cell(arm, 0, "smoke", study.scales["smoke"].settings, tmp_path / "cell", prepared)


def test_a_cell_grows_on_the_way_and_goes_on_where_it_was(cell: Cell) -> None:
    cell.directory.mkdir()
    study, step = TokenFormer(), cell.arm.settings["growth"]["step"]
    first = study.measure(cell)
    assert first.metrics["logit_change"] < 1e-5 and abs(first.metrics["jump"]) < 1e-5
    recipe = load_recipe(cell.directory / "run" / "recipe.yaml")
    large = load_recipe(parts.as_it_ends(cell.arm).settings["recipe"])
    assert counts_of(recipe).parameters == counts_of(large).parameters
    assert first.flops == pytest.approx(all_flops(cell.arm))
    curve = first.series[parts.CURVE]
    assert curve.axes["flops"][-1] == first.flops and list(curve.axes["flops"]) == sorted(curve.axes["flops"])
    at_growth = [n for n, at in enumerate(curve.axes["steps"]) if at == step]
    assert len(at_growth) == 2 and curve.axes["flops"][at_growth[0]] == curve.axes["flops"][at_growth[1]]
    shutil.rmtree(cell.directory / "run")  # a cell that died between the two stages
    assert plain(study.measure(cell)) == plain(first)


def plain(measurement: Measurement) -> tuple[object, ...]:
    return dict(measurement.metrics), measurement.series, measurement.extra, measurement.flops


def test_smoke_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    result = run_study(TokenFormer(), RunOptions(scale="smoke", seeds=1, out=tmp_path, on="inline")).result
    assert all(cell.status == "done" for cell in result.cells), [cell.error for cell in result.cells]
    cells = {cell.arm: cell.metrics for cell in result.cells}
    assert {"validation_loss", "jump", "logit_change", "new_usage"} <= set(cells["random-following"])
    assert "new_usage" not in cells["mlp-grown"] and "jump" not in cells["large"]
    assert cells["mlp-grown"]["logit_change"] < 1e-5 < cells["random-following"]["logit_change"]
    tables = {table.title: table for table in result.tables}
    assert {row[0] for row in tables["Growth at once and at the end"].rows} == set(GROWN)
    assert {row[:2] for row in tables["Use of parameter tokens"].rows} == {
        (arm, which) for arm in parts.CHOICES for which in ("old", "new")
    }
    (figure,) = result.figures
    assert {line.name for line in figure.lines} == set(cells)


def test_arms_that_grow_take_their_own_stream_and_refuse_changed_data(cell: Cell) -> None:
    cell.directory.mkdir()
    arm = dataclasses.replace(cell.arm, settings={**cell.arm.settings, "stream": 1})
    TokenFormer().measure(dataclasses.replace(cell, arm=arm, seed=2))
    seeds = {load_recipe(cell.directory / name / "recipe.yaml").seed for name in ("small", "run")}
    assert seeds == {2 + STREAM}
    changed = {**cell.prepared, "data": {**cell.prepared["data"], cell.arm.name: "another"}}
    other = dataclasses.replace(cell, prepared=changed, directory=cell.directory / "other")
    with pytest.raises(DataError, match="the data of arm zero-fixed changed since the study was prepared.*another"):
        TokenFormer().measure(other)
    assert not other.directory.exists()
