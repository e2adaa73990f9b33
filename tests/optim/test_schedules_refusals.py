"""Settings and states that make no schedule are refused with errors of this package, and large plans are made in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchstone.errors import CheckpointError, ConfigError
from torchstone.kinds import KINDS
from torchstone.optim.schedules.base import Schedule, step_count
from torchstone.optim.schedules.cycles import amount_steps
from torchstone.optim.schedules.shapes import OF_SHARE
from torchstone.optim.schedules.warmup_then import ConstantConfig, CosineConfig
from torchstone.optim.schedules.wsd_s import WSDSConfig
from torchstone.recipe.load import load_recipe
from torchstone.recipe.registry import part_class
from torchstone.train.plan import plan_of


@pytest.mark.parametrize("kind", KINDS["schedule"])
def test_no_step_before_the_first_and_no_run_without_steps(kind: str) -> None:
    chosen: Any = part_class("schedule", kind)
    config = chosen()
    assert config.build(100).factor(0) >= 0
    with pytest.raises(ConfigError, match="there is no step -5; the first one is 0"):
        config.build(100).factor(-5)
    for steps in (0, -3, 10.5, True, "10"):
        with pytest.raises(ConfigError, match="give a whole number of steps, 1 or more"):
            config.build(steps)


@pytest.mark.parametrize("peak", [-1.0, float("nan"), float("inf")])
def test_a_peak_is_a_finite_rate(peak: float) -> None:
    with pytest.raises(ConfigError, match="is no rate"):
        CosineConfig().build(100, peak=peak)


@pytest.mark.parametrize("amount", [amount_steps, step_count])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_an_amount_is_finite(amount: Callable[[float, int, str], int], value: float) -> None:
    with pytest.raises(ConfigError, match="warmup .* is neither a fraction nor a number of steps"):
        amount(value, 100, "warmup")


@pytest.mark.parametrize(
    "wrong", [{"steps": "100"}, {"warmup": None}, {"shape": "steep"}, {"final": [0.1]}, {"peak": "1"}]
)
def test_a_state_with_values_of_other_types_is_refused(wrong: dict[str, Any]) -> None:
    state = CosineConfig().build(100, peak=1.0).state_dict()
    assert Schedule.from_state_dict(state) == CosineConfig().build(100, peak=1.0)
    with pytest.raises(CheckpointError, match=f"WarmupThen has {next(iter(wrong))}="):
        Schedule.from_state_dict({**state, **wrong})


def test_a_plot_needs_the_path_of_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "plan.svg"):
        with pytest.raises(ConfigError, match="cannot be written"):
            CosineConfig().build(10).plot(path)


def test_rates_that_differ_by_rounding_are_no_change() -> None:
    one, other = WSDSConfig(warmup=0, decay=7, shape="linear", final=0.1), WSDSConfig(warmup=0, decay=7, shape="linear")
    assert one.build(10).first_change(other.build(10), 10) is None
    nearly = WSDSConfig(warmup=0, decay=7, shape="linear", final=0.1 + 1e-14)
    assert one.build(10).factor(9) != nearly.build(10).factor(9)
    assert one.build(10).first_change(nearly.build(10), 10) is None
    falls = CosineConfig(warmup=0).build(10)
    assert ConstantConfig(warmup=0).build(10).first_change(falls, 10) == 1
    assert ConstantConfig(warmup=0).build(10).first_change(falls, 10, since=4) == 4


def test_shapes_by_share_end_at_the_floor() -> None:
    assert all(shape(1.0, 0.25) == pytest.approx(0.25) and shape(0.0, 0.25) == 1 for shape in OF_SHARE.values())


def test_a_plan_of_a_hundred_thousand_cycles_takes_seconds() -> None:
    settings = ["schedule={kind: wsd-s, cycle_length: 10, warmup: 2, decay: 3}", "budget.steps=1000000"]
    recipe = load_recipe(
        {"model": {"kind": "decoder", "width": 16, "depth": 1, "head_dim": 8}, "data": "recall"}, settings
    )
    begun = time.process_time()
    plan = plan_of(recipe)
    assert time.process_time() - begun < 10  # about one second; quadratic work takes hours
    last = plan.served[-1]
    assert (len(plan.served), last.step, last.warmup) == (100_000, 1_000_000, 2)
    assert (last.decay, last.earlier_decays, last.stable) == (300_000, 299_997, 699_998)
