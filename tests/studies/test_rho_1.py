"""The Rho-1 study: arms that differ in one thing, the reference and its cost, the same on text at a tiny size, smoke."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchstone.data.batch import IGNORE
from torchstone.data.cache import cache_folder
from torchstone.data.synthetic.noisy_trigram import NoisyTrigramConfig
from torchstone.data.text import TextConfig
from torchstone.evals.trajectories import CATEGORIES
from torchstone.lab.runner import RunOptions, run_study
from torchstone.lab.study import Cell, Measurement
from torchstone.studies import _rho_1 as language
from torchstone.studies import _rho_1_report as shown
from torchstone.studies import _rho_1_text as text
from torchstone.studies.rho_1 import Rho1

SMALL: Mapping[str, Any] = {**Rho1.scales["smoke"].settings, "steps": 30, "hidden": 32}


def cell(name: str, seed: int = 0, settings: Mapping[str, Any] = SMALL, **extra: Any) -> Cell:
    arm = next(one for one in Rho1().arms(Rho1.scales["toy"]) if one.name == name)
    return Cell(arm, seed, "toy", settings, Path("."), **extra)


def test_every_claim_and_scale_is_complete() -> None:
    study = Rho1()
    for scale in study.scales.values():
        names = [arm.name for arm in study.check(scale)]
        assert {
            "clm",
            "clm-equal",
            "clm-longer",
            "clm-clean",
            "slm",
            "reference",
            "random",
            "hard",
            "oracle",
            "self",
        } <= set(names)
    assert study.scales["toy"].seeds == 5
    plain = {"score": "", "reference": "", "steps": 1.0, "clean_share": False, "noisy": True, "rate": 1.0}
    arms = {arm.name: arm.settings for arm in study.arms(study.scales["toy"])}
    assert arms["clm"] == plain and arms["clm-longer"] == {**plain, "steps": 1.33}
    assert arms["slm"] == {**plain, "score": "excess", "reference": "clean"}
    assert arms["clm-equal"] == {**plain, "steps": pytest.approx(7 / 3)}
    assert arms["rate.slm"] == {**arms["slm"], "rate": 5.0} and arms["rate.clm"] == {**plain, "rate": 5.0}


@pytest.mark.parametrize("scale", ["smoke", "toy", "gpu"])
def test_equal_means_the_flops_of_selection_with_the_references_training(scale: str) -> None:
    settings = Rho1.scales[scale].settings
    arms = {arm.name: arm.settings for arm in Rho1().arms(Rho1.scales[scale])}
    steps, reference = settings["steps"], settings["reference_steps"]
    selection = language.cost(language.FourTokens(4, 2, 2, 0), steps, reference)
    equal = language.cost(language.FourTokens(4, 2, 2, 0), round(steps * arms["clm-equal"]["steps"]), 0)
    assert sum(equal.values()) == pytest.approx(sum(selection.values()), rel=0.5 / steps)


def test_each_seed_has_its_language_and_each_rate_its_training(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, rates = [], []
    build, training = NoisyTrigramConfig.build, language.Training

    def built(self: NoisyTrigramConfig, cache: Any = None) -> Any:
        tables.append(self.table_seed)
        return build(self)

    def trained(model: Any, rate: float, *rest: Any) -> Any:
        rates.append(rate)
        return training(model, rate, *rest)

    monkeypatch.setattr(NoisyTrigramConfig, "build", built)
    monkeypatch.setattr(language, "Training", trained)
    language.measure(cell("rate.slm", seed=3))
    assert set(tables) == {3} and rates == [SMALL["learning_rate"] * 5] * 2


def test_the_model_sees_the_last_four_tokens_and_no_later_one() -> None:
    model = language.FourTokens(32, 8, 16, seed=0)
    tokens = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 32
    with torch.no_grad():
        moved = (model(tokens)[0] - model(changed)[0]).abs().sum(-1) > 0
    assert moved.any(0).tolist() == [False] * 6 + [True] * 4 + [False] * 2
    again = language.FourTokens(32, 8, 16, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_cells_are_functions_of_arm_and_seed_and_leave_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (language.measure(cell("slm", seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.metrics == again.metrics != other.metrics


def test_costs_and_targets_are_those_of_the_design() -> None:
    found = {name: language.measure(cell(name)) for name in ("clm", "clm-longer", "clm-clean", "slm", "random")}
    row = SMALL["batch"] * 16
    assert {name: one.tokens for name, one in found.items()} == {
        "clm": 30 * row, "clm-longer": 40 * row, "clm-clean": (30 + SMALL["reference_steps"]) * row, "slm": 30 * row,
        "random": 30 * row,
    }  # fmt: skip
    forward = language.FourTokens(32, SMALL["width"], SMALL["hidden"], 0).flops()
    assert forward == 2 * (4 * 8 * 32 + 32 * 32)
    assert found["clm"].flops == pytest.approx(3 * forward * 30 * row)
    reference = forward * (3 * SMALL["reference_steps"] + 30) * row
    assert found["slm"].extra["cost"]["reference"] == pytest.approx(reference)
    assert found["random"].extra["cost"]["reference"] == 0


def test_arms_train_on_the_noise_that_their_choice_leaves() -> None:
    found = {
        name: language.measure(cell(name)).metrics["noise_selected"]
        for name in ("clm", "oracle", "random", "clean.clm")
    }
    flags = [NoisyTrigramConfig().build().batch(0, step, SMALL["batch"]) for step in range(30)]
    share = float(
        torch.cat([one.noise_bt for one in flags])[torch.cat([one.targets_bt for one in flags]) != IGNORE]
        .float()
        .mean()
    )  # type: ignore[misc]
    assert found["clm"] == pytest.approx(share) and found["clean.clm"] == 0
    assert found["oracle"] < 0.25 < 0.4 < found["random"] < 0.6


def test_the_mixed_arm_sees_the_references_data_as_often_as_the_reference() -> None:
    task = NoisyTrigramConfig().build()
    settings = {**SMALL, "reference_steps": 20}
    batches = list(language._batches(task, settings, 0, 50, True))
    clean = next(task.clean(0, settings["reference_sequences"], settings["reference_sequences"]))
    known = {tuple(row) for row in clean.tokens_bt.tolist()}
    counts = [sum(tuple(row) in known for row in batch.tokens_bt.tolist()) for batch in batches]
    assert sum(counts) == 20 * settings["batch"] and max(counts) - min(counts) <= 1
    assert all(len(batch.tokens_bt) == settings["batch"] and batch.noise_bt is not None for batch in batches)


def test_categories_are_shares_with_their_noise() -> None:
    watched = NoisyTrigramConfig().build().batch(0, 0, 64)
    assert watched.noise_bt is not None
    rising = [torch.where(watched.noise_bt, 3.0 + step, 3.0 - step) for step in range(4)]
    found = language.categories(watched, rising)
    assert found["share"]["L>H"] + found["share"]["H>L"] == pytest.approx(1)
    assert (found["noise"]["L>H"], found["noise"]["H>L"], found["noise"]["L>L"]) == (1.0, 0.0, None)


TEXT: Mapping[str, Any] = {
    **text.GPU,
    "recipe": {
        "model": {"kind": "decoder", "width": 32, "depth": 1, "head_dim": 16},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3}, "schedule": "constant", "precision": "fp32", "compile": False,
        "batch": {"sequences": 4}, "evaluation": {"every": None, "sequences": 4},
    },
    "vocab_size": 300, "length": 32, "steps": 4, "reference_steps": 3, "evaluate": 8, "clean_files": 0.4,
}  # fmt: skip


class FewFiles:
    """A corpus of a few documents in place of the standard library."""

    fingerprint = "few"

    def build(self) -> FewFiles:
        return self

    def documents(self) -> Any:
        from torchstone.data.corpus import Document

        draw = np.random.default_rng(0)
        for number in range(250):
            words = " ".join(f"name_{word}" for word in draw.integers(0, 50, 40))
            yield Document(f"f{number}", f"f{number}:1", f"def {words}")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHSTONE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(text, "StdlibConfig", FewFiles)
        yield text.prepare(TEXT, tmp_path_factory.mktemp("prepare"))


def test_clean_and_raw_text_share_no_document(prepared: Mapping[str, Any]) -> None:
    clean, raw = (
        {json.loads(line)["id"] for line in Path(prepared[name]).read_text().splitlines()} for name in ("clean", "raw")
    )
    assert not clean & raw and len(clean | raw) == 250 and 60 < len(clean) < 140
    json.dumps(prepared)
    assert sorted(prepared["stores"]) == [
        "scores-clean-noisy", "scores-clean-plain", "scores-self-noisy", "scores-self-plain"
    ]  # fmt: skip


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 91, 203, 610, 811, 1423])
def test_checkpoints_cover_the_whole_run_whatever_its_length(prepared: Mapping[str, Any], steps: int) -> None:
    checkpoint = text._recipe(TEXT, text._text(TEXT, prepared), steps).checkpoint
    written = {*range(checkpoint.every, steps + 1, checkpoint.every), steps}
    assert len(written) <= checkpoint.keep == text.CHECKPOINTS and min(written) <= -(-steps // 10)


def test_tables_of_text_hold_no_noise_that_was_not_measured(prepared: Mapping[str, Any], tmp_path: Path) -> None:
    one = replace(cell("clm", settings=TEXT, prepared=prepared), directory=tmp_path)
    cells = [(one, Rho1().measure(one))]
    table = shown.categories_table(cells)
    assert len(table.columns) == 5 and len(table.rows[0]) == 5 and "held-out" in table.note
    assert shown.ONE_TEXT in shown.notes(cells) and shown.LANGUAGES not in shown.notes(cells)


def test_every_arm_has_a_recipe_on_text(prepared: Mapping[str, Any]) -> None:
    arms = Rho1().arms(Rho1.scales["gpu"])
    recipes = {arm.name: text.recipe_of(arm.settings, TEXT, prepared) for arm in arms}
    assert recipes["slm"].objective.score == "excess" and recipes["slm"].data.scores.endswith("scores-clean-noisy")
    assert recipes["self"].data.scores.endswith("scores-self-noisy")
    assert recipes["clean.slm"].data.scores.endswith("scores-clean-plain")
    assert recipes["oracle"].data.kind == "text" and recipes["oracle"].data.corpus.kind == "noisy"
    assert recipes["clean.clm"].data.corpus.kind == "files" and recipes["clm"].objective.kind == "next-token"
    assert recipes["rate.slm"].optimizer.learning_rate == pytest.approx(5 * recipes["slm"].optimizer.learning_rate)
    assert (recipes["clm-clean"].data.kind, recipes["clm-clean"].budget.steps) == ("mixture", 7)


@pytest.mark.parametrize("name", ["clm", "slm", "oracle", "clm-clean"])
def test_an_arm_trains_on_text(prepared: Mapping[str, Any], tmp_path: Path, name: str) -> None:
    found: Measurement = Rho1().measure(replace(cell(name, settings=TEXT, prepared=prepared), directory=tmp_path))
    assert set(found.metrics) == {"clean_loss", "clean_top1", "noise_selected"}
    assert sum(found.extra["categories"]["share"].values()) == pytest.approx(1)
    assert (found.extra["cost"]["reference"] > 0) == (name == "slm")
    if name == "oracle":
        assert found.metrics["noise_selected"] < 0.05
    if name in ("clm", "clm-clean"):
        raw = TextConfig.model_validate(text._text(TEXT, prepared, noisy=True)).build(cache_folder()).shards.train.noise
        share = TEXT["steps"] / (TEXT["steps"] + TEXT["reference_steps"]) if name == "clm-clean" else 1.0
        assert found.metrics["noise_selected"] == pytest.approx(share * raw.mean()) and 0.2 < raw.mean() < 0.6


def test_smoke_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    result = run_study(Rho1(), RunOptions(scale="smoke", seeds=1, out=tmp_path, on="inline")).result
    assert all(one.status == "done" for one in result.cells), [one.error for one in result.cells]
    tables = {table.title: table for table in result.tables}
    names = [arm.name for arm in Rho1().arms(Rho1.scales["smoke"])]
    assert [row[0] for row in tables["All arms"].rows] == names
    for row in tables["Trajectories of tokens"].rows:
        assert sum(float(value or 0) for value in row[1 : 1 + len(CATEGORIES)]) == pytest.approx(1)
    assert len(tables["What selection gains, and why"].rows) == 9
    assert any("clm-equal" in note for note in result.notes)
    assert {line.name for line in result.figures[0].lines} == set(names)
    assert {verdict.claim for verdict in result.verdicts} == {claim.id for claim in Rho1.claims}
