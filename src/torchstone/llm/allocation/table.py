"""Read counts of successes from a table or from a log of samples.

CSV: one row per problem, a column `problem`, one column per configuration, optionally a split column with
`train` and `test`. Trials are given by a row named `runs` (in the problem or the split column), or in every
cell as `successes/trials`:

    problem,split,small@0.2,small@1.0           problem,small@0.2,small@1.0
    runs,,300,300                               task-1,3/20,7/20
    task-1,train,3,12                           task-2,0/20,1/16

JSONL: one sample per line, `{"problem": "task-1", "configuration": "small@0.2", "correct": true}`,
optionally with `"split"`; counts are added up.

Everything wrong stops with file and line: it is not guessed what an empty cell means.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from torchstone.errors import DataError
from torchstone.llm.allocation.objectives import Ints

PROBLEM = "problem"
RUNS = "runs"
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}


@dataclass(frozen=True)
class CountTable:
    """Successes and trials.

    Attributes:
        problems: P ids.
        configurations: S names.
        counts, runs: (P, S) successes and trials.
        split: `train` or `test` per problem; empty if the table has no split.
        source: name for messages.
    """

    problems: tuple[str, ...]
    configurations: tuple[str, ...]
    counts: Ints
    runs: Ints
    split: tuple[str, ...] = ()
    source: str = "table"

    def rows(self, index: Sequence[int] | Ints) -> CountTable:
        """The table of some of the problems."""
        chosen = [int(i) for i in index]
        return replace(
            self,
            problems=tuple(self.problems[i] for i in chosen),
            counts=self.counts[chosen],
            runs=self.runs[chosen],
            split=tuple(self.split[i] for i in chosen) if self.split else (),
        )

    def part(self, name: str) -> CountTable:
        """The problems of one split (`train` or `test`); raises DataError if there are none."""
        index = [i for i, split in enumerate(self.split) if split == name]
        if not index:
            raise DataError(
                f"{self.source} has no problem whose split is {name!r}; use --split kfold:5 or half instead."
            )
        return self.rows(index)

    def overlap(self) -> str:
        """What is wrong with the split, in one sentence; empty if nothing is.

        Problems that are in both parts, or parts with the same counts throughout, make the test value
        in-sample.
        """
        train, test = self.part("train"), self.part("test")
        shared = len(set(train.problems) & set(test.problems))
        if shared:
            return (
                f"{shared} of {len(test.problems)} test problems are also training problems: their test "
                "values are in-sample, hence optimistic. Remove them from one part, or use --split kfold:5."
            )
        if sorted(map(tuple, train.counts.tolist())) == sorted(map(tuple, test.counts.tolist())):
            return (
                f"all {len(test.problems)} test problems have exactly the counts of the training problems "
                "under other names: the test values are in-sample, hence optimistic. Use --split kfold:5 on "
                "one copy."
            )
        return ""


def read_table(path: str | Path, split: str | None = None) -> CountTable:
    """Read a `.csv` table or a `.jsonl` sample log.

    Args:
        path: the file.
        split: name of the split column or key; None takes `split` where there is one.

    Raises:
        DataError: the file is missing, is not text, or its content cannot be used; names the line.
    """
    path = Path(path)
    text = _read_text(path)
    if path.suffix == ".jsonl":
        table = _from_log(path, text, split)
    elif path.suffix == ".csv":
        table = _from_csv(path, text, split)
    else:
        raise DataError(f"{path} is neither a .csv table nor a .jsonl sample log; name the file by its format.")
    repeated = [
        name
        for name, count in Counter(zip(table.problems, table.split or table.problems, strict=True)).items()
        if count > 1
    ]
    if repeated:
        raise DataError(
            f"{path}: problem {repeated[0][0]!r} has several rows ({len(repeated)} such problems); give one each."
        )
    return table


def read_cost(path: str | Path, configurations: Sequence[str]) -> list[float]:
    """Costs per sample from a JSON object configuration -> number, in the order of `configurations`.

    Raises:
        DataError: unreadable, not an object of numbers, or its names are not those of the table.
    """
    path = Path(path)
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path} is not valid JSON ({error}); it must look like {{"small@0.2": 0.1, …}}.') from None
    numbers = isinstance(content, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in content.values()
    )
    if not numbers:
        raise DataError(f"{path} must be a JSON object that maps every configuration to the cost of one sample.")
    missing = [name for name in configurations if name not in content]
    unknown = [name for name in content if name not in configurations]
    if missing or unknown:
        raise DataError(
            f"{path} must name exactly the configurations of the table; missing: {missing[:8]}, unknown: {unknown[:8]}."
        )
    return [float(content[name]) for name in configurations]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}. Give the path of an existing file.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path}:{line}: contains a NUL byte; this is not a text table.")
    if not text.strip():
        raise DataError(f"{path} is empty; it needs a header and at least one problem.")
    return text


def _from_csv(path: Path, text: str, split: str | None) -> CountTable:
    rows = _csv_rows(path, text)
    _, header = next(rows)
    split_at, names = _columns(path, header, split)
    problem_at = header.index(PROBLEM)
    config_at = [header.index(name) for name in names]
    runs_row: list[int] | None = None
    problems, splits, cells = [], [], []
    for line, row in rows:
        where = f"{path}:{line}"
        values = [row[i].strip() for i in config_at]
        if RUNS in (
            row[problem_at].strip().lower(),
            row[split_at].strip().lower() if split_at is not None else "",
        ):
            if runs_row is not None:
                raise DataError(f"{where}: a second `runs` row; a table has one.")
            runs_row = [_number(where, name, value) for name, value in zip(names, values, strict=True)]
            continue
        problems.append(_problem(where, row[problem_at]))
        if split_at is not None:
            splits.append(_split(where, row[split_at]))
        cells.append((where, values))
    if not problems:
        raise DataError(f"{path} has no problem; it needs one row per problem below the header.")
    _refuse_missing(problems, names, [[not value for value in values] for _, values in cells], str(path))
    counts, runs = _cells(cells, names, runs_row, path)
    return CountTable(tuple(problems), tuple(names), counts, runs, tuple(splits), path.name)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Lines that are not blank, with line numbers; every row has the header's length."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    width: int | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not a CSV row ({error}).") from None
        if not any(cell.strip() for cell in row):
            continue
        if width is None:
            row, width = [cell.strip() for cell in row], len(row)
        if len(row) != width:
            raise DataError(f"{path}:{reader.line_num}: {len(row)} cells, but the header has {width}.")
        yield reader.line_num, row


def _columns(path: Path, header: list[str], split: str | None) -> tuple[int | None, list[str]]:
    """Position of the split column (None without one) and the names of the configurations."""
    if PROBLEM not in header:
        raise DataError(f"{path} needs a column named {PROBLEM!r}; its columns are {', '.join(header[:12])}.")
    column = split if split is not None else "split"
    if split is not None and split not in header:
        raise DataError(f"{path} has no column {split!r} to split by; its columns are {', '.join(header[:12])}.")
    names = [name for name in header if name not in (PROBLEM, column)]
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated or "" in names or not names:
        what = (
            f"column {repeated[0]!r} appears twice"
            if repeated
            else "a column has no name"
            if names
            else "no configuration"
        )
        raise DataError(f"{path}: {what}; give one differently named column per configuration.")
    return (header.index(column) if column in header else None), names


def _cells(
    cells: list[tuple[str, list[str]]], names: list[str], runs_row: list[int] | None, path: Path
) -> tuple[Ints, Ints]:
    counts = np.empty((len(cells), len(names)), dtype=np.int64)
    runs = np.empty_like(counts)
    for p, (where, values) in enumerate(cells):
        for s, (name, value) in enumerate(zip(names, values, strict=True)):
            successes, slash, trials = value.partition("/")
            if bool(slash) == (runs_row is not None):
                raise DataError(
                    f"{where}: column {name!r} has {value!r}; either the table has a `runs` row and plain "
                    "counts, or every cell is written successes/trials."
                )
            counts[p, s] = _number(where, name, successes)
            runs[p, s] = _number(where, name, trials) if slash else (runs_row or [])[s]
            if not 0 <= counts[p, s] <= runs[p, s] or runs[p, s] < 1:
                raise DataError(
                    f"{where}: column {name!r} has {counts[p, s]} successes of {runs[p, s]} runs; successes "
                    "must lie between 0 and the runs, and there must be a run."
                )
    return counts, runs


def _number(where: str, name: str, value: str) -> int:
    value = value.strip()
    if not (value.isascii() and value.isdigit() and len(value) <= 12):
        raise DataError(f"{where}: column {name!r} has {value!r}, which is not a whole number.")
    return int(value)


def _problem(where: str, value: str) -> str:
    if not value.strip():
        raise DataError(f"{where}: the problem has no name.")
    return value.strip()


def _split(where: str, value: str) -> str:
    if value.strip().lower() not in SPLITS:
        raise DataError(f"{where}: split {value.strip()!r} is neither 'train' nor 'test'.")
    return SPLITS[value.strip().lower()]


def _from_log(path: Path, text: str, split: str | None) -> CountTable:
    key = split if split is not None else "split"
    trials: Counter[tuple[str, str]] = Counter()
    successes: Counter[tuple[str, str]] = Counter()
    splits: dict[str, str] = {}
    problems: dict[str, int] = {}
    names: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        problem, name, correct, part = _sample(where, line, key, required=split is not None)
        problems.setdefault(problem, len(problems))
        names.setdefault(name, len(names))
        if splits.setdefault(problem, part) != part:
            raise DataError(
                f"{where}: problem {problem!r} is {part or 'without split'!r} here but {splits[problem]!r} "
                "above; a problem belongs to one part."
            )
        trials[problem, name] += 1
        successes[problem, name] += correct
    missing = [[(problem, name) not in trials for name in names] for problem in problems]
    _refuse_missing(list(problems), list(names), missing, str(path))
    parts = tuple(splits.values())
    if any(parts) and not all(parts):
        raise DataError(f"{path}: some samples have {key!r} and others do not; give it on every line or on none.")
    counts = np.array([[successes[p, c] for c in names] for p in problems], dtype=np.int64)
    runs = np.array([[trials[p, c] for c in names] for p in problems], dtype=np.int64)
    return CountTable(tuple(problems), tuple(names), counts, runs, parts if all(parts) else (), path.name)


def _sample(where: str, line: str, key: str, required: bool) -> tuple[str, str, bool, str]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object ({error}).") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a sample must be a JSON object; given {type(row).__name__}.")
    for name, kind in ((PROBLEM, str | int), ("configuration", str), ("correct", bool)):
        if not isinstance(row.get(name), kind) or (name == PROBLEM and isinstance(row[name], bool)):
            raise DataError(
                f"{where}: {name!r} is {row.get(name)!r}; a sample needs problem (text), configuration "
                "(text) and correct (true or false)."
            )
    if required and key not in row:
        raise DataError(f"{where}: has no {key!r} to split by.")
    part = _split(where, str(row[key])) if key in row else ""
    return str(row[PROBLEM]), row["configuration"], row["correct"], part


def _refuse_missing(problems: list[str], names: list[str], missing: list[list[bool]], source: str) -> None:
    cells = [(problems[p], names[s]) for p, row in enumerate(missing) for s, gone in enumerate(row) if gone]
    if cells:
        shown = ", ".join(f"{problem} × {name}" for problem, name in cells[:5])
        raise DataError(
            f"{source}: {len(cells)} cells are missing ({shown}{', …' if len(cells) > 5 else ''}). Every "
            "configuration must be sampled on every problem; run them, or leave the problem or the "
            "configuration out."
        )
