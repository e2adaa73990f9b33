"""F13: the data changes between save and resume: refused with both fingerprints; accepted by name, it taints the run."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_recipe

from torchstone.errors import ConfigError, DataError, InterruptedRun
from torchstone.train.precision import Compute
from torchstone.train.run import train
from torchstone.train.signals import Stop


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHSTONE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n} of many, {n * n}"}) + "\n" for n in range(600)))
    return path


def recipe(rows, **changes):
    corpus = {"kind": "files", "paths": str(rows)}
    data = {"kind": "text", "corpus": corpus, "tokenizer": "bytes", "length": 32}
    return tiny_recipe(data=data, budget={"steps": 6}, **changes)


def go(recipe, directory, until=None, **options):
    """Train; with `until`, stop after that step."""
    stop = Stop()

    def watch(state):
        if state["step"] == until:
            stop.ask("the test")

    return train(recipe, directory, compute=Compute("fp32", False), progress=watch, stop=stop, **options)


def interrupted(rows, directory):
    with pytest.raises(InterruptedRun):
        go(recipe(rows), directory, until=3)
    return json.loads((directory / "run.json").read_text())["data"]


def test_f13_refused_with_both_fingerprints_and_nothing_is_changed(rows, tmp_path):
    before = interrupted(rows, tmp_path / "run")
    with open(rows, "ab") as file:
        file.write(b"\n")
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="the data changed since the run was started") as caught:
        go(recipe(rows), tmp_path / "run")
    assert before in str(caught.value) and "--allow data" in str(caught.value)
    assert len({word for word in str(caught.value).replace(",", " ").replace(".", " ").split() if len(word) == 32}) == 2
    assert caught.value.exit_code == 3
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


def test_f13_accepted_it_continues_and_is_tainted_for_good(rows, tmp_path, capsys):
    before = interrupted(rows, tmp_path / "run")
    with open(rows, "ab") as file:
        file.write(b"\n")
    with pytest.raises(InterruptedRun):
        go(recipe(rows), tmp_path / "run", until=4, allow=["data"])
    assert "the data changed within the run" in capsys.readouterr().err
    summary = go(recipe(rows), tmp_path / "run")  # accepted once; the taint stays
    after = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert after != before
    assert summary.taints == (f"the data changed within the run, from fingerprint {before} to {after}",)
    assert summary.history["train"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert go(recipe(rows), tmp_path / "run").taints == summary.taints


def test_f13_restored_data_continues_as_if_nothing_had_been(rows, tmp_path):
    interrupted(rows, tmp_path / "run")
    content = rows.read_bytes()
    rows.write_bytes(content + b"\n")
    with pytest.raises(DataError):
        go(recipe(rows), tmp_path / "run")
    rows.write_bytes(content)
    summary = go(recipe(rows), tmp_path / "run")
    assert summary.taints == ()
    whole = go(recipe(rows), tmp_path / "whole")
    assert summary.history["train"]["loss"] == whole.history["train"]["loss"]


def test_f13_allowing_the_data_does_not_allow_another_recipe(rows, tmp_path):
    interrupted(rows, tmp_path / "run")
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        go(recipe(rows, seed=1), tmp_path / "run", allow=["data"])
