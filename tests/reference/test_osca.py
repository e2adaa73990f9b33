"""Sample allocation against the reference vectors: every case, budget and number in the file."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from torchstone.llm.allocation import allocate, evaluate_fixed, pass_at_k
from torchstone.llm.allocation.hill_climb import hill_climb
from torchstone.llm.allocation.objectives import check_counts, success_rates, train_value

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE") or ROOT.parent / "shared" / "reference")
FILE = FOLDER / "osca.json"

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"no reference vectors: {FILE} is absent")
VECTORS = json.loads(FILE.read_text()) if FILE.is_file() else {"pass_at_k": [], "cases": []}
BUDGETS = [(case, row) for case in VECTORS["cases"] for row in case["budgets"]]


def tables(case: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train counts, test counts and runs of a case, from the file itself or from the data file it names."""
    if "data_file" not in case:
        return np.array(case["train_counts"]), np.array(case["test_counts"]), np.array(case["runs"])
    path = FOLDER.parent / case["data_file"]
    if not path.is_file():
        pytest.skip(f"the published table {path} is absent")
    _, runs, *rows = list(csv.reader(path.read_text().splitlines()))
    train, test = (np.array([row[2:] for row in rows if row[0] == part], dtype=int) for part in ("train", "test"))
    return train, test, np.array(runs[2:], dtype=int)


@pytest.fixture(params=BUDGETS, ids=lambda pair: f"{pair[0]['name']}-{pair[1]['C']}")
def case(request: pytest.FixtureRequest) -> tuple:
    found, row = request.param
    return *tables(found), row


def test_pass_at_k() -> None:
    for runs, successes, k, value in VECTORS["pass_at_k"]:
        assert pass_at_k(runs, successes, k) == pytest.approx(value, abs=1e-9), (runs, successes, k)


def test_greedy_reaches_the_reference_values(case: tuple) -> None:
    train, test, runs, row = case
    found = allocate(train, runs, row["C"], method="greedy")
    assert found.total == row["C"]
    assert found.train_value == pytest.approx(row["greedy"]["train"], abs=1e-9)
    assert found.evaluate(test, runs).value == pytest.approx(row["greedy"]["test"], abs=1e-7)
    assert found.curve.value[-1] == pytest.approx(row["greedy"]["train"], abs=1e-9)


def test_hill_climb_from_the_reference_start(case: tuple) -> None:
    train, test, runs, row = case
    rates = success_rates(*check_counts(train, runs))
    reference = row["hill_climb"]
    assert train_value(rates, reference["counts"]) == pytest.approx(reference["train"], abs=1e-9)
    assert evaluate_fixed(reference["counts"], test, runs).value == pytest.approx(reference["test"], abs=1e-7)
    start = reference.get("start_sequence")
    if start:
        assert np.bincount(start, minlength=runs.size).tolist() == row["start"]
        found = hill_climb(rates, start)
        assert found.sum() == row["C"]
        assert train_value(rates, found) == pytest.approx(reference["train"], abs=1e-9)


def test_exact_and_exchange(case: tuple) -> None:
    train, test, runs, row = case
    swapped = allocate(train, runs, row["C"], method="greedy+swap")
    assert swapped.train_value >= row["greedy"]["train"] - 1e-12
    if row.get("exact"):
        found = allocate(train, runs, row["C"], method="exact")
        assert found.train_value == pytest.approx(row["exact"]["train"], abs=1e-9)
        assert found.train_value >= swapped.train_value - 1e-12


def test_default_is_no_worse_than_the_authors(case: tuple) -> None:
    train, _, runs, row = case
    best = max(row["hill_climb"]["train"], row["greedy"]["train"])
    assert allocate(train, runs, row["C"]).train_value >= best - 1e-9


def test_certificate_is_sound_and_as_tight_as_the_reference(case: tuple) -> None:
    train, _, runs, row = case
    found = allocate(train, runs, row["C"])
    values = [row["hill_climb"]["train"], row["greedy"]["train"], found.train_value]
    assert found.upper_bound >= max(values) - 1e-12
    assert found.upper_bound <= row["relaxed_upper_bound"] + 1e-9


def test_pure_test_values(case: tuple) -> None:
    _, test, runs, row = case
    for index, value in enumerate(row["pure_test"]):
        if value is not None and runs[index] >= row["C"]:
            only = np.zeros(runs.size, dtype=int)
            only[index] = row["C"]
            assert evaluate_fixed(only, test, runs).value == pytest.approx(value, abs=1e-7)
