"""Watching updates of a recipe: the file, the record, resuming, and training that does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_recipe

from torchstone.diagnose.updates import UpdateWatch, suggest_warmup
from torchstone.diagnose.updates.finding import finding_of, updates_finding
from torchstone.diagnose.updates.series import EarlyLate, curve, early_late, per_rate, read_updates
from torchstone.errors import ConfigError, DataError, InterruptedRun
from torchstone.recipe.load import load_recipe
from torchstone.train.loop import Callback, RunView
from torchstone.train.run import load_run, train
from torchstone.train.signals import Stop


def recipe(steps: int, **changes: Any) -> Any:
    return load_recipe(tiny_recipe(budget={"steps": steps}, schedule={"kind": "constant", "warmup": 0}, **changes))


def quiet(state: Any) -> None:
    """No progress bar."""


def trained(directory: Path, steps: int, *callbacks: Callback, **changes: Any) -> Path:
    train(recipe(steps, **changes), directory, callbacks=callbacks, progress=quiet)
    return directory


def test_records_join_the_run_and_training_does_not_notice(tmp_path: Path) -> None:
    trained(tmp_path / "plain", 12)
    trained(tmp_path / "watched", 12, UpdateWatch(every=4))
    plain, watched = (load_run(tmp_path / name)[1] for name in ("plain", "watched"))
    for left, right in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(left, right)
    records = read_updates(tmp_path / "watched")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 9]
    lines = [json.loads(line) for line in (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines()]
    with_numbers = {line["step"]: line for line in lines if "updates/angle" in line}
    assert list(with_numbers) == [1, 2, 3, 4, 5, 9]
    assert with_numbers[9]["updates/angle"] == records[-1]["angle"]
    assert with_numbers[9]["updates/critical_batch"] == pytest.approx(4 / records[-1]["snr"], rel=1e-4)
    named = {name for name, value in watched.named_parameters() if value.dim() > 1}
    assert set(records[-1]["matrices"]) == named
    assert all("rrc" in found for name, found in records[-1]["matrices"].items() if name.startswith("blocks"))


class StopAt(Callback):
    """Asks a run to stop after a step."""

    def __init__(self, step: int, stop: Stop) -> None:
        self.step, self.stop = step, stop

    def on_step(self, view: RunView) -> None:
        """Stop there."""
        if view.position.step == self.step:
            self.stop.ask("test")


def test_a_resumed_run_continues_the_file_at_the_same_steps(tmp_path: Path) -> None:
    whole = read_updates(trained(tmp_path / "whole", 12, UpdateWatch(every=2, early=1)))
    stop = Stop()
    with pytest.raises(InterruptedRun):
        train(
            recipe(12),
            tmp_path / "cut",
            callbacks=[UpdateWatch(every=2, early=1), StopAt(6, stop)],
            progress=quiet,
            stop=stop,
        )
    parts = read_updates(trained(tmp_path / "cut", 12, UpdateWatch(every=2, early=1)))
    assert [record["step"] for record in parts] == [1, 3, 5, 7, 9, 11]
    for one, other in zip(whole, parts, strict=True):
        for name in ("l2", "relative", "angle", "rrc"):
            assert one[name] == other[name]
    assert parts[-1]["snr"] == pytest.approx(whole[-1]["snr"], rel=1.0, abs=0.2)  # its averages began anew at step 7


def test_a_compiled_model_is_run_on_rows_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchstone.train.precision import Compute

    monkeypatch.setattr(Compute, "wrap", lambda self, module: module)  # what compiling changes here is who sees hooks
    plain = read_updates(trained(tmp_path / "plain", 3, UpdateWatch(every=1)))
    compiled = read_updates(trained(tmp_path / "compiled", 3, UpdateWatch(every=1), compile=True))
    assert [record["rrc"] for record in compiled] == pytest.approx([record["rrc"] for record in plain], rel=1e-4)


def rows(angles: list[float], rates: list[float] | None = None, first: int = 1, every: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "step": first + every * i,
            "rate": 1.0 if rates is None else rates[i],
            "angle": angle,
            "matrices": {"w": {"angle": angle}},
        }
        for i, angle in enumerate(angles)
    ]


def test_early_and_late_are_medians_of_their_steps() -> None:
    steps, values = list(range(1, 101)), [9.0, 1.0, 8.0, 2.0, 7.0] + [5.0] * 45 + [3.0] * 31 + [100.0] * 19
    assert early_late(steps, values) == EarlyLate(7.0, 3.0)
    assert early_late(steps, values).ratio == pytest.approx(7 / 3)
    assert early_late(steps[10:], values[10:]) is None and early_late([], []) is None
    assert EarlyLate(1.0, 0.0).ratio is None


def test_curves_leave_out_what_is_missing() -> None:
    records = rows([1.0, 2.0])
    records[0]["matrices"] = {}
    assert curve(records, "angle") == ([1, 2], [1.0, 2.0])
    assert curve(records, "angle", "w") == ([2], [2.0]) and curve(records, "snr") == ([], [])
    assert per_rate(rows([1.0, 2.0, 0.0], [0.5, 1.0, 0.0]), "angle") == ([1, 2], [2.0, 2.0])


def test_a_file_without_records_is_refused_and_repeated_steps_count_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; train with an UpdateWatch"):
        read_updates(tmp_path)
    path = tmp_path / "updates.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="holds no record of updates"):
        read_updates(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows([1.0, 2.0, 3.0]), *rows([5.0], first=2)]))
    assert curve(read_updates(tmp_path), "angle") == ([1, 2, 3], [1.0, 5.0, 3.0])
    assert curve(read_updates(tmp_path, last=2), "angle") == ([1, 2], [1.0, 5.0])


def test_warmup_lasts_until_the_ratio_stays_below_the_threshold() -> None:
    angles = [8.0] * 5 + [4.0] * 10 + [1.4] * 5 + [1.6] + [1.0] * 79
    advice = suggest_warmup(rows(angles))
    assert (advice.steps, advice.ratio, advice.steady, advice.looked_at) == (21, 8.0, 1.0, 100)
    assert "a warmup of 21 steps" in advice.describe()
    assert suggest_warmup(rows(angles), threshold=2.0).steps == 15
    assert suggest_warmup(rows(angles), threshold=10.0).steps == 0
    assert "no warmup" in suggest_warmup(rows([1.0] * 30)).describe()


def test_sparse_records_name_the_step_before_the_first_small_one() -> None:
    steps = [*range(1, 6), *range(11, 402, 10)]
    records = [
        row | {"step": step} for step, row in zip(steps, rows([3.0 if s < 35 else 1.0 for s in steps]), strict=True)
    ]
    assert suggest_warmup(records).steps == 40


def test_records_of_other_rates_are_left_out() -> None:
    angles, rates = [5.0] * 5 + [1.0] * 95 + [0.1] * 100, [1.0] * 100 + [0.1] * 100
    assert suggest_warmup(rows(angles, rates)).looked_at == 100
    with pytest.raises(DataError, match="the rate changes after step 1.*measure a run without warmup"):
        suggest_warmup(rows(angles, [i / 200 for i in range(1, 201)]))
    with pytest.raises(DataError, match="0 records of angles"):
        suggest_warmup([])


def test_updates_that_have_not_settled_ask_for_more_steps() -> None:
    with pytest.raises(ConfigError, match="still .* times as large at step 49 of 100.*200 for example"):
        suggest_warmup(rows([10.0] * 49 + [1.0] * 51))
    with pytest.raises(ConfigError, match="ratio above 1"):
        suggest_warmup(rows([1.0] * 30), threshold=1.0)


def test_a_recipe_is_probed_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = recipe(3, optimizer={"kind": "adamw", "learning_rate": 3e-3})
    advice = suggest_warmup(asked, steps=60)
    assert advice.ratio > 1.5 and 0 < advice.steps < 30 and list(advice.curve) == list(range(1, 61))
    assert not list(tmp_path.iterdir())
    train(recipe(60, optimizer={"kind": "adamw", "learning_rate": 3e-3}), tmp_path / "run",
          callbacks=[UpdateWatch(every=1, metrics=("angle",))], progress=quiet)  # fmt: skip
    assert suggest_warmup(tmp_path / "run") == advice
    with pytest.raises(ConfigError, match="at least 20 steps"):
        suggest_warmup(asked, steps=5)


def test_the_finding_lays_one_run_over_another(tmp_path: Path) -> None:
    from torchstone.diagnose.adapters import open_subject

    none = trained(tmp_path / "none", 40, UpdateWatch(every=2))
    warm = tmp_path / "warm"
    train(load_recipe(recipe(40), ["schedule.warmup=20"]), warm, callbacks=[UpdateWatch(every=2)], progress=quiet)
    found = updates_finding(open_subject(none), against=warm)
    assert "Early over late updates of this run: l2 norm" in found.answer and "of warm: l2 norm" in found.answer
    table = {(row[0], row[1]): row[2:] for row in found.tables[0].rows}
    none_angle, warm_angle = table["angle", "this run"], table["angle", "warm"]
    assert none_angle[2] > 1 > warm_angle[2]  # early over late
    assert warm_angle[3] > warm_angle[2] and none_angle[3] == pytest.approx(none_angle[2], rel=1e-3)
    figures = {figure.title: figure for figure in found.figures}
    assert {"Angle by step", "Relative representation change by step", "Critical batch size by step"} <= set(figures)
    assert [line.name for line in figures["Angle by step"].lines] == ["this run", "warm"]
    assert {row[0] for row in found.tables[1].rows} == set(read_updates(none)[0]["matrices"])
    alone = finding_of(read_updates(none), "a run")
    assert [line.name for figure in alone.figures for line in figure.lines] == ["this run"] * len(alone.figures)
    assert "No warmup can be suggested" in finding_of(read_updates(warm), "a run").answer
