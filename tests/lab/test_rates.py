"""The search for learning rates: the divergence rule, what trials say, which rates come next, and the command."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_recipe

import torchstone
from torchstone.cli.main import main
from torchstone.errors import ConfigError, StudyError
from torchstone.lab import tuning
from torchstone.lab.compare import compare
from torchstone.lab.comparison import Comparison
from torchstone.lab.progress import Quiet
from torchstone.lab.rates.bracket import Trial, bracket_of
from torchstone.lab.rates.divergence import WINDOW, DivergenceRule
from torchstone.lab.rates.find import learning_rates
from torchstone.lab.rates.finding import finding_of, sentences
from torchstone.lab.rates.search import FARTHEST, Found, Plan, next_rates
from torchstone.lab.rates.short import shortened
from torchstone.lab.rates.trials import rate_name
from torchstone.lab.runner import RunOptions
from torchstone.lab.study import Scale
from torchstone.lab.training import Variant
from torchstone.lab.tuning import grid_of
from torchstone.recipe.load import load_recipe

INLINE = RunOptions(on="inline")


def trials(losses, seeds=(0, 1, 2), noise=0.0):
    """Trials of a rule rate → loss (None: diverged), equal for all seeds but for a shift of each seed."""
    return [
        Trial(rate, seed, None if loss is None else loss + noise * seed, 7 if loss is None else None)
        for rate, loss in losses.items()
        for seed in seeds
    ]


def bowl(best, edge=math.inf):
    return lambda rate: None if rate >= edge else 3 + 0.1 * math.log2(rate / best) ** 2


def ended_at(losses):
    rule = DivergenceRule()
    return next((step for step, loss in enumerate(losses) if rule.diverged(loss)), None)


def test_a_run_that_goes_up_has_diverged_soon_after():
    falling = [7 - 0.1 * step for step in range(30)]
    assert ended_at(falling) is None
    at = ended_at(falling + [9.0] * WINDOW)
    assert at is not None and 30 + WINDOW // 2 <= at + 1 <= 30 + WINDOW // 2 + 2


@pytest.mark.parametrize("spike", [1e3, 1e9])
def test_one_bad_batch_is_no_divergence(spike):
    losses = [7 - 0.1 * step for step in range(40)]
    losses[25] = spike
    assert ended_at(losses) is None


@given(st.lists(st.floats(0, 0.4), min_size=WINDOW, max_size=60))
def test_noise_below_half_a_nat_never_ends_a_run(noise):
    assert ended_at([4 + value for value in noise]) is None


def test_a_run_that_never_learned_is_ended_when_it_gets_worse():
    assert ended_at([5.0] * 12 + [5.6] * 12) is not None
    assert ended_at([5.0] * 12 + [5.4] * 30) is None


def test_the_best_rate_of_a_parabola_is_exact_whatever_the_grid():
    grid = [2.0**power for power in range(-3, 4)]
    found = bracket_of(trials({rate: bowl(1.7)(rate) for rate in grid}, noise=0.3), tolerance=0.1)
    assert found.best_rate == pytest.approx(1.7)
    assert found.lowest == 2.0 and not found.open_low and not found.open_high
    assert found.unstable_from is None and found.stable_to == 8.0
    assert found.low < 1.7 < found.high


def test_the_bracket_ends_where_the_line_crosses_the_tolerance():
    found = bracket_of(trials({1: 4.0, 2: 3.0, 4: 3.4}), tolerance=0.1)
    assert math.log2(found.low) == pytest.approx(1 - 0.1)
    assert math.log2(found.high) == pytest.approx(1 + 0.25)


def test_intervals_come_from_paired_differences():
    found = bracket_of(trials({1: 3.5, 2: 3.0, 4: 3.2}, noise=5.0), tolerance=0.01)
    above = {one.rate: one.above for one in found.rates}
    assert above[1].effect == pytest.approx(0.5) and above[4].effect == pytest.approx(0.2)


def test_a_rate_above_an_unstable_one_is_not_recommended():
    found = bracket_of(trials({1: 3.5, 2: 3.4, 4: None, 8: 3.0}), tolerance=0.5)
    assert (found.stable_to, found.unstable_from, found.lowest) == (2, 4, 2)
    assert found.high == 2 and found.open_high


def test_one_unstable_seed_makes_a_rate_unstable():
    losses = trials({1: 3.5, 2: 3.4, 4: 3.3})
    losses[-1] = Trial(4, 2, None, 3)
    assert bracket_of(losses, 0.1).unstable_from == 4


def test_no_stable_rate_is_said_with_what_to_do():
    with pytest.raises(StudyError, match="even the lowest rate.*lower optimizer.learning_rate"):
        bracket_of(trials({1: None, 2: None}), 0.1)


@pytest.mark.parametrize(("best", "edge"), [(0.001, math.inf), (1.3, 9.0), (40.0, 64.0), (7.0, math.inf), (0.02, 0.05)])
def test_the_search_ends_near_the_best_and_at_the_edge(best, edge):
    """Simulated: whatever is asked for is answered by a bowl with a cliff."""
    rule, found = bowl(best, edge), []
    rates = [4.0**power for power in (-2, -1, 0, 1, 2)]
    for _ in range(20):
        found += trials({rate: rule(rate) for rate in rates})
        rates = next_rates(found, 1.0, 0.02)
        assert len(set(rates)) == len(rates)
        if not rates:
            break
    assert not rates
    result = bracket_of(found, 0.02)
    assert result.best_rate == pytest.approx(best, rel=0.25)
    assert result.low <= result.lowest <= result.high
    if edge < math.inf:
        assert result.stable_to < edge <= result.unstable_from <= result.stable_to * 1.5


def test_the_search_gives_up_at_the_farthest_rate():
    found, rates = [], [1.0]
    for _ in range(20):
        found += trials(dict.fromkeys(rates))
        rates = next_rates(found, 1.0, 0.02)
        if not rates:
            break
    assert not rates and min(trial.rate for trial in found) >= 1 / FARTHEST / 16


def test_names_of_rates_differ():
    rates = [4.0**power * 3e-3 * 2 ** (half / 2) for power in range(-5, 6) for half in range(4)]
    assert len({rate_name(rate) for rate in rates}) == len(rates)


def test_a_grid_has_equal_ratios_below_the_edge():
    narrow = bracket_of(trials({2.0**power: bowl(4.0)(2.0**power) for power in range(-4, 8)}), tolerance=0.05)
    grid = grid_of(narrow)
    ratios = [high / low for low, high in zip(grid, grid[1:], strict=False)]
    assert grid[0] == pytest.approx(narrow.low / 4, rel=1e-4) and grid[-1] == pytest.approx(narrow.high, rel=1e-4)
    assert ratios == pytest.approx([ratios[0]] * 4, rel=1e-4) and ratios[0] < 2.5
    flat = bracket_of(trials({4.0**power: 3 - 0.001 * power for power in range(-4, 3)} | {64.0: None}), tolerance=0.05)
    wide = grid_of(flat)
    assert [high / low for low, high in zip(wide, wide[1:], strict=False)] == pytest.approx([2.5] * 4, rel=1e-4)
    assert wide[-1] <= flat.stable_to


def test_the_bracket_says_where_it_is_open():
    flat = bracket_of(trials({1: 3.0, 2: 2.999, 4: 3.001, 8: None}), tolerance=0.05)
    assert flat.open_low and flat.open_high
    assert (flat.low, flat.high) == (1, 4)


def test_runs_that_learned_nothing_recommend_nothing(tmp_path):
    idle = [Trial(rate, seed, 6.23, None, 6.24) for rate in (1.0, 2.0, 4.0) for seed in (0, 1)]
    assert not bracket_of(idle, 0.02).told_apart
    learned = [Trial(rate, seed, 4.0 + rate / 10, None, 6.24) for rate in (1.0, 2.0, 4.0) for seed in (0, 1)]
    assert bracket_of(learned, 0.02).told_apart
    recipe = load_recipe(tiny_recipe())
    found = Found(bracket_of(idle, 0.02), tuple(idle), 10, 100, 2, 0.02)
    assert len(sentences(found)) == 1 and "too short to tell rates apart" in sentences(found)[0]
    assert "Use" not in finding_of(found, recipe).answer


def test_tuning_says_which_arm_learned_too_little(tmp_path, monkeypatch):
    def found(recipe, plan, options, progress):
        first = 6.24 if options.out.name == "baseline" else 9.0
        ended = [Trial(rate, 0, 6.23, None, first) for rate in (1.0, 2.0, 4.0)]
        return Found(bracket_of(ended, 0.02), tuple(ended), 10, 100, 1, 0.02)

    monkeypatch.setattr(tuning, "search", found)
    variants = [Variant("v1", ("model.block.mixer=differential",))]
    study = Comparison(load_recipe(tiny_recipe()), variants, None, "validation_loss", 0.0, 1)
    grids, notes = tuning.bracketed(study, Scale(1), RunOptions(on="inline", out=tmp_path), Quiet(), Plan(seeds=1))
    assert set(grids) == {"baseline", "v1"}
    assert [note.split(":")[0] for note in notes] == ["Arm baseline"]


def test_the_interval_of_the_best_rate_ends_with_what_was_tried():
    losses = {1.0: (3.0, 4.0), 2.0: (3.5, 3.5), 4.0: (4.0, 3.0)}
    found = bracket_of([Trial(rate, seed, loss[seed]) for rate, loss in losses.items() for seed in (0, 1)], 0.02)
    assert found.best_interval == (1.0, 4.0)


def test_a_real_search_reports_bracket_and_edge_and_continues(tmp_path):
    recipe = tiny_recipe(budget={"steps": 40}, optimizer={"kind": "adamw", "learning_rate": 0.05})
    given = {"options": INLINE, "progress": Quiet()}
    # start: search
    found, page = torchstone.learning_rates(recipe, steps=40, seeds=2, out=tmp_path, **given)
    bracket = found.bracket
    # the recommended rates, and among those tried the one with the lowest loss
    assert bracket.low <= bracket.lowest <= bracket.high
    # the best rate with an interval over seeds, and the edge of stability
    assert bracket.best_rate > 0 and bracket.best_interval is not None
    assert bracket.unstable_from is None or bracket.stable_to < bracket.unstable_from
    # end: search
    given |= {"steps": 40, "seeds": 2, "out": tmp_path}
    assert {trial.seed for trial in found.trials} == {2_000_000, 2_000_001}
    assert "Use a peak rate between" in page.read_text()
    finding = json.loads((tmp_path / "finding.json").read_text())
    assert finding["command"].startswith("torchstone lr recipe.yaml --steps 40 --seeds 2")
    cells = sorted(tmp_path.glob("round-*/cells/*/*/cell.json"))
    before = {path: path.stat().st_mtime_ns for path in cells}
    again, _ = learning_rates(recipe, **given)
    assert again.trials == found.trials
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.glob("round-*/cells/*/*/cell.json"))} == before


def test_a_diverging_run_ends_early_and_is_recorded(tmp_path):
    recipe = tiny_recipe(budget={"steps": 60}, optimizer={"kind": "adamw", "learning_rate": 50.0, "clip": None})
    found, _ = learning_rates(recipe, steps=60, seeds=1, out=tmp_path, options=INLINE, progress=Quiet())
    ended = [trial for trial in found.trials if not trial.stable]
    assert ended and all(0 < trial.diverged_at < 60 for trial in ended)


def test_tuning_without_a_grid_gives_every_arm_rates_of_its_own(tmp_path):
    recipe = tiny_recipe(budget={"steps": 12})
    finished = compare(recipe, ["v1:model.block.mixer=differential"], out=tmp_path, options=INLINE, progress=Quiet(),
                       seeds=2, tune_seeds=1, match="none")  # fmt: skip
    assert any("short runs of the arm" in note for note in finished.result.notes)
    rows = finished.result.tables[-1].rows
    assert [row[0] for row in rows] == ["baseline"] * 5 + ["v1"] * 5
    assert "--grid" not in finished.result.command
    assert (tmp_path / "brackets" / "v1" / "round-1").is_dir()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 0}, "at least 1 seed"),
        ({"steps": 3}, "10 steps"),
        ({"tolerance": -1.0}, "tolerance of at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        learning_rates(tiny_recipe(), out=tmp_path, options=INLINE, progress=Quiet(), **given)


def test_the_command_prints_rates_and_the_answer(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(budget={"steps": 15})))
    with pytest.raises(SystemExit) as ended:
        main(["lr", str(path), "--steps", "15", "--seeds", "1", "--on", "inline", "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "Use a peak rate between" in printed and "0.003" in printed


def test_a_schedule_in_steps_is_drawn_together():
    schedule = {"kind": "wsd-s", "cycles": [300, 1000], "warmup": 50, "decay": 100}
    short = shortened(load_recipe(tiny_recipe(budget={"steps": 1000}, schedule=schedule)), 100)
    found = short.schedule
    assert (list(found.cycles), found.warmup, found.decay, short.budget.steps) == ([30, 100], 5, 10, 100)
    assert found.build(100).checkpoints() == (30, 100)


def test_fractions_and_long_enough_runs_keep_their_schedule():
    recipe = load_recipe(tiny_recipe(budget={"steps": 50}, schedule={"kind": "cosine", "warmup": 0.1}))
    assert shortened(recipe).schedule == recipe.schedule and shortened(recipe).budget.steps == 50
    steps = load_recipe(tiny_recipe(budget={"steps": 50}, schedule={"kind": "cosine", "warmup": 30}))
    assert shortened(steps, 200).schedule == steps.schedule


def test_a_schedule_that_cannot_be_so_short_is_named(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    schedule = {"kind": "wsd-s", "cycles": list(range(10, 1001, 10)), "warmup": 0}
    path.write_text(yaml.safe_dump(tiny_recipe(budget={"steps": 1000}, schedule=schedule)))
    with pytest.raises(SystemExit) as ended:
        main(["lr", str(path), "--steps", "20", "--on", "inline", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "does not fit into a short run of 20 steps" in said and "--steps N" in said


@pytest.mark.parametrize("optimizer", ["lion", "liona", "lionar", "sgdm", "rotational"])
def test_every_optimizer_is_searched(tmp_path, optimizer):
    recipe = tiny_recipe(budget={"steps": 12}, optimizer=optimizer)
    found, _ = learning_rates(recipe, steps=12, seeds=1, out=tmp_path, options=INLINE, progress=Quiet())
    rates = [one.rate for one in found.bracket.rates]
    assert rates[0] <= found.bracket.low <= found.bracket.high <= rates[-1] and len(rates) >= 5


@pytest.mark.parametrize("mixer", ["hgrn2", "rglru", "differential", "local-attention", "moa"])
def test_every_mixer_is_searched(tmp_path, mixer):
    overrides = [f"model.block.mixer={mixer}", *(["model.block.mixer.window=4"] if mixer == "local-attention" else [])]
    recipe = tiny_recipe(budget={"steps": 12})
    found, _ = learning_rates(recipe, overrides, steps=12, seeds=1, out=tmp_path, options=INLINE, progress=Quiet())
    assert len(found.bracket.rates) >= 5
