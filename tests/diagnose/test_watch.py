"""Watching a run: the numbers join the record, training does not notice, and the cost stays bounded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from tiny import tiny_recipe

from torchstone.cli.train import train as command
from torchstone.diagnose import watch
from torchstone.diagnose.watch import WATCHES, Watch
from torchstone.errors import ConfigError, DataError
from torchstone.recipe.load import load_recipe
from torchstone.train.loop import Trainer
from torchstone.train.run import load_run, train


def records(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "validation"]


def recipe(**changes: Any) -> Any:
    return load_recipe(tiny_recipe(evaluation={"every": 1, "sequences": 8}, **changes))


def test_numbers_of_every_analysis_join_the_record_and_training_does_not_notice(tmp_path: Path) -> None:
    train(recipe(), tmp_path / "plain")
    train(recipe(), tmp_path / "watched", callbacks=[Watch(list(WATCHES), share=1.0)])
    last = records(tmp_path / "watched")[-1]
    assert {name.partition("/")[0] for name in last if "/" in name} == set(WATCHES)
    assert all(isinstance(value, float) for name, value in last.items() if "/" in name)
    plain, watched = (load_run(tmp_path / name)[1] for name in ("plain", "watched"))
    for left, right in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_numbers_are_those_of_the_analysis(tmp_path: Path) -> None:
    from torchstone.diagnose.bottleneck.head_spectrum import spectrum
    from torchstone.diagnose.ranks.decoder_rank import rank_metrics

    train(recipe(), tmp_path / "run", callbacks=[Watch(["attention-rank", "head-spectrum"], share=1.0)])
    model, last = load_run(tmp_path / "run")[1], records(tmp_path / "run")[-1]
    for name, value in rank_metrics(model).items():
        assert last[f"attention-rank/{name}"] == pytest.approx(value, rel=1e-6)
    assert last["head-spectrum/entropy"] == pytest.approx(spectrum(model.head.weight_vd.detach()).entropy, rel=1e-6)


def view(step: int, seconds: float) -> Any:
    position = SimpleNamespace(step=step, seconds=seconds)
    return SimpleNamespace(recipe=recipe(budget={"steps": 9}), position=position)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time; a look of a patched watch takes 0.5 s of it."""
    now = [0.0]

    def look(self: Watch, view: Any, failed: Any = None) -> dict[str, float]:
        now[0] += 0.5
        return {"anisotropy/final": 1.0}

    monkeypatch.setattr(watch.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Watch, "_look", look)
    return now


def test_all_looks_but_the_last_are_paid_by_the_time_of_training(clock: list[float]) -> None:
    watching = Watch(["anisotropy"], share=0.01)
    watching.on_start(view(0, 0.0))
    assert clock[0] == 0.5
    looks = [seconds for seconds in range(0, 400, 10) if watching.on_evaluation(view(1, float(seconds)))]
    assert looks == [100, 150, 200, 250, 300, 350]  # 0.5 s of every 50 s, the look before the first step included
    assert watching.spent <= 0.01 * 350
    assert watching.on_evaluation(view(9, 351.0))  # the last one of the run


def test_a_run_that_continues_pays_for_its_own_looks_only(clock: list[float]) -> None:
    watching = Watch(["anisotropy"], share=0.01)
    watching.on_start(view(3, 1000.0))
    assert not watching.on_evaluation(view(4, 1099.0)) and watching.on_evaluation(view(5, 1100.0))


def test_a_look_that_becomes_dear_is_waited_for(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watch(["anisotropy"], share=0.01)
    watching.on_start(view(0, 0.0))
    plain = Watch._look
    monkeypatch.setattr(Watch, "_look", lambda *given: clock.__setitem__(0, clock[0] + 4.5) or plain(*given))
    assert watching.on_evaluation(view(1, 100.0)) and watching.spent == 5.5
    assert not watching.on_evaluation(view(2, 1000.0)) and watching.on_evaluation(view(3, 1050.0))


def never(*given: Any) -> None:
    raise AssertionError("a step was taken")


@pytest.mark.parametrize(("analysis", "changes", "error", "message"), [
    ("rope-usage", {"position": "alibi"}, ConfigError, "no rotary module found"),
    ("positional-heads", {"position": "alibi"}, ConfigError, "no rotary positions"),
    ("positional-heads", {"kind": "differential"}, ConfigError, "subtracts 2 attention maps"),
])  # fmt: skip
def test_an_analysis_that_does_not_fit_is_refused_before_the_first_step(
    analysis: str, changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    plain = recipe()
    model = plain.data_dict()["model"]
    model["block"]["mixer"] = {"kind": "attention", **changes}
    monkeypatch.setattr(Trainer, "step", never)
    with pytest.raises(error, match=message):
        train(recipe(model=model), tmp_path / "run", callbacks=[Watch([analysis])])


def test_rows_that_are_too_short_are_refused_before_the_first_step(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Trainer, "step", never)
    monkeypatch.setattr(watch, "MOST_TOKENS", 6)
    for analysis in ("rope-usage", "positional-heads"):
        with pytest.raises(DataError, match="6 tokens"):
            train(recipe(), tmp_path / analysis, callbacks=[Watch([analysis])])


@pytest.mark.parametrize("error", [DataError("rows are odd"), torch.linalg.LinAlgError("did not converge")])
def test_an_analysis_that_fails_later_is_left_out_with_a_warning(
    error: Exception, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def failing(subject: Any, tokens_bt: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) > 1:
            raise error
        return {"x": 1.0}

    monkeypatch.setitem(WATCHES, "anisotropy", failing)
    train(recipe(), tmp_path / "run", callbacks=[Watch(["anisotropy", "head-spectrum"])])
    last = records(tmp_path / "run")[-1]
    assert "head-spectrum/entropy" in last and "anisotropy/x" not in last
    assert f"warning: watch: anisotropy after step 3 failed and is left out: {error}" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_reported(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(WATCHES, "anisotropy", lambda subject, tokens_bt: {"x": math.nan, "y": 1.0, "z": math.inf})
    train(recipe(), tmp_path / "run", callbacks=[Watch(["anisotropy"])])
    last = records(tmp_path / "run")[-1]
    assert {name for name in last if "/" in name} == {"anisotropy/y"}
    said = "warning: watch: anisotropy/x is nan, anisotropy/z is inf after step 3 and is left out"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("shift", "largest", "mean"), [
    ([math.nan, -0.5, -0.1], -0.1, -0.3), ([math.nan], math.nan, math.nan),
])  # fmt: skip
def test_heads_without_a_score_do_not_count(
    shift: list[float], largest: float, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SimpleNamespace(column=lambda name: torch.tensor(shift, dtype=torch.float64))
    monkeypatch.setattr("torchstone.diagnose.distance.heads.distance_heads", lambda *given: table)
    found = watch.positional_heads_numbers(SimpleNamespace(), torch.zeros(1, 1))
    wanted = {"largest_shift": largest, "mean_shift": mean, "mean_distance": mean}
    assert found == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize(("names", "share", "message"), [
    (["anisotropie"], 0.01, "Did you mean anisotropy"), (["layer-gradients"], 0.01, "cannot be watched"),
    ([], 0.01, "needs analyses"), (["anisotropy"], 0.0, "share"),
])  # fmt: skip
def test_what_cannot_be_watched_is_explained(names: list[str], share: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Watch(names, share)


def test_the_command_lists_what_can_be_watched_and_what_cannot() -> None:
    help = get_type_hints(command, include_extras=True)["watch"].__metadata__[0].help
    listed = help.partition("Analysis whose numbers join the validation record: ")[2].partition(" (")[0]
    assert set(listed.replace(" or ", ", ").split(", ")) == set(WATCHES)
    assert "(layer-gradients cannot be watched)" in help
    assert "at most about 1 % of the training time, beyond one look before the first step and one at the end" in help
