"""Selective training over ranks and micro-batches: the same tokens, losses and gradients as one process with one batch.

Run as a program, this file is what each rank of torchrun does: it trains recipes and writes what it selected and the gradients.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchstone.errors import ConfigError, InterruptedRun
from torchstone.objectives.selective import SelectiveObjective
from torchstone.recipe.load import load_recipe
from torchstone.train.budget import counts_of
from torchstone.train.loop import Callback, RunView
from torchstone.train.precision import Compute
from torchstone.train.run import RunSummary, load_run, train
from torchstone.train.signals import Stop

STEPS, ROWS = 3, 8
DATA = {"kind": "noisy-trigram", "length": 19}
ARMS: dict[str, dict[str, Any]] = {
    "excess": {"score": "excess"},
    "random": {"score": "random"},
    "oracle": {"score": "oracle", "ratio": 0.3},
    "hard": {"score": "hard", "ratio": 0.37},
    "soft": {"score": "soft", "ratio": 1.0},
}
READS_REFERENCE = ("excess", "soft")
METRICS = ("loss", "mean_loss", "selected_share", "unselected_loss", "selection_threshold", "selected_noise")


def recipe(
    micro: int | None = None, steps: int = STEPS, data: dict[str, Any] = DATA, **objective: Any
) -> dict[str, Any]:
    return {
        "model": {
            "kind": "decoder", "width": 16, "depth": 1, "head_dim": 8,
            "block": {"feedforward": {"kind": "swiglu", "hidden": 24}},
        },
        "data": data,
        "objective": {"kind": "selective", **objective},
        "optimizer": {"kind": "adamw", "learning_rate": 3e-3},
        "schedule": {"kind": "constant"},
        "budget": {"steps": steps},
        "batch": {"sequences": ROWS, "micro": micro},
        "precision": "fp32",
        "compile": False,
        "evaluation": {"every": None, "sequences": 8},
    }  # fmt: skip


class Watch(Callback):
    """Records the gradients of every step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_start(self, view: RunView) -> None:
        names = {id(parameter): name for name, parameter in view.model.named_parameters()}

        def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        key = f"{view.position.step}/{names[id(parameter)]}"
                        self.gradients[key] = parameter.grad.clone()

        view.optimizer.register_step_pre_hook(record)


def quietly(given: dict[str, Any], directory: Path, **options: Any) -> RunSummary:
    return train(given, directory, **{"progress": lambda state: None, "compute": Compute("fp32", False), **options})


def watched(given: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Train; returns curves, gradients, and the weight of every token by its sequence's number."""
    plain, weights = SelectiveObjective.forward, {}

    def forward(self: Any, model: Any, batch: Any) -> Any:
        found = plain(self, model, batch)
        if found.weights_bt is not None:
            weights.update(zip(map(str, batch.rows), found.weights_bt.tolist(), strict=True))
        return found

    watch = Watch()
    SelectiveObjective.forward = forward  # type: ignore[method-assign]
    try:
        curves = quietly(given, directory, callbacks=[watch]).history["train"]
    finally:
        SelectiveObjective.forward = plain  # type: ignore[method-assign]
    return {"curves": dict(curves), "gradients": watch.gradients, "weights": weights}


def settings(arm: str, reference: Path) -> dict[str, Any]:
    return {**ARMS[arm], **({"reference": str(reference)} if arm in READS_REFERENCE else {})}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of next-token training on the same data."""
    directory = tmp_path_factory.mktemp("reference") / "run"
    quietly({**recipe(steps=30), "objective": "next-token"}, directory)
    return directory


@pytest.fixture(scope="module")
def alone(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process with one micro-batch does."""
    folder = tmp_path_factory.mktemp("alone")
    return {arm: watched(recipe(**settings(arm, reference)), folder / arm) for arm in ARMS}


@pytest.fixture(scope="module")
def together(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo ranks leave, with one micro-batch each and with two."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(port), __file__, str(folder), str(reference),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    return folder


def assert_same(found: dict[str, Any], expected: dict[str, Any], arm: str) -> None:
    assert found["weights"].keys() == expected["weights"].keys() and len(expected["weights"]) == STEPS * ROWS
    for row, weights in expected["weights"].items():
        if arm == "soft":
            assert found["weights"][row] == pytest.approx(weights, rel=1e-4, abs=1e-6)
        else:
            assert found["weights"][row] == weights, f"sequence {row}"
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-5, atol=1e-6)
    for name in METRICS:
        assert (name in found["curves"]) == (name in expected["curves"])
        if name in expected["curves"]:
            assert found["curves"][name] == pytest.approx(expected["curves"][name], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("micro", [1, 3, 4])
@pytest.mark.parametrize("arm", ARMS)
def test_accumulation_selects_the_same_tokens(arm, micro, alone, reference, tmp_path):
    assert_same(watched(recipe(micro, **settings(arm, reference)), tmp_path / "run"), alone[arm], arm)


@pytest.mark.parametrize("micro", ["whole", "halves"])
@pytest.mark.parametrize("arm", ARMS)
def test_two_ranks_select_the_same_tokens(arm, micro, alone, together):
    found: dict[str, Any] = {"weights": {}}
    for rank in (0, 1):
        noted = json.loads((together / f"{arm}-{micro}-{rank}.json").read_text())
        assert not found["weights"].keys() & noted["weights"].keys()
        found["weights"] |= noted["weights"]
        found["curves"] = noted["curves"]
    found["gradients"] = load_file(together / f"{arm}-{micro}.safetensors")
    assert_same(found, alone[arm], arm)


@pytest.mark.parametrize("scope", ["micro", "sequence"])
def test_narrow_scopes_weigh_every_selected_token_of_the_global_batch_the_same(scope, tmp_path):
    found = watched(recipe(2, score="hard", scope=scope, steps=1), tmp_path / "run")
    selected = sum(weight for weights in found["weights"].values() for weight in weights)
    curves = found["curves"]
    rows, tokens = ROWS, ROWS * 16  # three positions of each row have no target
    assert selected == (4 * int(0.6 * tokens / 4) if scope == "micro" else rows * int(0.6 * 16))
    total = curves["mean_loss"][0] * tokens
    others = curves["unselected_loss"][0] * (tokens - selected)
    assert curves["loss"][0] * selected == pytest.approx(total - others, rel=1e-5)


def test_everything_selected_trains_bitwise_as_next_token(tmp_path):
    selective = quietly(recipe(3, ratio=1.0), tmp_path / "selective")
    plain = quietly({**recipe(3), "objective": "next-token"}, tmp_path / "plain")
    assert selective.history["train"]["loss"] == plain.history["train"]["loss"]
    assert selective.final == plain.final
    weights = [load_run(tmp_path / name)[1].state_dict() for name in ("selective", "plain")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("arm", ["excess", "random"])
def test_a_resumed_run_ends_bitwise_as_a_straight_one(arm, reference, tmp_path):
    given = recipe(3, steps=5, **settings(arm, reference))
    straight = quietly(given, tmp_path / "straight")
    stop = Stop()
    with pytest.raises(InterruptedRun, match="after step 2 of 5"):
        quietly(
            given,
            tmp_path / "run",
            stop=stop,
            progress=lambda state: stop.ask("the test") if state["step"] == 2 else None,
        )
    resumed = quietly(given, tmp_path / "run")
    assert resumed.history["train"]["loss"] == straight.history["train"]["loss"]
    assert resumed.final == straight.final


def test_validation_is_plain_cross_entropy(reference, tmp_path):
    """The model that was selectively trained has the same validation loss under `next-token`."""
    run = quietly(recipe(**settings("excess", reference)), tmp_path / "run")
    given, model, data = load_run(tmp_path / "run")
    objective = load_recipe({**recipe(), "objective": "next-token"}).objective.build()
    with torch.no_grad():
        outputs = [objective(model, batch) for batch in data.evaluation(8, given.evaluation.sequences)]
    loss = sum(float(one.loss_sum) for one in outputs) / sum(int(one.count) for one in outputs)
    assert run.final["validation_loss"] == pytest.approx(loss, rel=1e-6)


def test_a_reference_costs_a_third_of_what_it_would_cost_to_train(reference):
    plain = counts_of(load_recipe(recipe(ratio=0.6))).training_flops_per_token
    online = counts_of(load_recipe(recipe(ratio=0.6, reference=str(reference)))).training_flops_per_token
    alone = counts_of(load_recipe({**recipe(), "objective": "next-token"})).training_flops_per_token
    assert online - plain == pytest.approx(alone / 3)


def test_a_reference_of_another_vocabulary_is_refused(tmp_path):
    quietly({**recipe(steps=1, data={**DATA, "vocab_size": 16}), "objective": "next-token"}, tmp_path / "other")
    with pytest.raises(ConfigError, match="reference vocab 16 ≠ model vocab 32"):
        quietly(recipe(reference=str(tmp_path / "other")), tmp_path / "run")


def test_a_reference_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="objective.reference is .*nowhere, which holds no run"):
        quietly(recipe(reference=str(tmp_path / "nowhere")), tmp_path / "run")


def test_excess_without_reference_losses_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="score excess needs reference losses"):
        quietly(recipe(), tmp_path / "run")


def _rank() -> None:
    torch.set_num_threads(1)
    folder, reference, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
    for arm in ARMS:
        for name, micro in (("whole", None), ("halves", ROWS // 4)):
            found = watched(recipe(micro, **settings(arm, reference)), folder / "runs" / f"{arm}-{name}")
            gradients = found.pop("gradients")
            (folder / f"{arm}-{name}-{rank}.json").write_text(json.dumps(found))
            if rank == 0:
                save_file(gradients, folder / f"{arm}-{name}.safetensors")


if __name__ == "__main__":
    _rank()
