"""Executors: worker processes, their death, and a Ray cluster of two nodes."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from dataclasses import asdict

import pytest
from tiny import tiny_recipe

from torchstone.errors import ConfigError, DependencyError
from torchstone.lab.compare import compare
from torchstone.lab.comparison import SCALE, Comparison
from torchstone.lab.executors import Job, make_executor
from torchstone.lab.executors.local import LocalExecutor
from torchstone.lab.progress import Quiet
from torchstone.lab.runner import RunOptions
from torchstone.lab.training import Variant
from torchstone.recipe.fingerprint import code_fingerprint, torch_version
from torchstone.recipe.load import load_recipe


def payload(directory, recipe, **changes):
    study = Comparison(load_recipe(recipe), [Variant("same")], None, "validation_loss", 0.0, 1)
    arm = asdict(study.arms(study.scales[SCALE])[0])
    prepared = {
        "compute": {"precision": "fp32", "compile": False},
        "data": {arm["name"]: load_recipe(recipe).data.build(None).fingerprint},
    }
    return {
        "task": "measure",
        "reference": study.reference(),
        "scale": SCALE,
        "settings": {},
        "directory": str(directory),
        "code": code_fingerprint(),
        "torch": torch_version(),
        "arm": arm,
        "seed": 0,
        "prepared": prepared,
    } | changes


def finish(executor, count=1, timeout=120.0):
    events, end = [], time.monotonic() + timeout
    while len(events) < count:
        assert time.monotonic() < end, "the executor hangs"
        events += [event for event in executor.wait(0.2) if event.kind != "progress"]
    return events


def test_a_worker_measures_and_survives_a_failing_cell(tmp_path):
    executor = LocalExecutor(1, 1, tmp_path / "logs")
    try:
        executor.submit(Job("bad", payload(tmp_path / "bad", tiny_recipe(), code="other")))
        (failed,) = finish(executor)
        assert failed.kind == "died"
        assert "torchstone differs from the runner's" in failed.error
        executor.submit(Job("good", payload(tmp_path / "good", tiny_recipe())))
        (done,) = finish(executor)
        assert (done.key, done.kind) == ("good", "done")
        assert done.value["measurement"]["metrics"]["validation_loss"] > 0
    finally:
        executor.close()


def test_a_killed_worker_is_an_event_within_seconds_and_is_replaced(tmp_path):
    executor = LocalExecutor(1, 1, tmp_path / "logs")
    try:
        executor.submit(Job("long", payload(tmp_path / "long", tiny_recipe(budget={"steps": 1_000_000}))))
        time.sleep(1.0)
        begun = time.monotonic()
        os.kill(executor._workers[0].process.pid, signal.SIGKILL)
        (died,) = finish(executor)
        assert time.monotonic() - begun < 10
        assert (died.key, died.kind) == ("long", "died")
        assert "SIGKILL" in died.error
        executor.submit(Job("next", payload(tmp_path / "next", tiny_recipe())))
        (done,) = finish(executor)
        assert done.kind == "done"
    finally:
        executor.close(kill=True)


def test_closing_stops_a_running_worker_with_its_checkpoint(tmp_path):
    executor = LocalExecutor(1, 1, tmp_path / "logs")
    executor.submit(Job("long", payload(tmp_path / "long", tiny_recipe(budget={"steps": 1_000_000}))))
    end = time.monotonic() + 60
    while not (tmp_path / "long" / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < end
        executor.wait(0.2)
    worker = executor._workers[0].process
    executor.close(kill=True)
    assert worker.returncode == 75
    assert any((tmp_path / "long" / "run" / "checkpoints").glob("step-*/manifest.json"))


def test_unknown_executors_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot run on 'slurm'"):
        make_executor("slurm", slots=1, threads=1, logs=tmp_path)


HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_install_line_is_given(tmp_path):
    with pytest.raises(DependencyError, match=r"pip install 'torchstone\[ray\]'"):
        make_executor("ray", slots=None, threads=1, logs=tmp_path)


@pytest.mark.skipif(not HAS_RAY, reason="needs Ray: pip install 'torchstone[ray]'")
def test_a_comparison_runs_on_a_ray_cluster_of_two_nodes(tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        arms = ["same:optimizer.learning_rate=3e-3", "broken:optimizer.learning_rate=1e30"]
        finished = compare(tiny_recipe(), arms, seeds=2, out=tmp_path, options=RunOptions(on="ray"), progress=Quiet())
        cells = {(cell.arm, cell.seed): cell for cell in finished.result.cells}
        assert {key for key, cell in cells.items() if cell.status == "done"} >= {
            (arm, seed) for arm in ("baseline", "same") for seed in (0, 1)
        }
        again = compare(
            tiny_recipe(),
            arms[:1],
            seeds=2,
            out=tmp_path / "local",
            options=RunOptions(on="inline"),
            progress=Quiet(),
        )
        local = next(cell for cell in again.result.cells if cell.arm == "baseline" and cell.seed == 0)
        assert cells["baseline", 0].metrics["validation_loss"] == pytest.approx(
            local.metrics["validation_loss"], rel=1e-5
        )
    finally:
        ray.shutdown()
        cluster.shutdown()
