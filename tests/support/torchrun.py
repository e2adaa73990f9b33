"""Ranks that train together, as torchrun starts them, and the program that each of them runs.

`torchrun(...)` is the test's side; the module's main program trains a recipe on every rank, with faults planted as
asked, and writes what the rank saw (`rank-R.json`): the numbers of the sequences of every batch, the losses of every
step, and the error if there was one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def torchrun(
    recipe: dict[str, Any], directory: Path, ranks: int = 2, **request: Any
) -> subprocess.CompletedProcess[str]:
    """Train on several gloo processes with one thread each; their notes lie beside `directory`."""
    message = {"recipe": recipe, "directory": str(directory), **request}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1",
        "--master-port", str(port), __file__, json.dumps(message),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def notes(directory: Path, rank: int) -> dict[str, Any]:
    """What a rank wrote."""
    found: dict[str, Any] = json.loads((directory.parent / f"rank-{rank}.json").read_text())
    return found


def _poison(step: int) -> Any:
    """An objective whose loss is nan from the given step on (counted in forward passes)."""
    import torch

    from torchstone.objectives.next_token import LossOutput, NextToken

    plain, calls = NextToken.forward, {"count": 0}

    def forward(self: Any, model: Any, batch: Any) -> LossOutput:
        found = plain(self, model, batch)
        calls["count"] += torch.is_grad_enabled()
        if calls["count"] <= step or not torch.is_grad_enabled():
            return found
        return LossOutput(found.loss_sum * torch.nan, found.count, found.per_token_bt, found.correct_bt)

    NextToken.forward = forward  # type: ignore[method-assign]


def _main() -> None:
    import torch

    from torchstone.data.synthetic.task import Task
    from torchstone.errors import TorchstoneError
    from torchstone.train.precision import Compute
    from torchstone.train.run import train

    torch.set_num_threads(1)
    request, rank = json.loads(sys.argv[1]), int(os.environ["RANK"])
    directory = Path(request["directory"])
    seen: dict[str, Any] = {"rows": [], "losses": [], "error": ""}
    batch = Task.batch

    def recorded(self: Any, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> Any:
        found = batch(self, seed, step, size, start, stop)
        seen["rows"].append([step, *found.rows])
        return found

    Task.batch = recorded  # type: ignore[method-assign]
    if rank == request.get("poisoned_rank"):
        _poison(request["poisoned_step"])
    code = 0
    try:
        for budget in request.get("budgets", [request["recipe"]["budget"]]):
            recipe = {**request["recipe"], "budget": budget}
            summary = train(
                recipe,
                directory,
                compute=Compute("fp32", False),
                progress=lambda state: None,
                **request.get("options", {}),
            )
            seen["losses"] = summary.history["train"]["loss"]
    except TorchstoneError as error:
        seen["error"], code = f"{type(error).__name__}: {error}", error.exit_code
    (directory.parent / f"rank-{rank}.json").write_text(json.dumps(seen))
    sys.exit(code)


if __name__ == "__main__":
    _main()
