"""What benchmarks share: candidates measured in turns, ratios within a round, and the options of a script."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Runs = Mapping[str, Callable[[], object]]


def measure(runs: Runs, rounds: int, clock: Callable[[], float], warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after `warm` rounds; each round goes the other way."""
    for run in [*runs.values()] * warm:
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            begun = clock()
            runs[name]()
            found[name].append(clock() - begun)
    return found


def ratio(over: list[float], under: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(one / other for one, other in zip(over, under, strict=True))


def parser_of(description: str | None, rounds: int, quick: int) -> argparse.ArgumentParser:
    """The options that such scripts have; `started` reads them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_const", const=quick, dest="rounds", help=f"{quick} rounds")
    parser.add_argument("--cpu", action="store_true", help="processor time; meaningful with --threads 1 only")
    parser.add_argument("--json", type=Path)
    return parser


def started(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Callable[[], float]]:
    """The options given, with threads set, and the clock to use."""
    given = parser.parse_args()
    if given.cpu and given.threads != 1:
        parser.error("--cpu adds up the time of all threads; use it with --threads 1")
    torch.set_num_threads(given.threads)
    return given, time.process_time if given.cpu else time.perf_counter
