"""Count tables and sample logs: formats, refusals with file and line, overlap, costs, hostile input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from torchstone.errors import ConfigError, DataError
from torchstone.llm.allocation.files import write_summary
from torchstone.llm.allocation.populations import KINDS, generate_table, true_rates
from torchstone.llm.allocation.summary import Request, added_problems, split_column, summarise
from torchstone.llm.allocation.table import CountTable, read_cost, read_table
from torchstone.llm.allocation.trial import random_halves, spend, subsample

GOOD = "problem,split,a,b\nruns,,4,8\np1,train,1,2\np2,test,0,8\n"


def write(folder: Path, content: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(folder: Path, content: str | bytes, match: str, name: str = "table.csv", split: str | None = None) -> None:
    with pytest.raises(DataError, match=match):
        read_table(write(folder, content, name), split)


class TestCSV:
    def test_table_with_runs_row_and_split(self, tmp_path: Path) -> None:
        table = read_table(write(tmp_path, GOOD))
        assert table.problems == ("p1", "p2") and table.configurations == ("a", "b")
        assert table.counts.tolist() == [[1, 2], [0, 8]] and table.runs.tolist() == [[4, 8], [4, 8]]
        assert table.split == ("train", "test")
        assert table.part("test").problems == ("p2",)

    def test_runs_row_may_stand_anywhere_and_in_either_column(self, tmp_path: Path) -> None:
        table = read_table(write(tmp_path, "split,problem,a\ntrain,p1,1\nruns,,5\ntest,p2,0\n"))
        assert table.runs.tolist() == [[5], [5]]

    def test_pairs_in_cells(self, tmp_path: Path) -> None:
        table = read_table(write(tmp_path, "problem,a,b\np1,1/4,0/2\np2,3/3, 2 / 9 \n"))
        assert table.counts.tolist() == [[1, 0], [3, 2]] and table.runs.tolist() == [[4, 2], [3, 9]]

    def test_named_split_column(self, tmp_path: Path) -> None:
        table = read_table(write(tmp_path, "problem,part,a\nruns,,3\np1,Training,1\np2,TEST,0\n"), "part")
        assert table.split == ("train", "test")

    def test_byte_order_mark_crlf_blank_lines_and_quotes(self, tmp_path: Path) -> None:
        content = b'\xef\xbb\xbfproblem,"a,b"\r\nruns,3\r\n\r\n"p ""1""",2\r\n'
        table = read_table(write(tmp_path, content))
        assert table.configurations == ("a,b",) and table.problems == ('p "1"',)

    def test_one_problem_may_have_a_row_in_either_part(self, tmp_path: Path) -> None:
        table = read_table(write(tmp_path, "problem,split,a\nruns,,3\np1,train,1\np1,test,2\n"))
        assert "1 of 1 test problems are also training problems" in table.overlap()

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("problem,a\nruns,3\np1,4\n", r"table.csv:3: column 'a' has 4 successes of 3 runs"),
            ("problem,a\nruns,0\np1,0\n", r":3: .*there must be a run"),
            ("problem,a,b\nruns,3,3\np1,1,\np2,,\n", r"3 cells are missing \(p1 × b, p2 × a, p2 × b\)"),
            ("problem,a\nruns,3\np1,x\n", r":3: column 'a' has 'x'"),
            ("problem,a\nruns,3\np1,-1\n", r":3: column 'a' has '-1'"),
            ("problem,a\nruns,3\np1,1.5\n", r":3: .*not a whole number"),
            ("problem,a\nruns,3\np1,1e999\n", r":3: .*not a whole number"),
            ("problem,a\nruns,3\np1,99999999999999999999\n", r":3: .*not a whole number"),
            ("problem,a\nruns,3\np1,1/4\n", r":3: .*successes/trials"),
            ("problem,a\np1,1\n", r":2: .*`runs` row"),
            ("problem,a\nruns,3\nruns,3\np1,1\n", r":3: a second `runs` row"),
            ("problem,a\nruns,3\n", "has no problem"),
            ("a,b\n1,2\n", "needs a column named 'problem'"),
            ("problem\np1\n", "no configuration"),
            ("problem,a,a\nruns,3,3\np1,1,1\n", "'a' appears twice"),
            ("problem,a,\nruns,3,3\np1,1,1\n", "a column has no name"),
            ("problem,a\nruns,3\np1,1,2\n", r":3: 3 cells, but the header has 2"),
            ("problem,a\nruns,3\n,1\n", r":3: the problem has no name"),
            ("problem,a\nruns,3\np1,1\np1,2\n", "problem 'p1' has several rows"),
            ("problem,split,a\nruns,,3\np1,dev,1\n", r":3: split 'dev' is neither"),
            ('problem,a\nruns,3\n"p1,1\n', r"table.csv:\d: not a CSV row"),
            ("", "is empty"),
            ("\n \n", "is empty"),
        ],
    )
    def test_refusals_name_the_line(self, tmp_path: Path, content: str, match: str) -> None:
        refused(tmp_path, content, match)

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        refused(tmp_path, b"problem,a\nruns,3\np\xff1,1\n", r":3: not UTF-8")
        refused(tmp_path, b"problem,a\nruns,3\np\x001,1\n", r":3: contains a NUL byte")

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot read"):
            read_table(tmp_path / "absent.csv")
        with pytest.raises(DataError, match="cannot read"):
            read_table(tmp_path)
        refused(tmp_path, GOOD, "neither a .csv table nor a .jsonl", name="table.xlsx")

    def test_unknown_split_column(self, tmp_path: Path) -> None:
        refused(tmp_path, GOOD, "no column 'fold' to split by", split="fold")


class TestLog:
    def test_samples_are_counted(self, tmp_path: Path) -> None:
        lines = [
            '{"problem": "p1", "configuration": "a", "correct": true}',
            '{"problem": "p1", "configuration": "a", "correct": false}',
            "",
            '{"problem": 2, "configuration": "a", "correct": true, "text": "more"}',
        ]
        table = read_table(write(tmp_path, "\n".join(lines), "log.jsonl"))
        assert table.problems == ("p1", "2")
        assert table.counts.tolist() == [[1], [1]] and table.runs.tolist() == [[2], [1]]

    def test_split_key(self, tmp_path: Path) -> None:
        row = '{"problem": "%s", "configuration": "a", "correct": true, "split": "%s"}'
        table = read_table(write(tmp_path, row % ("p", "train") + "\n" + row % ("q", "test"), "log.jsonl"))
        assert table.split == ("train", "test")
        refused(tmp_path, row % ("p", "train") + "\n" + row % ("p", "test"), "belongs to one part", "log.jsonl")

    @pytest.mark.parametrize(
        ("line", "match"),
        [
            ("{", "log.jsonl:2: not a JSON object"),
            ("[1]", ":2: a sample must be a JSON object"),
            ('{"problem": "p", "configuration": "a"}', ":2: 'correct' is None"),
            ('{"problem": "p", "configuration": "a", "correct": 1}', ":2: 'correct' is 1"),
            ('{"problem": true, "configuration": "a", "correct": true}', ":2: 'problem' is True"),
            ('{"problem": "p", "configuration": null, "correct": true}', ":2: 'configuration' is None"),
            ("[" * 100_000, ":2: not a JSON object"),
        ],
    )
    def test_refusals_name_the_line(self, tmp_path: Path, line: str, match: str) -> None:
        first = '{"problem": "p", "configuration": "a", "correct": true}\n'
        refused(tmp_path, first + line, match, "log.jsonl")

    def test_missing_cells(self, tmp_path: Path) -> None:
        line = '{"problem": "%s", "configuration": "%s", "correct": true}\n'
        lines = line % ("p", "a") + line % ("q", "b")
        refused(tmp_path, lines, r"2 cells are missing \(p × b, q × a\)", "log.jsonl")


class TestCost:
    def test_costs_in_the_order_of_the_table(self, tmp_path: Path) -> None:
        assert read_cost(write(tmp_path, '{"b": 2, "a": 0.5}', "cost.json"), ["a", "b"]) == [0.5, 2.0]

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ('{"a": 1}', r"missing: \['b'\]"),
            ('{"a": 1, "b": 1, "c": 1}', r"unknown: \['c'\]"),
            ('{"a": 1, "b": "2"}', "maps every configuration"),
            ('{"a": 1, "b": true}', "maps every configuration"),
            ("[1, 2]", "maps every configuration"),
            ("{", "not valid JSON"),
        ],
    )
    def test_refusals(self, tmp_path: Path, content: str, match: str) -> None:
        with pytest.raises(DataError, match=match):
            read_cost(write(tmp_path, content, "cost.json"), ["a", "b"])


class TestSummary:
    def table(self, **changes: object) -> CountTable:
        return generate_table("complementary", 40, 6, 32, np.random.default_rng(0))

    def test_split_column_half_and_folds(self) -> None:
        table = self.table()
        for split, text in (
            (None, "20 problems"),
            ("half", "random half"),
            ("kfold:4", "4 folds"),
            ("split", "20 problems"),
        ):
            found = summarise(table, Request(16, split=split))
            assert text in found.tested
            assert found.allocation.total == 16
            assert [row.budget for row in found.rows] == [1, 2, 4, 8, 16]
            assert not found.warnings

    def test_folds_are_the_default_without_a_split(self) -> None:
        table = generate_table("complementary", 40, 4, 16, np.random.default_rng(0))
        table = CountTable(table.problems, table.configurations, table.counts, table.runs)
        assert "5 folds" in summarise(table, Request(4)).tested
        with pytest.raises(ConfigError, match="unknown split 'thirds'"):
            summarise(table, Request(4, split="thirds"))

    def test_planted_structure_is_found(self) -> None:
        table = generate_table("complementary", 160, 9, 64, np.random.default_rng(0))
        last = summarise(table, Request(16, split="kfold:4")).rows[-1]
        assert last.gain is not None and last.gain.low > 0

    def test_baselines_that_need_more_runs_are_left_out(self) -> None:
        found = summarise(generate_table("complementary", 40, 6, 6, np.random.default_rng(0)), Request(9))
        assert found.rows[-1].pure is None and found.rows[-1].uniform is None and found.rows[-1].gain is None
        assert found.as_json()["curve"][-1]["pure"] is None

    def test_costs_leave_uniform_mixing_out(self) -> None:
        found = summarise(self.table(), Request(3.0, cost=[1, 1, 1, 2, 2, 2]))
        assert all(row.uniform is None for row in found.rows)
        assert found.allocation.counts @ np.array([1, 1, 1, 2, 2, 2]) <= 3.0

    def test_the_same_problems_in_both_parts_are_warned_of_with_the_count(self) -> None:
        part = generate_table("complementary", 20, 4, 16, np.random.default_rng(0))
        twice = CountTable(
            part.problems * 2, part.configurations, np.tile(part.counts, (2, 1)), np.tile(part.runs, (2, 1)),
            ("train",) * 20 + ("test",) * 20,
        )  # fmt: skip
        with pytest.warns(UserWarning, match="all 20 test problems"):
            found = summarise(twice, Request(4))
        assert "20 of 20 test problems are also training problems" in found.warnings[0]
        with pytest.raises(DataError, match="20 problems of table have a row in both parts"):
            summarise(twice, Request(4, split="kfold:5"))

    def test_equal_counts_under_other_names_are_warned_of(self) -> None:
        part = generate_table("complementary", 20, 4, 16, np.random.default_rng(0))
        renamed = CountTable(
            (*part.problems, *(f"other-{name}" for name in part.problems)), part.configurations,
            np.concatenate([part.counts, part.counts[::-1]]), np.tile(part.runs, (2, 1)),
            ("train",) * 20 + ("test",) * 20,
        )  # fmt: skip
        assert "exactly the counts" in summarise(renamed, Request(4)).warnings[0]

    def test_a_single_run_is_warned_of(self) -> None:
        table = generate_table("complementary", 40, 6, 1, np.random.default_rng(0))
        assert any("only 1 run" in warning for warning in summarise(table, Request(4)).warnings)

    def test_added_problems(self) -> None:
        table = CountTable(("p", "q", "r"), ("a", "b"), np.array([[1, 0], [2, 3], [0, 1]]), np.full((3, 2), 4))
        assert added_problems(table).tolist() == [[2, 1], [1, 2]]

    def test_split_column_names(self) -> None:
        assert [split_column(s) for s in (None, "half", "kfold:5", "part")] == [None, None, None, "part"]

    def test_files_quote_formulas(self, tmp_path: Path) -> None:
        table = generate_table("complementary", 20, 3, 16, np.random.default_rng(0))
        table = CountTable(table.problems, ("=1+1", "b,c", "@x"), table.counts, table.runs)
        written = write_summary(summarise(table, Request(4)), tmp_path / "out")
        assert {path.name for path in written} == {path.name for path in (tmp_path / "out").iterdir()}
        for path in written:
            if path.suffix == ".csv":
                cells = path.read_text().replace("\n", ",").split(",")
                assert not any(cell.startswith(("=", "@")) for cell in cells)


class TestPopulations:
    @pytest.mark.parametrize("kind", KINDS)
    def test_structure(self, kind: str) -> None:
        rates = true_rates(kind, 400, 6, np.random.default_rng(0))
        assert ((rates >= 0) & (rates <= 1)).all() and (rates.sum(axis=1) == 0).mean() > 0.1
        if kind == "identical":
            assert (rates == rates[:, :1]).all()
        if kind == "dominated":
            assert (rates[:, 0] >= rates.max(axis=1)).all()
        if kind == "complementary":
            best = rates.argmax(axis=1)[rates.sum(axis=1) > 0]
            assert len(set(best % 2)) == 2

    def test_unknown_kind(self) -> None:
        with pytest.raises(ConfigError, match="unknown population"):
            true_rates("friendly", 10, 2, np.random.default_rng(0))

    def test_halves_are_exchanged_between_neighbouring_seeds(self) -> None:
        table = generate_table("identical", 21, 3, 16, np.random.default_rng(0))
        first, second = random_halves(table, 4), random_halves(table, 5)
        assert first[0].problems == second[1].problems and first[1].problems == second[0].problems
        assert set(first[0].problems) & set(first[1].problems) == set()
        assert random_halves(table, 4, runs=5)[0].problems == first[0].problems
        both = random_halves(table, 4, runs=5, in_sample=True)
        assert both[0] is both[1] and len(both[0].problems) == 21

    def test_subsample_draws_without_replacement(self) -> None:
        table = generate_table("complementary", 50, 4, 10, np.random.default_rng(0))
        assert subsample(table, 10, np.random.default_rng(1)).counts.tolist() == table.counts.tolist()
        few = subsample(table, 3, np.random.default_rng(1))
        assert (few.counts <= np.minimum(table.counts, 3)).all() and (few.runs == 3).all()
        with pytest.raises(DataError, match="cannot draw 11 runs"):
            subsample(table, 11, np.random.default_rng(1))

    def test_policies(self) -> None:
        train, test = random_halves(generate_table("complementary", 60, 6, 32, np.random.default_rng(0)), 0)
        values = {policy: spend(policy, train, test, 8) for policy in ("mixed", "pure", "uniform", "oracle")}
        assert values["oracle"][0].value >= values["pure"][0].value
        assert values["mixed"][1] is not None and values["pure"][1] is None
        with pytest.raises(ConfigError, match="unknown policy"):
            spend("magic", train, test, 8)
