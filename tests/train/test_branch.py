"""Branches: what they leave, that they continue the parent exactly, what may differ, what is refused, and crashes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_recipe

import torchstone
from torchstone.cli import main as cli
from torchstone.errors import BudgetError, CheckpointError, ConfigError, DataError, InterruptedRun
from torchstone.recipe.load import load_recipe
from torchstone.storage import atomic
from torchstone.train.branch import branch_run
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.loop import Callback, RunView
from torchstone.train.record import Origin, read_record
from torchstone.train.run import RunSummary, load_run, train
from torchstone.train.signals import Stop
from torchstone.train.tree import read_tree

STEPS = 12
CONSTANT = {"kind": "constant", "warmup": 2}
AXES = ("loss", "learning_rate", "gradient_norm", "steps", "tokens", "flops")


def recipe(**changes: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "schedule": CONSTANT,
        "budget": {"steps": STEPS},
        "evaluation": {"every": 4, "sequences": 8},
        "checkpoint": {"every": 2, "keep": 9},
    }
    return tiny_recipe(**{**own, **changes})


class StopAt(Callback):
    """Asks for a stop after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.stop = step, Stop()

    def on_step(self, view: RunView) -> None:
        if view.position.step == self.step:
            self.stop.ask("the test")


def run(given: Any, directory: Path, **options: Any) -> RunSummary:
    return train(given, directory, progress=lambda state: None, **options)


def interrupted(given: Any, directory: Path, step: int) -> None:
    halt = StopAt(step)
    with pytest.raises(InterruptedRun):
        run(given, directory, callbacks=[halt], stop=halt.stop)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints at every second step."""
    directory = tmp_path_factory.mktemp("branch") / "parent"
    run(recipe(), directory)
    return directory


@pytest.fixture
def untouched(parent: Path) -> Any:
    """The parent's bytes are the same after the test as before it."""
    before = files(parent)
    yield
    assert files(parent) == before


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_run(directory)[1].state_dict())


def assert_same_end(one: Path, other: Path) -> None:
    """Weights and optimizer are equal bit for bit."""
    first, second = (CheckpointStore(path / "checkpoints").load() for path in (one, other))
    assert first.step == second.step
    for group, tensors in first.tensors.items():
        assert tensors.keys() == second.tensors[group].keys()
        assert all(torch.equal(value, second.tensors[group][name]) for name, value in tensors.items()), group


# What a branch is -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("form", ["{}@6", "{}/checkpoints/step-00000006"])
def test_under_the_parents_recipe_it_is_bit_for_bit_the_parent(parent: Path, tmp_path: Path, form: str) -> None:
    asked = branch_run(form.format(parent), tmp_path / "branch")
    assert {item.name for item in (tmp_path / "branch").iterdir()} == {"recipe.yaml", "run.json", "checkpoints"}
    found, whole = run(asked, tmp_path / "branch"), run(recipe(), parent)
    for axis in AXES:
        assert found.history["train"][axis] == whole.history["train"][axis][6:], axis
    assert found.history["validation"]["loss"] == whole.history["validation"]["loss"][1:]
    assert (found.tokens, found.flops, found.taints) == (whole.tokens, whole.flops, ())
    assert_same_end(tmp_path / "branch", parent)


def test_the_record_says_where_it_comes_from(parent: Path, tmp_path: Path) -> None:
    branch_run(f"{parent}@8", tmp_path / "branch", overrides=["schedule.kind=cosine"])
    record, origin = read_record(tmp_path / "branch"), read_record(parent)
    whole = run(recipe(), parent)
    per_step = whole.tokens // STEPS
    seconds = whole.history["train"]["seconds"][7]
    assert record.origin == Origin(
        "branch",
        origin.id,
        record.origin.directory if record.origin else "",
        8,
        8 * per_step,
        whole.flops * 8 / STEPS,
        seconds,
        whole.history["validation"]["loss"][1],
        ("schedule.kind was 'constant', now 'cosine'",),
        (),
    )
    assert (tmp_path / "branch" / record.origin.directory).resolve() == parent.resolve()
    assert not Path(record.origin.directory).is_absolute()
    assert record.id != origin.id and record.compute == origin.compute and record.rates_from == 8
    assert CheckpointStore(tmp_path / "branch" / "checkpoints").steps() == [8]


def test_a_decay_branch_and_a_continuation_from_its_end(parent: Path, tmp_path: Path) -> None:
    # start: decay
    decayed = branch_run(f"{parent}@8", tmp_path / "decayed", decay=4)  # four more steps, the rate falls to 0
    summary = train(decayed, tmp_path / "decayed")
    assert summary.history["train"]["learning_rate"] == pytest.approx([3e-3 * left / 4 for left in (3, 2, 1, 0)])
    # end: decay
    assert decayed.budget.steps == 12 and summary.history["train"]["steps"] == [9, 10, 11, 12]
    # start: continuation
    plan = ["budget.steps=16", "schedule=constant", "schedule.warmup=2"]
    again = branch_run(tmp_path / "decayed", tmp_path / "again", overrides=plan)  # the newest checkpoint: step 12
    summary = train(again, tmp_path / "again")
    assert summary.history["train"]["learning_rate"] == [3e-3] * 4  # back at the peak
    # end: continuation
    before = CheckpointStore(tmp_path / "decayed" / "checkpoints").load()
    after = CheckpointStore(tmp_path / "again" / "checkpoints").load(12)
    for name, value in before.tensors["optimizer"].items():
        assert torch.equal(value, after.tensors["optimizer"][name])  # the moments are carried
    assert read_record(tmp_path / "again").origin.run == read_record(tmp_path / "decayed").id  # type: ignore[union-attr]


def test_the_shape_of_the_decay_may_be_another(parent: Path, tmp_path: Path) -> None:
    plan = ["schedule.shape=exponential", "schedule.final=0.1"]
    asked = branch_run(f"{parent}@8", tmp_path / "branch", overrides=plan, decay=4)
    assert run(asked, tmp_path / "branch").history["train"]["learning_rate"][-1] == pytest.approx(3e-4)


def test_an_interrupted_branch_goes_on_with_the_same_call(parent: Path, tmp_path: Path) -> None:
    def call(directory: str) -> Any:
        return branch_run(f"{parent}@6", tmp_path / directory, overrides=["schedule.warmup=2"], decay=5)

    run(call("once"), tmp_path / "once")
    for step in (7, 10):
        interrupted(call("twice"), tmp_path / "twice", step)
    summary = run(call("twice"), tmp_path / "twice")
    assert summary.history["train"]["steps"] == [7, 8, 9, 10, 11]
    assert_same_end(tmp_path / "once", tmp_path / "twice")
    assert summary.history["train"]["loss"] == run(call("once"), tmp_path / "once").history["train"]["loss"]


def test_the_same_call_goes_on_although_the_parent_went_on_too(tmp_path: Path) -> None:
    interrupted(recipe(), tmp_path / "parent", 6)
    plan = ["schedule.kind=linear"]
    interrupted(branch_run(tmp_path / "parent", tmp_path / "branch", overrides=plan), tmp_path / "branch", 8)
    run(recipe(), tmp_path / "parent")
    asked = branch_run(tmp_path / "parent", tmp_path / "branch", overrides=plan)
    assert run(asked, tmp_path / "branch").history["train"]["steps"] == [7, 8, 9, 10, 11, 12]


def test_a_branch_of_a_branch(parent: Path, tmp_path: Path) -> None:
    run(branch_run(f"{parent}@4", tmp_path / "one"), tmp_path / "one")
    run(branch_run(f"{tmp_path / 'one'}@8", tmp_path / "two"), tmp_path / "two")
    assert_same_end(tmp_path / "two", parent)


def test_evaluation_may_differ_and_the_loss_at_the_branching_point_is_then_measured(
    parent: Path, tmp_path: Path
) -> None:
    asked = branch_run(f"{parent}@8", tmp_path / "branch", overrides=["evaluation.sequences=16"])
    measured = read_record(tmp_path / "branch").origin.validation_loss  # type: ignore[union-attr]
    fine = run(recipe(evaluation={"every": 8, "sequences": 16}), tmp_path / "fine")
    assert measured == pytest.approx(fine.history["validation"]["loss"][0], rel=1e-6)
    run(asked, tmp_path / "branch")
    no_record = branch_run(f"{parent}@6", tmp_path / "between")  # the parent evaluated at 4 and 8
    assert no_record == load_recipe(recipe())
    assert read_record(tmp_path / "between").origin.validation_loss is not None  # type: ignore[union-attr]


def test_the_command_line_branches_continues_and_leaves_the_parent_alone(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", *words])
        found = capsys.readouterr()
        return int(caught.value.code or 0), found.out, found.err

    out = ("--out", str(tmp_path / "branch"))
    words = ("schedule.final=0.5", "--branch", f"{parent}@8", "--decay", "2", *out)
    code, text, problems = command(*words)
    assert code == 0 and text.startswith("steps            10\n"), problems
    assert "branch of" in problems and "at step 8, validation loss" in problems
    assert "note: changed from parent: schedule.kind was 'constant', now 'wsd'" in problems
    assert read_record(tmp_path / "branch").origin is not None
    assert command(*words)[:2] == (0, text)  # finished: the same command returns at once
    code, _, problems = command(
        str(tmp_path / "branch" / "recipe.yaml"), "budget.steps=14", "--branch", f"{parent}@8", *out
    )
    assert code == 2 and "under another plan: step 8, which is done" in problems
    for wrong, said in (
        (("--branch", str(parent)), "say with --out"),
        ((), "give a recipe"),
        (("recipe.yaml", "--decay", "3"), "give --branch CHECKPOINT"),
        (("--branch", f"{parent}@8", "--no-resume", *out), "holds a run already"),
    ):
        code, _, problems = command(*wrong)
        assert code == 2 and said in problems


# What may differ, and what is refused ---------------------------------------------------------------


def test_the_optimizer_may_differ_where_it_is_named(parent: Path, tmp_path: Path) -> None:
    slower = ["optimizer.learning_rate=1e-3"]
    with pytest.raises(ConfigError, match="optimizer.learning_rate was 0.003, now 0.001.*--allow optimizer"):
        branch_run(f"{parent}@8", tmp_path / "branch", overrides=slower)
    asked = branch_run(f"{parent}@8", tmp_path / "branch", overrides=slower, allow=["optimizer"])
    assert run(asked, tmp_path / "branch").history["train"]["learning_rate"] == [1e-3] * 4


def test_other_data_is_a_taint_that_children_inherit(parent: Path, tmp_path: Path) -> None:
    other = ["data.filler_probability=0.5"]
    with pytest.raises(ConfigError, match="--allow data"):
        branch_run(f"{parent}@8", tmp_path / "branch", overrides=other)
    run(branch_run(f"{parent}@8", tmp_path / "branch", overrides=other, allow=["data"]), tmp_path / "branch")
    child = branch_run(f"{tmp_path / 'branch'}@10", tmp_path / "child")
    taints = run(child, tmp_path / "child").taints
    assert len(taints) == 1 and "the data changed within the run, from fingerprint" in taints[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.depth=3", "model.depth was 2, now 3"),
        ("seed=5", "seed was 0, now 5"),
        ("batch.sequences=8", "batch.sequences was 4, now 8"),
        ("optimizer.weight_decay={default: 0.1, attention_qk: 0}", "weight_decay"),
    ],
)
def test_what_would_be_another_run_is_refused(parent: Path, tmp_path: Path, change: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        branch_run(f"{parent}@8", tmp_path / "branch", overrides=[change], allow=["optimizer", "data"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("untouched")
def test_places_and_ends_that_cannot_be(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere holds no run .*RUN@STEP"):
        branch_run(tmp_path / "nowhere", tmp_path / "branch")
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; there: 2, 4"):
        branch_run(f"{parent}@7", tmp_path / "branch")
    with pytest.raises(BudgetError, match="begins at step 12, and its budget ends at step 12.*--decay STEPS"):
        branch_run(parent, tmp_path / "branch")
    with pytest.raises(BudgetError, match="a decay of 0 steps"):
        branch_run(f"{parent}@8", tmp_path / "branch", decay=0)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(ConfigError, match="is in use; a branch starts in a directory of its own"):
        branch_run(f"{parent}@8", tmp_path / "used")
    with pytest.raises(ConfigError, match="holds a run that is no branch"):
        branch_run(f"{parent}@8", parent)
    assert [item.name for item in tmp_path.iterdir()] == ["used"]


def test_a_directory_with_another_branch_is_refused(parent: Path, tmp_path: Path) -> None:
    branch_run(f"{parent}@8", tmp_path / "branch")
    shutil.copytree(tmp_path / "branch", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"holds a branch from step 8 of .*, and --branch says .*@6; choose another"):
        branch_run(f"{parent}@6", tmp_path / "branch")
    with pytest.raises(ConfigError, match="holds a branch from step 8"):
        branch_run(tmp_path / "other", tmp_path / "branch")
    with pytest.raises(ConfigError, match="holds a run already"):
        branch_run(f"{parent}@8", tmp_path / "branch", resume=False)


def test_a_decay_begins_at_the_peak(tmp_path: Path) -> None:
    run(recipe(schedule={"kind": "cosine", "warmup": 2}), tmp_path / "falling")
    with pytest.raises(ConfigError, match=r"at step 8 is 0\.\d+ of its peak, and --decay begins at the peak"):
        branch_run(f"{tmp_path / 'falling'}@8", tmp_path / "branch", decay=4)
    assert not (tmp_path / "branch").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_damaged_parent_is_named(parent: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(parent, tmp_path / "parent")
    path = tmp_path / "parent" / "checkpoints" / "step-00000008" / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        branch_run(f"{tmp_path / 'parent'}@8", tmp_path / "branch")
    assert not (tmp_path / "branch").exists()


def test_a_parent_whose_files_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSTONE_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {n} of many, {n * n}"}) + "\n" for n in range(600)))
    corpus = {"kind": "files", "paths": str(rows)}
    data = {"kind": "text", "corpus": corpus, "tokenizer": "bytes", "length": 32}
    run(recipe(data=data), tmp_path / "parent")
    with open(rows, "ab") as file:
        file.write(b"\n")
    with pytest.raises(DataError, match="the data changed.*--allow data"):
        branch_run(f"{tmp_path / 'parent'}@8", tmp_path / "branch")
    asked = branch_run(f"{tmp_path / 'parent'}@8", tmp_path / "branch", allow=["data"])
    assert len(run(asked, tmp_path / "branch").taints) == 1


def test_the_branchs_own_steps_bind_it_and_the_parents_do_not(parent: Path, tmp_path: Path) -> None:
    interrupted(branch_run(f"{parent}@6", tmp_path / "branch", decay=6), tmp_path / "branch", 9)
    longer = load_recipe(tmp_path / "branch" / "recipe.yaml", ["budget.steps=14", "schedule.decay=8"])
    with pytest.raises(ConfigError, match="another plan: step 6, which is done"):
        run(longer, tmp_path / "branch")
    assert run(longer, tmp_path / "branch", allow=["schedule"]).steps == 14


# Crashes --------------------------------------------------------------------------------------------


def test_killed_at_any_stage_there_is_no_directory_or_a_whole_one(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    monkeypatch.setattr(atomic, "stage_hook", stages.append)
    branch_run(f"{parent}@8", tmp_path / "count")
    assert "directory renamed" in stages
    for number in range(len(stages)):
        directory = tmp_path / f"branch-{number}"
        monkeypatch.setattr(atomic, "stage_hook", _failing_at(number))
        with pytest.raises(KeyboardInterrupt):
            branch_run(f"{parent}@8", directory)
        monkeypatch.setattr(atomic, "stage_hook", lambda stage: None)
        if directory.exists():
            assert files_by_name(directory).keys() == files_by_name(tmp_path / "count").keys()
        asked = branch_run(f"{parent}@8", directory)
        assert CheckpointStore(directory / "checkpoints").load().step == 8
        assert asked == load_recipe(recipe())
    assert_same_end(tmp_path / "branch-0", tmp_path / f"branch-{len(stages) - 1}")


def _failing_at(number: int) -> Callable[[str], None]:
    seen: list[str] = []

    def hook(stage: str) -> None:
        seen.append(stage)
        if len(seen) == number + 1:
            raise KeyboardInterrupt

    return hook


def files_by_name(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): content for path, content in files(directory).items()}


def test_what_a_killed_process_left_beside_it_is_removed(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "branch.partial-999999999-abcd1234").mkdir()
    (tmp_path / "branch2.partial-999999999-abcd1234").mkdir()
    branch_run(f"{parent}@8", tmp_path / "branch")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["branch", "branch2.partial-999999999-abcd1234"]


# A run of several budgets ---------------------------------------------------------------------------


def test_a_planned_run_is_extended_branched_and_seen_as_a_tree(tmp_path: Path) -> None:
    """Plan, train, extend, branch twice, report: as a user does it."""
    folder = tmp_path / "runs"
    # start: planned
    plan = torchstone.load_recipe(
        recipe(),
        ["schedule={kind: wsd-s, cycles: [6, 12], warmup: 2, decay: 3, shape: linear}", "budget.steps=12"],
    )
    train(plan, folder / "main")  # the rate is back at its peak at step 6; both ends are usable
    longer = torchstone.load_recipe(plan, ["schedule.cycles=[6, 12, 18]", "budget.steps=18"])
    train(longer, folder / "main")  # goes on from the decayed end: no rate that was used has changed
    # end: planned
    rates = run(longer, folder / "main").history["train"]["learning_rate"]
    assert rates[6] == rates[12] == 3e-3 and rates[5] < 3e-3 and len(rates) == 18
    assert [resume["rates"] for resume in read_record(folder / "main").resumes] == [[]]
    moved = torchstone.load_recipe(plan, ["schedule.cycles=[8, 18]", "budget.steps=18"])
    with pytest.raises(ConfigError, match="under another plan: step 4, which is done"):
        run(moved, folder / "main")
    # start: branches
    for name, checkpoint, changes in (
        ("gentle", f"{folder / 'main'}@14", ["schedule.shape=cosine"]),
        ("sharp", f"{folder / 'main'}@14", ["schedule.shape=sqrt"]),
    ):
        asked = branch_run(checkpoint, folder / name, overrides=changes, decay=4)
        train(asked, folder / name)
    tree = read_tree([folder])
    gained = {run.name: run.gained for run in tree.branches}
    assert tree.total.steps == 18 + 4 + 4  # the trunk counts once
    # end: branches
    assert gained.keys() == {"gentle", "sharp"} and all(value is not None for value in gained.values())


def test_ends_of_cycles_are_evaluated_and_kept_and_can_be_branched_from(tmp_path: Path) -> None:
    schedule = {"kind": "wsd-s", "cycles": [4, 8], "warmup": 2, "decay": 2}
    quiet = {"checkpoint": {"every": None, "keep": 1}, "evaluation": {"every": None, "sequences": 8}}
    summary = run(recipe(schedule=schedule, **quiet), tmp_path / "main")
    assert CheckpointStore(tmp_path / "main" / "checkpoints").steps() == [4, 8, 12]
    assert summary.history["validation"]["steps"] == [4, 8, 12]
    asked = branch_run(
        f"{tmp_path / 'main'}@8", tmp_path / "branch", overrides=["schedule=constant", "schedule.warmup=2"]
    )
    assert read_record(tmp_path / "branch").origin.validation_loss == summary.history["validation"]["loss"][1]  # type: ignore[union-attr]
    assert run(asked, tmp_path / "branch").history["train"]["steps"] == [9, 10, 11, 12]


def test_two_ranks_make_one_branch(parent: Path, tmp_path: Path) -> None:
    words = ["train", "--branch", f"{parent}@8", "--decay", "2", "--out", str(tmp_path / "branch")]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "torchstone",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("branch of") == 1 and done.stdout.count("validation loss") == 1
    record = read_record(tmp_path / "branch")
    assert record.environment["world"] == 2 and record.resumes[0]["environment"] == []
    alone = branch_run(f"{parent}@8", tmp_path / "alone", decay=2)
    losses = [run(alone, tmp_path / name).history["train"]["loss"] for name in ("alone", "branch")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
