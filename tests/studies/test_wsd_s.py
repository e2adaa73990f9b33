"""The study end to end at smoke scale; its protocols at equal compute, shared beginnings, and SGD on tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from torchstone.data.synthetic.mixed_bigram import Excess, MixedBigramConfig
from torchstone.diagnose.landscape.interpolate import LossLine
from torchstone.diagnose.landscape.split import EntropySplit
from torchstone.lab.progress import Quiet
from torchstone.lab.runnable import Runnable
from torchstone.lab.study import Arm, Cell, Measurement
from torchstone.report.write import load
from torchstone.studies import _wsd_s as parts
from torchstone.studies import _wsd_s_report as shown
from torchstone.studies._wsd_s_plans import Factors, Plan, follow, partings, plan_of
from torchstone.studies._wsd_s_table import TableLearner, TableLook
from torchstone.studies._wsd_s_text import TextLearner, base
from torchstone.studies.wsd_s import TABLE, TEXT, WSDS
from torchstone.train.budget import counts_of

TOY = WSDS.scales["toy"].settings
SMOKE = WSDS.scales["smoke"].settings
TASKS = [MixedBigramConfig(vocab_size=6, pairs=5, table_seed=seed).build() for seed in (1, 2)]


@pytest.mark.parametrize("half", ["table", "text"])
@pytest.mark.parametrize("protocol", list(TABLE))
def test_protocols_cost_what_they_say(half: str, protocol: str) -> None:
    s = TOY[half]
    plan, ends = plan_of(protocol, s), s["ends"]
    decays = [int(s["fraction"] * end) for end in ends]
    extra = {"oracle": None, "wsd-free": sum(decays[:-1])}.get(protocol, 0)
    if extra is not None:
        assert plan.cost == ends[-1] + extra
    else:
        assert ends[-1] < plan.cost <= sum(ends)
    behind = [end - (sum(decays[:j]) if protocol == "wsd" else 0) for j, end in enumerate(ends)]
    assert [len(run) for run in plan.runs] == behind
    for j, run in enumerate(plan.runs):
        if protocol in ("wsd", "wsd-free", "wsd-s", "wsd-s-rewarmed"):
            assert plan.before[j] == len(run) - decays[j]
            assert run[plan.before[j] - 1] == 1.0 > run[plan.before[j]] >= run[-1] >= s["floor"]
    assert max(max(run) for run in plan.runs) == 1.0


@pytest.mark.parametrize("half", ["table", "text"])
def test_all_protocols_warm_up_alike(half: str) -> None:
    s = TOY[half]
    for protocol in TABLE:
        for run in plan_of(protocol, s).runs:
            assert list(run[: s["warmup"]]) == [k / s["warmup"] for k in range(s["warmup"])]
            assert run[s["warmup"]] == 1.0


def test_wsd_goes_back_to_the_plateau_and_wsd_s_does_not() -> None:
    s = TOY["text"]
    ends, wsd, wsd_s = s["ends"], plan_of("wsd", s), plan_of("wsd-s", s)
    assert min(wsd.runs[2][s["warmup"] : wsd.before[2]]) == 1.0
    assert (
        wsd_s.runs[2][: ends[0]] == wsd_s.runs[0] and wsd_s.runs[2][ends[0] - 1] < 0.2 and wsd_s.runs[2][ends[0]] == 1.0
    )
    warmed = plan_of("wsd-s-rewarmed", s).runs[2][ends[0] : ends[0] + s["rewarmup"] + 1]
    assert warmed[0] == pytest.approx(s["floor"], abs=0.02) and warmed[-1] == 1.0 and list(warmed) == sorted(warmed)


class Recorder:
    """A learner whose state is the list of what it was told."""

    def __init__(self) -> None:
        self.done: list[tuple[int, float]] = []
        self.steps = 0

    def state(self) -> list[tuple[int, float]]:
        return list(self.done)

    def load(self, state: list[tuple[int, float]]) -> None:
        self.done = list(state)

    def advance(self, step: int, factor: float) -> None:
        assert step == len(self.done)
        self.done.append((step, factor))
        self.steps += 1


def test_shared_beginnings_are_trained_once_and_every_run_sees_its_own_rates() -> None:
    runs: list[Factors] = [(1.0, 1.0, 0.5), (1.0, 1.0, 1.0, 0.5), (1.0, 1.0, 0.5, 0.1), (0.3,), (1.0, 1.0, 1.0, 0.5)]
    learner, seen = Recorder(), {}

    def look(run: int, step: int) -> None:
        seen[run, step] = [factor for _, factor in learner.done]

    follow(runs, learner, lambda run: {len(runs[run])}, look)
    assert {run: tuple(factors) for (run, _), factors in seen.items()} == dict(enumerate(runs))
    assert partings(runs) == [(-1, 0), (0, 2), (0, 3), (-1, 0), (1, 4)]
    assert learner.steps == 3 + 2 + 1 + 1 + 0


def test_the_path_of_a_run_includes_what_was_seen_before_it_parted() -> None:
    runs: list[Factors] = [(1.0, 1.0, 0.5), (1.0, 1.0, 1.0, 0.5)]
    seen = {(0, 0): "a", (0, 1): "b", (0, 3): "decayed", (1, 2): "c", (1, 4): "end"}
    assert parts._path(runs, seen, 1) == [(0, "a"), (1, "b"), (2, "c"), (4, "end")]


def test_a_table_step_is_sgd_on_cross_entropy() -> None:
    learner = TableLearner(TASKS, seed=3, peak=4.0, batch=5)
    logits_rvv = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    learner.load(logits_rvv.numpy())
    counts_rvv = torch.from_numpy(learner._counts(2))
    assert counts_rvv.sum((1, 2)).tolist() == [5.0, 5.0] and not torch.equal(counts_rvv[0], counts_rvv[1])
    weight = logits_rvv.clone().requires_grad_()
    loss = -(counts_rvv * weight.log_softmax(-1)).sum() / 5
    loss.backward()
    learner.advance(2, 0.5)
    torch.testing.assert_close(torch.from_numpy(learner.logits_rvv), logits_rvv - 4.0 * 0.5 * weight.grad)


def test_batches_of_tables_depend_on_seed_and_step_alone() -> None:
    one, other = (TableLearner(TASKS, seed=3, peak=1.0, batch=5) for _ in range(2))
    forwards = [one._counts(step) for step in (0, 1, 70, 129)]
    backwards = [other._counts(step) for step in (129, 70, 1, 0)][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(forwards[0], TableLearner(TASKS, 4, 1.0, 5)._counts(0))


def test_what_tables_miss_is_the_mean_of_what_each_misses_of_its_own_language() -> None:
    learner = TableLearner(TASKS, seed=3, peak=1.0, batch=5)
    logits_rvv = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    learner.load(logits_rvv.numpy())
    found, single = learner.look(), [task.excess(logits) for task, logits in zip(TASKS, logits_rvv, strict=True)]
    for part in ("total", "certain", "uncertain"):
        assert getattr(found.excess, part) == pytest.approx(sum(getattr(one, part) for one in single) / 2)
    own = -(torch.from_numpy(TASKS[1].table_vv) * logits_rvv[1].log_softmax(-1)).sum(-1)
    torch.testing.assert_close(found.losses_rv[1], own)


def test_every_table_of_every_seed_has_a_language_of_its_own() -> None:
    s = {**SMOKE["table"], "replicas": 3}
    tables = [task.table_vv.tobytes() for seed in (0, 1, parts.TUNING) for task in parts.table_tasks(s, seed)]
    assert len(set(tables)) == 9
    again = [task.table_vv.tobytes() for task in parts.table_tasks(s, 1)]
    assert again == tables[3:6]


def split_of(bottom: float, top: float) -> EntropySplit:
    """A split whose bottom decile falls by `bottom` and whose top falls by `top`."""
    return EntropySplit(tuple(map(float, range(10))), (-bottom, *[-9.0] * 8, -top))


def test_the_gap_of_deciles_takes_a_bottom_that_rose_as_one_that_stayed() -> None:
    assert parts.decile_gap(split_of(0.1, 0.5)) == pytest.approx(0.3)
    assert parts.decile_gap(split_of(0.3, 0.5)) == pytest.approx(-0.1)
    assert parts.decile_gap(split_of(-0.3, 0.5)) == pytest.approx(0.5)
    assert parts.decile_gap(split_of(-0.3, -0.1)) == pytest.approx(-0.1)


def test_numbers_of_a_table_cell_come_from_its_curve() -> None:
    plan = Plan(((1.0,) * 3 + (0.5,), (1.0,) * 7 + (0.5,), (1.0,) * 11 + (0.5, 0.5)), (3, 7, 11))
    entropy_rv, frequency_rv = torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.full((2, 2), 0.5)

    def look(certain: float, uncertain: float, *losses: float) -> TableLook:
        return TableLook(Excess((certain + uncertain) / 2, certain, uncertain), torch.tensor(losses).view(2, 2))

    flat = (0.0, 0.0, 0.0, 0.0)
    seen = {
        (0, 3): look(0.8, 0.6, *flat), (0, 4): look(0.7, 0.3, *flat),
        (1, 7): look(0.5, 0.5, *flat), (1, 8): look(0.4, 0.2, *flat),
        (2, 11): look(0.2, 0.3, 0.4, 3.0, 0.2, 5.0), (2, 13): look(0.1, 0.05, 0.3, 2.0, 0.1, 2.0),
    }  # fmt: skip
    found = parts.table_measurement(entropy_rv, frequency_rv, plan, 2.0, seen)
    expected = {
        "excess_1": 0.5, "excess_2": 0.3, "excess_3": 0.075,
        "plateau_gap": math.log(0.8 / 0.2) - math.log(0.6 / 0.3),  # from the first decay's beginning to the last one's
        "decay_gap": math.log(0.3 / 0.05) - math.log(0.2 / 0.1),
        "decile_gap": 3.0 - 2 * 0.1,
    }  # fmt: skip
    assert found.metrics == pytest.approx(expected, rel=1e-5)
    assert found.series["excess"].axes == {"steps": (11.0, 13.0), "area": (22.0, 24.0)}


def test_numbers_of_a_text_cell_come_from_its_losses_lines_and_directions() -> None:
    ends = [torch.tensor([3.0, 5.0]), torch.tensor([2.0, 4.0]), torch.tensor([2.0, 3.0])]
    river = LossLine((-0.25, 0.0, 0.25, 0.5, 1.0, 1.25), (9.0, 2.0, 2.1, 1.5, 1.0, 9.0))
    slopes = LossLine((0.0, 0.5, 1.0), (2.0, 1.6, 1.9))
    directions = {"progress": [9.0, 0.5, 1.0], "plateau": [3.0, 0.7, 0.1], "decay": [1.0, 4.0, 0.2]}
    found = parts.text_metrics(
        ends, split_of(0.1, 0.5), {"decayed checkpoints": river, "plateau iterates": slopes}, directions
    )
    expected = {
        "loss_1": 4.0, "loss_2": 3.0, "loss_3": 2.5, "decile_gap": 0.3,
        "bulge": 2.1 - 1.75, "climb": 0.1, "valley": 1.6 - 1.9, "steepness": 4.0 - 0.7,
    }  # fmt: skip
    assert found == pytest.approx(expected)
    assert set(parts.text_metrics(ends, split_of(0.1, 0.5), {}, {})) == {"loss_1", "loss_2", "loss_3", "decile_gap"}
    rising = LossLine((0.0, 0.5, 1.0), (1.0, 1.4, 2.0))  # the later checkpoint is the higher one
    assert parts.text_metrics(ends, split_of(0, 0), {"decayed checkpoints": rising}, {})["climb"] == pytest.approx(0.4)


def test_moves_are_seen_with_their_length_curvature_and_cosine() -> None:
    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        x, y = values["w"]
        return 0.5 * (3 * x * x + 8 * y * y)

    weights = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    moves = {
        name: {"w": torch.tensor(move, dtype=torch.float64), "buffer": torch.ones(5)}
        for name, move in (("progress", [2.0, 0.0]), ("plateau", [3.0, 4.0]), ("decay", [0.0, 0.5]))
    }
    found = parts.seen_along(loss, weights, moves, seed=0)
    assert found["progress"] == pytest.approx([2.0, 3.0, 1.0])
    assert found["plateau"] == pytest.approx([5.0, (3 * 9 + 8 * 16) / 25, 0.6])
    assert found["decay"] == pytest.approx([0.5, 8.0, 0.0])
    assert found["random"][0] == pytest.approx(0.5) and 3 <= found["random"][1] <= 8


def test_peaks_are_chosen_on_held_out_windows_that_judge_no_cell() -> None:
    learner = TextLearner(base(SMOKE["text"]).data_dict(), seed=1, peak=0.01)
    twice = TextLearner(
        base({**SMOKE["text"], "evaluate": 2 * SMOKE["text"]["evaluate"]}).data_dict(), seed=1, peak=0.01
    )
    chosen, judged, both = learner.losses(tuning=True), learner.losses(), twice.losses()
    both_nt = both.view(-1, 16)
    torch.testing.assert_close(both_nt[0::2].flatten(), judged)
    torch.testing.assert_close(both_nt[1::2].flatten(), chosen)


def test_every_protocol_is_swept_at_its_last_run(monkeypatch: pytest.MonkeyPatch) -> None:
    s, followed = SMOKE["table"], []

    def follow_none(runs: list[Factors], learner: object, looks: object, look: Callable[[int, int], None]) -> None:
        followed.append(runs)
        for i, run in enumerate(runs):
            look(i, len(run))

    monkeypatch.setattr(parts, "follow", follow_none)
    losses = parts._sweep("table", s)
    assert followed == [[plan_of(name, s).runs[-1] for name in parts.SWEPT]] * 2
    assert set(losses) == set(TEXT) and all(set(found) == set(s["peaks"]) for found in losses.values())


def test_arms_whose_peak_lies_at_an_edge_are_named_with_their_claims() -> None:
    swept = [["text", "wsd", peak, 1.0] for peak in (1.0, 2.0, 3.0)]

    def cell(name: str, peak: float) -> tuple[Cell, Measurement]:
        arm = Arm(name, settings={"language": "text", "protocol": name})
        return Cell(arm, 0, "toy", {}, Path(), {"sweep": swept}), Measurement({}, extra={"peak": peak})

    inside = [cell("wsd", 2.0), cell("wsd-s", 2.0)]
    assert shown.at_edge(inside) == set() and shown.notes(inside, WSDS.claims) == shown.NOTES
    cells = [cell("wsd", 2.0), cell("wsd-free", 3.0)]
    assert shown.at_edge(cells) == {"wsd-free"}
    first = shown.notes(cells, WSDS.claims)[0]
    assert "wsd-free lies at an edge" in first and first.endswith("touches the claims text-resume.")


def test_a_text_learner_comes_back_to_a_state_bit_for_bit() -> None:
    learner = TextLearner(base(SMOKE["text"]).data_dict(), seed=1, peak=0.01)
    for step in range(3):
        learner.advance(step, 1.0)
    state = learner.state()
    straight = [learner.advance(step, 0.5) or learner.weights() for step in (3, 4)][-1]
    learner.advance(5, 1.0)
    learner.load(state)
    again = [learner.advance(step, 0.5) or learner.weights() for step in (3, 4)][-1]
    assert all(torch.equal(value, straight[name]) for name, value in again.items())
    entropy_n, losses_n = learner.entropies(), learner.losses()
    assert entropy_n.shape == losses_n.shape == (8 * 16,)
    assert bool(((entropy_n > 0) & (entropy_n <= np.log(257) + 1e-4)).all())


def test_the_gpu_scale_is_a_model_of_twenty_million_parameters_and_its_budgets() -> None:
    s = WSDS.scales["gpu"].settings["text"]
    assert 18e6 < counts_of(base(s)).parameters < 22e6
    tokens = [end * s["batch"] * s["length"] / 1e6 for end in s["ends"]]
    assert tokens == pytest.approx([50, 100, 150], rel=0.01)
    assert plan_of("wsd", s).cost == s["ends"][-1]


def test_smoke(tmp_path: Path) -> None:
    finished = Runnable(WSDS()).run("smoke", out=tmp_path, on="inline", progress=Quiet())
    assert [cell.error for cell in finished.result.cells if cell.status != "done"] == []
    assert len(finished.verdicts) == len(WSDS.claims)
    again = load(tmp_path)
    titles = [table.title for table in again.tables]
    budgets = {row[0]: row for row in again.tables[titles.index("Loss at each budget")].rows}
    assert budgets["wsd"][2] == budgets["wsd-s"][2] == budgets["cyclic"][2] == 24 < budgets["oracle"][2]
    assert budgets["table.constant"][1] == budgets["table.wsd"][1]
    assert all(row[-1] == "edge of the grid" for row in budgets.values())  # a grid of two peaks
    classes = {row[0] for row in again.tables[titles.index("Certain and uncertain tokens")].rows}
    assert classes == {f"table.{name}" for name in TABLE} - {"table.cyclic", "table.oracle"}
    swept = again.tables[titles.index("Sweep of peaks")].rows
    assert sum(row[4].startswith("chosen") for row in swept) == 2 * len(parts.SWEPT)
    deciles = again.tables[titles.index("Change of the loss in the last decay")].rows
    assert {row[0] for row in deciles} == {"wsd", "wsd-s", "table.wsd", "table.wsd-s"} and len(deciles) == 40
    lines = {row[0] for row in again.tables[titles.index("Lines between checkpoints")].rows}
    assert lines == {"decayed checkpoints", "plateau iterates", "models of two seeds"}
    directions = {row[0]: row for row in again.tables[titles.index("Directions")].rows}
    assert directions["random"][1] == pytest.approx(directions["decay"][1], rel=1e-4)
    assert directions["progress"][3] == pytest.approx(1.0) and abs(directions["random"][3]) < 0.2
    assert {line.name for line in again.figures[2].lines} == {f"table.{name}" for name in TABLE}
