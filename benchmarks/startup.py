"""CPU seconds that the light commands cost, beside an empty Python and beside `import torch`.

    python benchmarks/startup.py [--repetitions 9]

Promise: `torchstone --help`, `methods` and `where` cost at most 0.4 CPU seconds and import no torch. CPU
seconds (user and system, of the child process) are counted rather than wall time, because other work on the
machine delays but hardly changes them. Commands alternate, so that a slow minute hits all of them. Exit code
1 if the promise is broken.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

PROMISE = 0.4
EMPTY, TORCH = "python -c pass", "import torch"
PROMISED = ("torchstone --help", "torchstone methods", "torchstone where osca", "import torchstone")
COMMANDS = {
    EMPTY: ["-c", "pass"],
    "import torchstone": ["-c", "import torchstone"],
    "torchstone --help": ["-m", "torchstone", "--help"],
    "torchstone methods": ["-m", "torchstone", "methods"],
    "torchstone where osca": ["-m", "torchstone", "where", "osca"],
    "import typer": ["-c", "import typer"],
    "import rich.console": ["-c", "import rich.console"],
    "import pydantic": ["-c", "import pydantic"],
    "import yaml": ["-c", "import yaml"],
    "import numpy": ["-c", "import numpy"],
    TORCH: ["-c", "import torch"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds of one child Python with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure, print a table, and say whether the promise holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    repetitions = parser.parse_args().repetitions
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for name in COMMANDS:
        cpu_seconds(COMMANDS[name])
    for _ in range(repetitions):
        for name in COMMANDS:
            seconds[name].append(cpu_seconds(COMMANDS[name]))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"{'command':<24}{'CPU s':>8}{'worst':>8}{'/ empty':>10}{'/ torch':>10}")
    for name, median in medians.items():
        print(
            f"{name:<24}{median:>8.3f}{max(seconds[name]):>8.3f}{median / medians[EMPTY]:>9.1f}x"
            f"{median / medians[TORCH]:>9.3f}x"
        )
    broken = [name for name in PROMISED if medians[name] > PROMISE]
    print(f"promise (<= {PROMISE} CPU s): {'broken by ' + ', '.join(broken) if broken else 'kept'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
