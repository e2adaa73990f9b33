"""Children that train, forked from a process that has imported torch once, so that killing twenty of them is cheap.

`Zygote` is the test's side; the module's main program is the other. A request names a recipe, a directory and faults to
plant; the answer is the child's process id, then its exit status (negative: killed by that signal).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Zygote:
    """Starts training children one at a time."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.log = log

    def start(self, recipe: dict[str, Any], directory: Path, **request: Any) -> int:
        """Fork a child that trains; returns its process id."""
        message = {"recipe": recipe, "directory": str(directory), **request}
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """Exit status of the child: a code, or minus the signal that killed it."""
        return int(self._process.stdout.readline())

    def run(
        self,
        recipe: dict[str, Any],
        directory: Path,
        kill_after: float | None = None,
        number: int = signal.SIGKILL,
        **request: Any,
    ) -> int:
        """Start, perhaps signal after some seconds, and wait."""
        pid = self.start(recipe, directory, **request)
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return self.wait()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(30)
        self._log.close()


def _child(request: dict[str, Any]) -> None:
    import torch

    from torchstone.errors import TorchstoneError
    from torchstone.storage import atomic
    from torchstone.train.precision import Compute
    from torchstone.train.run import train

    torch.set_num_threads(request.get("threads", 1))
    if "stage" in request:
        seen = {"count": 0}

        def die(stage: str) -> None:
            seen["count"] += 1
            if seen["count"] == request["stage"]:
                print(f"dies at stage {stage!r}", file=sys.stderr, flush=True)
                os._exit(77)

        atomic.stage_hook = die
    if "file_limit" in request:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
    try:
        compute = Compute("fp32", False)
        train(
            request["recipe"],
            request["directory"],
            compute=compute,
            progress=lambda state: None,
            **request.get("options", {}),
        )
    except TorchstoneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    except BaseException as error:
        print(f"unexpected {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _main() -> None:
    import torch

    torch.set_num_threads(1)
    import torch._dynamo
    from tiny import tiny_recipe

    from torchstone.recipe.load import load_recipe
    from torchstone.train import run  # noqa: F401

    load_recipe(tiny_recipe())  # imports every part once, before forking

    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            _child(json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _main()
