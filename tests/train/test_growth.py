"""Growing a run: what it leaves, that training continues it and resumes exactly, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_recipe

from torchstone.errors import BudgetError, CheckpointError, ConfigError, DataError, InterruptedRun
from torchstone.recipe.fingerprint import fingerprint
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Budget
from torchstone.train.budget import counts_of, tokens_per_step
from torchstone.train.checkpoint import CheckpointStore, Snapshot
from torchstone.train.growth import AppendTokens, AppendUnits, grow_run
from torchstone.train.loop import Callback, RunView
from torchstone.train.record import read_record
from torchstone.train.run import RunSummary, load_run, train
from torchstone.train.signals import Stop

STEPS, TOTAL = 6, 14


def recipe(projection: str = "pattention", feedforward: Any = "pattention", **changes: Any) -> dict[str, Any]:
    plain = tiny_recipe(schedule={"kind": "cosine"}, budget={"steps": TOTAL}, **changes)
    block = {"mixer": "attention", "feedforward": feedforward, "norm": "layernorm", "projection": projection}
    return plain | {"model": {**plain["model"], "block": block}}


class StopAt(Callback):
    """Asks for a stop after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.stop = step, Stop()

    def on_step(self, view: RunView) -> None:
        if view.position.step == self.step:
            self.stop.ask("the test")


def run(given: Mapping[str, Any] | Path, directory: Path, until: int | None = None) -> RunSummary | None:
    """The finished run, or None after a stop at step `until`."""
    if until is None:
        return train(given, directory, progress=lambda state: None)
    halt = StopAt(until)
    with pytest.raises(InterruptedRun):
        train(given, directory, progress=lambda state: None, callbacks=[halt], stop=halt.stop)
    return None


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small model, stopped after `STEPS` of `TOTAL` steps."""
    directory = tmp_path_factory.mktemp("growth") / "small"
    run(recipe(), directory, until=STEPS)
    return directory


def losses(directory: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = [record.get("record", record) for record in records]
    return {record["step"]: record["loss"] for record in found if record.get("kind") == "train"}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_run(directory)[1].state_dict())


def test_a_grown_run_is_a_run_of_its_own(small: Path, tmp_path: Path) -> None:
    report = grow_run(small, tmp_path / "grown", AppendTokens(2))
    assert {item.name for item in (tmp_path / "grown").iterdir()} == {
        "recipe.yaml", "run.json", "growth.json", "checkpoints",
    }  # fmt: skip
    assert report.change < 1e-6 and report.optimizer_carried
    before, after = load_recipe(small / "recipe.yaml"), load_recipe(tmp_path / "grown" / "recipe.yaml")
    assert after.model.block.projection.input_tokens == 64 and after.model.block.feedforward.tokens == 256  # type: ignore[attr-defined]
    assert after.model_copy(update={"model": before.model}) == before
    record, origin = read_record(tmp_path / "grown"), read_record(small)
    assert record.id != origin.id and record.compute == origin.compute and record.resumes == []
    assert record.fingerprint == fingerprint(after, data=record.data) != origin.fingerprint
    lineage = json.loads((tmp_path / "grown" / "growth.json").read_text())
    flops = STEPS * 4 * before.data.sequence_length() * counts_of(before).training_flops_per_token
    assert lineage["origin"] == {"run": origin.id, "step": STEPS, "training_flops": flops}
    assert lineage["report"] == json.loads(json.dumps(report.data()))
    _, model, data = load_run(tmp_path / "grown")
    _, old, _ = load_run(small)
    tokens = next(iter(data.evaluation(4, 4))).tokens_bt
    torch.testing.assert_close(model(tokens).hidden_btd, old(tokens).hidden_btd, rtol=1e-5, atol=1e-6)
    assert CheckpointStore(tmp_path / "grown" / "checkpoints").latest() == STEPS


@pytest.mark.parametrize("freeze", [False, True])
def test_training_goes_on_and_a_resume_equals_no_interruption(small: Path, tmp_path: Path, freeze: bool) -> None:
    grow_run(small, tmp_path / "once", AppendTokens(2, freeze_old=freeze))
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    summary = run(tmp_path / "once" / "recipe.yaml", tmp_path / "once")
    run(tmp_path / "twice" / "recipe.yaml", tmp_path / "twice", until=9)
    run(tmp_path / "twice" / "recipe.yaml", tmp_path / "twice")
    assert (
        summary is not None
        and summary.steps == TOTAL
        and list(losses(tmp_path / "once")) == list(range(STEPS + 1, TOTAL + 1))
    )
    assert losses(tmp_path / "once") == losses(tmp_path / "twice")
    one, other = weights(tmp_path / "once"), weights(tmp_path / "twice")
    assert set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())
    assert summary.tokens == TOTAL * 4 * load_recipe(recipe()).data.sequence_length()


def test_it_goes_on_with_the_data_the_rate_and_the_function_of_the_small_run(small: Path, tmp_path: Path) -> None:
    """The first loss after growth is the one that the small run would have seen next."""
    grow_run(small, tmp_path / "grown", AppendTokens(2))
    shutil.copytree(small, tmp_path / "small")
    run(recipe(), tmp_path / "small")
    grown = run(tmp_path / "grown" / "recipe.yaml", tmp_path / "grown")
    assert grown is not None
    assert losses(tmp_path / "grown")[STEPS + 1] == pytest.approx(losses(tmp_path / "small")[STEPS + 1], abs=1e-5)
    assert grown.history["train"]["learning_rate"][0] < 3e-3  # in the cosine of the whole run, not at its top again


def test_the_optimizer_of_the_checkpoint_is_extended(small: Path, tmp_path: Path) -> None:
    grow_run(small, tmp_path / "grown", AppendTokens({"feedforward": 200}))
    before, after = (CheckpointStore(path / "checkpoints").load() for path in (small, tmp_path / "grown"))
    assert set(before.tensors["optimizer"]) == set(after.tensors["optimizer"])
    grew = 0
    for name, old in before.tensors["optimizer"].items():
        new = after.tensors["optimizer"][name]
        assert torch.equal(new[: len(old)] if old.dim() else new, old)
        if new.shape != old.shape:
            grew += 1
            assert bool((new[len(old) :] == 0).all())
    assert grew == 2 * 2 * 2  # two moments of keys and values in two layers


def test_a_run_with_an_mlp_is_widened(tmp_path: Path) -> None:
    run(recipe("linear", {"kind": "mlp", "hidden": 64}), tmp_path / "small", until=STEPS)
    report = grow_run(tmp_path / "small", tmp_path / "grown", AppendUnits(2))
    assert report.change < 1e-6 and set(report.sizes.values()) == {(64, 128)}
    summary = run(tmp_path / "grown" / "recipe.yaml", tmp_path / "grown")
    assert summary is not None and summary.steps == TOTAL
    with pytest.raises(ConfigError, match="no parameter tokens"):
        grow_run(tmp_path / "small", tmp_path / "other", AppendTokens(2))
    assert not (tmp_path / "other").exists()


def test_an_older_checkpoint_and_a_larger_budget(tmp_path: Path) -> None:
    given = recipe(checkpoint={"every": 2, "keep": 9})
    run(given, tmp_path / "small", until=STEPS)
    grow_run(tmp_path / "small", tmp_path / "grown", AppendTokens(1.5), step=4)
    longer = load_recipe(tmp_path / "grown" / "recipe.yaml", ["budget.steps=20"])
    summary = train(longer, tmp_path / "grown", progress=lambda state: None)
    assert (summary.steps, summary.history["train"]["steps"][0]) == (20, 5)


def test_what_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(ConfigError, match="is in use"):
        grow_run(small, tmp_path / "used", AppendTokens(2))
    with pytest.raises(ConfigError, match="holds no run"):
        grow_run(tmp_path / "used", tmp_path / "grown", AppendTokens(2))
    with pytest.raises(ConfigError, match="not taken away"):
        grow_run(small, tmp_path / "grown", AppendTokens(0.5))
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        grow_run(small, tmp_path / "grown", AppendTokens(2), step=3)
    assert not (tmp_path / "grown").exists()
    (tmp_path / "empty").mkdir()
    grow_run(small, tmp_path / "empty", AppendTokens(2))
    assert (tmp_path / "empty" / "recipe.yaml").is_file()


def test_a_checkpoint_without_the_scale_is_refused(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "small")
    store = CheckpointStore(tmp_path / "small" / "checkpoints")
    snapshot = store.load()
    tensors = {name: value for name, value in snapshot.tensors["model"].items() if not name.endswith("tau")}
    shutil.rmtree(store.path(STEPS))
    store.save(Snapshot(STEPS, {**snapshot.tensors, "model": tensors}, snapshot.data))
    with pytest.raises(CheckpointError, match="tau is missing"):
        grow_run(tmp_path / "small", tmp_path / "grown", AppendTokens(2))
    with pytest.raises(CheckpointError, match="tau is missing"):
        run(recipe(), tmp_path / "small")


def test_changed_data_and_foreign_checkpoints_are_refused(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "small")
    record = json.loads((tmp_path / "small" / "run.json").read_text())
    (tmp_path / "small" / "run.json").write_text(json.dumps({**record, "data": "another"}))
    with pytest.raises(DataError, match="the data of .* changed"):
        grow_run(tmp_path / "small", tmp_path / "grown", AppendTokens(2))
    (tmp_path / "small" / "run.json").write_text(json.dumps(record))
    CheckpointStore(tmp_path / "small" / "checkpoints").save(Snapshot(9, {"other": {"x": torch.zeros(1)}}, {}))
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        grow_run(tmp_path / "small", tmp_path / "grown", AppendTokens(2))


def test_a_crash_while_writing_leaves_no_run(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: CheckpointStore, snapshot: Snapshot) -> None:
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(CheckpointStore, "save", fail)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        grow_run(small, tmp_path / "grown", AppendTokens(2))
    assert list(tmp_path.iterdir()) == []


# Budgets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["flops", "tokens_per_parameter", "tokens"])
def test_a_budget_that_the_size_prices_becomes_one_in_steps(tmp_path: Path, unit: str) -> None:
    """A doubled model would end before it begins: 14 steps at the small size are 7 or fewer at the large one."""
    given = load_recipe(recipe())
    counts, per_step = counts_of(given), tokens_per_step(given)
    whole = {
        "flops": TOTAL * per_step * counts.training_flops_per_token,
        "tokens_per_parameter": TOTAL * per_step / counts.non_embedding,
        "tokens": TOTAL * per_step,
    }
    run({**recipe(), "budget": {unit: whole[unit]}}, tmp_path / "small", until=10)
    grow_run(tmp_path / "small", tmp_path / "grown", AppendTokens(2))
    assert load_recipe(tmp_path / "grown" / "recipe.yaml").budget == Budget(steps=TOTAL)
    summary = run(tmp_path / "grown" / "recipe.yaml", tmp_path / "grown")
    assert summary is not None and summary.steps == TOTAL
    assert summary.history["train"]["steps"] == list(range(11, TOTAL + 1))


def test_another_end_can_be_asked_for(small: Path, tmp_path: Path) -> None:
    grow_run(small, tmp_path / "grown", AppendTokens(2), until=9)
    summary = run(tmp_path / "grown" / "recipe.yaml", tmp_path / "grown")
    assert summary is not None and summary.history["train"]["steps"] == [7, 8, 9]
    with pytest.raises(
        BudgetError, match=f"to end at step {STEPS}, and the checkpoint is that of step {STEPS}.*more than"
    ):
        grow_run(small, tmp_path / "other", AppendTokens(2), until=STEPS)
    assert not (tmp_path / "other").exists()


def test_a_budget_that_is_spent_before_the_first_step_is_said_to_be(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "small")
    run(recipe(), tmp_path / "small")
    grow_run(tmp_path / "small", tmp_path / "grown", AppendTokens(2))
    files = {path: path.read_bytes() for path in (tmp_path / "grown").rglob("*") if path.is_file()}
    for changes in ([], ["budget.steps=3"]):
        given = load_recipe(tmp_path / "grown" / "recipe.yaml", changes)
        with pytest.raises(BudgetError, match=rf"stands at step {TOTAL}.*budget\.steps=N with N above {TOTAL}"):
            train(given, tmp_path / "grown", progress=lambda state: None)
        found = {path: path.read_bytes() for path in (tmp_path / "grown").rglob("*") if path.is_file()}
        assert found == files
    longer = load_recipe(tmp_path / "grown" / "recipe.yaml", [f"budget.steps={TOTAL + 2}"])
    assert train(longer, tmp_path / "grown", progress=lambda state: None).steps == TOTAL + 2
    again = load_recipe(longer, ["budget.steps=5"])  # a run with steps of its own is finished, not empty
    assert train(again, tmp_path / "grown", progress=lambda state: None, allow=["schedule"]).steps == TOTAL + 2


def test_rates_of_the_small_run_do_not_bind_the_grown_one_and_its_own_do(small: Path, tmp_path: Path) -> None:
    grow_run(small, tmp_path / "grown", AppendTokens(2))
    longer = load_recipe(tmp_path / "grown" / "recipe.yaml", ["budget.steps=40"])  # another cosine from step 0 on
    run(longer, tmp_path / "grown", until=STEPS + 2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"another plan: step {STEPS}, which is done"):
        train(load_recipe(longer, ["budget.steps=30"]), tmp_path / "grown", progress=lambda state: None)


def test_a_grown_run_of_a_version_that_kept_the_origin_beside_the_record(small: Path, tmp_path: Path) -> None:
    grow_run(small, tmp_path / "grown", AppendTokens(2))
    path = tmp_path / "grown" / "run.json"
    full = read_record(tmp_path / "grown")
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in stored.items() if key not in ("origin", "rates_from")}))
    found = read_record(tmp_path / "grown")
    assert found.origin is not None and full.origin is not None and found.rates_from == full.rates_from == STEPS
    for name in ("kind", "run", "step", "tokens", "flops"):
        assert getattr(found.origin, name) == getattr(full.origin, name)
