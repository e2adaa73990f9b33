"""Watching a run: the numbers join the record, training does not notice, and the cost stays bounded."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_recipe

from torchstone.diagnose import watch
from torchstone.diagnose.watch import WATCHES, Watch
from torchstone.errors import ConfigError
from torchstone.recipe.load import load_recipe
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
    return SimpleNamespace(recipe=recipe(), position=position)


def test_a_watch_waits_until_it_can_afford_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def look(self: Watch, view: Any) -> dict[str, float]:
        looks.append(view.position.step)
        time.sleep(0.02)
        return {"anisotropy/final": 1.0}

    monkeypatch.setattr(watch.Watch, "_look", look)
    watching = Watch(["anisotropy"], share=0.01)
    assert watching.on_evaluation(view(1, 0.0)) == {"anisotropy/final": 1.0}  # nothing is known of its cost yet
    assert watching.on_evaluation(view(2, 2.0)) == {}  # 0.02 s spent and as much again would be 2 % of 2 s
    assert watching.on_evaluation(view(2, 60.0)) == {"anisotropy/final": 1.0}
    assert watching.on_evaluation(view(3, 0.1)) == {"anisotropy/final": 1.0}  # the last one of the run
    assert looks == [1, 2, 3]


@pytest.mark.parametrize(("names", "share", "message"), [
    (["anisotropie"], 0.01, "Did you mean anisotropy"), ([], 0.01, "needs analyses"), (["anisotropy"], 0.0, "share"),
])  # fmt: skip
def test_what_cannot_be_watched_is_explained(names: list[str], share: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Watch(names, share)
