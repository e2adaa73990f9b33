"""The study of JetMoE: arms of equal cost, controls that are what they say, loads of trained cells, smoke."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from torchstone.lab.matching import counts_of
from torchstone.lab.runner import RunOptions, run_study
from torchstone.nn.experts.load import RouterLoad
from torchstone.recipe.load import load_recipe
from torchstone.studies import _jetmoe as detail
from torchstone.studies._jetmoe_phases import SHARES
from torchstone.studies.jetmoe import JetMoE

EXPERTS = ("dense", "smoe", "smoe-moa", "smoe-moa-free")
PHASES = ("phases.uniform", "phases.decay", "phases.cosine")
LARGE = ("smoe-moa-k1", "smoe-moa-k4", "dense-total")


def recipes(scale: str) -> dict[str, Any]:
    study = JetMoE()
    return {arm.name: load_recipe(arm.settings["recipe"]) for arm in study.check(study.scales[scale])}


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_experts_cost_what_the_dense_model_costs_and_hold_more(scale: str) -> None:
    found = {name: counts_of(recipe) for name, recipe in recipes(scale).items()}
    dense = found["dense"]
    for name in set(found) - {"dense", "dense-total", *PHASES}:
        assert found[name].training_flops_per_token == pytest.approx(dense.training_flops_per_token, rel=0.005), name
        assert found[name].active_parameters == pytest.approx(dense.active_parameters, rel=0.02), name
        assert found[name].parameters > 1.5 * dense.parameters, name


def test_the_dense_control_of_the_gpu_scale_has_as_many_parameters() -> None:
    found = recipes("gpu")
    total, sparse = found["dense-total"], found["smoe-moa"]
    assert counts_of(total).parameters == pytest.approx(counts_of(sparse).parameters, rel=0.005)
    assert (total.model.block.feedforward.kind, total.model.block.mixer.kind) == ("swiglu", "attention")
    assert counts_of(total).training_flops_per_token > 2 * counts_of(sparse).training_flops_per_token


def test_arms_are_what_their_names_say() -> None:
    assert tuple(recipes("toy")) == EXPERTS + PHASES
    found = recipes("gpu")
    assert tuple(found) == EXPERTS + LARGE + PHASES
    blocks = {name: recipe.model.block for name, recipe in found.items()}
    kinds = {name: (block.feedforward.kind, block.mixer.kind) for name, block in blocks.items()}
    assert kinds["dense"] == kinds["phases.decay"] == ("swiglu", "attention")
    assert kinds["smoe"] == ("smoe", "attention")
    assert {name for name, kind in kinds.items() if kind == ("smoe", "moa")} == {
        "smoe-moa", "smoe-moa-free", "smoe-moa-k1", "smoe-moa-k4",
    }  # fmt: skip
    for name, block in blocks.items():
        for part in (block.feedforward, block.mixer):
            if hasattr(part, "top_k"):
                assert part.top_k == {"smoe-moa-k1": 1, "smoe-moa-k4": 4}.get(name, 2)
                assert (part.balance_coef, part.z_coef) == ((0, 0) if name == "smoe-moa-free" else (0.01, 0.001))
    heads = {name: block.mixer.kv_heads * getattr(block.mixer, "top_k", 2) for name, block in blocks.items()}
    assert set(heads.values()) == {8}  # query heads: as many in every arm


def test_every_part_of_the_data_is_taken_by_all_arms_alike() -> None:
    found = recipes("toy")
    assert len({str(found[name].data) for name in EXPERTS}) == 1
    assert len({str(found[name].data) for name in PHASES}) == 1
    assert found["phases.uniform"].data.shares == list(SHARES)


def test_metrics_of_load_are_means_over_routers() -> None:
    loads = [
        RouterLoad(
            "blocks.0.mixer", torch.tensor([[4.0, 4.0, 0.0, 0.0]]).double(), torch.ones(4), 2, 4 * math.log(2), 4
        ),
        RouterLoad(
            "blocks.0.feedforward", torch.tensor([[2.0, 2.0, 3.0, 1.0]]).double(), torch.ones(4), 2, 4 * math.log(4), 4
        ),
    ]
    assert detail.load_metrics(loads) == pytest.approx(
        {"load_max": 1.75, "load_min": 0.25, "router_entropy": 0.75, "dead_experts": 2.0}
    )


def test_smoke_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    result = run_study(JetMoE(), RunOptions(scale="smoke", seeds=1, out=tmp_path, on="inline")).result
    assert all(cell.status == "done" for cell in result.cells), [cell.error for cell in result.cells]
    cells = {cell.arm: cell for cell in result.cells}
    assert {"load_max", "load_min", "router_entropy", "dead_experts"} <= set(cells["smoe-moa"].metrics)
    assert "load_max" not in cells["dense"].metrics and "target_loss" in cells["phases.decay"].metrics
    assert cells["smoe-moa"].metrics["load_max"] >= 1 >= cells["smoe-moa"].metrics["load_min"]
    assert {"router entropy", "largest load", "validation loss"} <= set(cells["smoe"].series)
    table: Any = next(table for table in result.tables if table.title == "Size, cost and load")
    assert [row[0] for row in table.rows] == list(EXPERTS)
    total, active = table.columns.index("parameters"), table.columns.index("active parameters")
    assert table.rows[0][total] == table.rows[0][active] and table.rows[2][total] > table.rows[2][active]
    assert {"Router entropy", "Largest load"} <= {figure.title for figure in result.figures}
