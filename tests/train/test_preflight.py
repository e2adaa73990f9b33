"""What is refused before the first step: too little memory, a full disk, ranks that cannot share, missing sinks."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny import tiny_recipe

from torchstone.errors import CheckpointError, ConfigError, DataError, DependencyError
from torchstone.recipe.load import load_recipe
from torchstone.train import preflight
from torchstone.train.budget import counts_of
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.distributed import World
from torchstone.train.run import train

CPU = torch.device("cpu")


def check(tmp_path, world=None, **changes):
    recipe = load_recipe(tiny_recipe(**changes))
    store = CheckpointStore(tmp_path / "checkpoints", recipe.checkpoint.keep)
    preflight.check_run(recipe, counts_of(recipe), world or World(0, 1, CPU), store)


def test_a_small_run_passes(tmp_path):
    check(tmp_path)


def test_a_step_that_needs_more_memory_than_there_is_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"a training step of 1000000000 sequences needs about .* GB .*batch\.micro lower"
    ):
        check(tmp_path, batch={"sequences": 10**9})
    check(tmp_path, batch={"sequences": 10**9, "micro": 4})


def test_ranks_need_memory_for_their_share_only(monkeypatch):
    recipe = load_recipe(tiny_recipe(batch={"sequences": 4096}))
    counts = counts_of(recipe)
    asked = []
    monkeypatch.setattr(preflight, "check_memory", lambda recipe, counts, rows, *device: asked.append(rows))
    preflight.check_run(recipe, counts, World(1, 4, CPU), CheckpointStore("unused"))
    assert asked == [1024]


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("torchstone.train.checkpoint.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="GB free"):
        check(tmp_path)
    check(tmp_path, world=World(1, 2, CPU))  # only the leading rank writes


def test_ranks_that_cannot_share_the_batch_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be shared by 3 processes"):
        check(tmp_path, world=World(0, 3, CPU))


def test_a_sink_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    assert importlib.util.find_spec("tensorboard") is not None
    with pytest.raises(DependencyError, match=r"pip install 'torchstone\[tensorboard\]'"):
        check(tmp_path, sinks=["tensorboard"])
    assert not list(tmp_path.iterdir())


def test_a_mixture_computes_the_logits_of_as_many_tokens_less_at_a_time(monkeypatch):
    asked = []
    original = preflight.memory_estimate
    monkeypatch.setattr(preflight, "memory_estimate", lambda *given: asked.append(given) or original(*given))
    for head in ("linear", {"kind": "mixture-of-softmaxes", "components": 4}):
        recipe = load_recipe(tiny_recipe(model={**tiny_recipe()["model"], "head": head}))
        preflight.check_memory(recipe, counts_of(recipe), 4, 10**12, "cpu")
    assert [given[4] for given in asked] == [128, 32]


@pytest.fixture
def rearranged(tmp_path, monkeypatch):
    """Plain data of a run on rearranged bytes: rearranged(fim_token=257, end_token=256, order="goal-first")."""
    monkeypatch.setenv("TORCHSTONE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the {number} cats sat.\n" for number in range(400)))

    def make(order="goal-first", **tokens):
        text = {"kind": "text", "corpus": {"kind": "files", "paths": str(path)}, "tokenizer": "bytes", "length": 32}
        data = {"kind": "fill-in-the-middle", "text": text, "piece": 20, "goal_min": 2, "goal_max": 6, "order": order}
        objective = {"kind": "fill-in-the-middle", "fim_token": 257, "end_token": 256, **tokens}
        return tiny_recipe(data=data, objective=objective)

    return make


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"fim_token": 256}, r"objective\.fim_token is 256, and this data writes 257.*set objective\.fim_token=257"),
        ({"fim_token": 999}, r"objective\.fim_token is 999, and this data writes 257"),
        ({"end_token": 255}, r"objective\.end_token is 255, and this data writes 256.*set objective\.end_token=256"),
    ],
)
def test_an_objective_that_looks_for_other_tokens_is_refused(rearranged, tmp_path, tokens, words):
    with pytest.raises(ConfigError, match=words):
        train(rearranged(**tokens), tmp_path / "run", progress=lambda state: None)
    assert not (tmp_path / "run" / "run.json").exists()
    train(rearranged(), tmp_path / "run", progress=lambda state: None)


def test_a_batch_in_which_nothing_is_scored_is_said_to_be(rearranged, tmp_path):
    with pytest.raises(DataError, match=r"fill-in-the-middle scores nothing in the 4 sequences of step 0.*goal-first"):
        train(rearranged("as-written"), tmp_path / "run", progress=lambda state: None)
    assert not (tmp_path / "run" / "crash").exists()
