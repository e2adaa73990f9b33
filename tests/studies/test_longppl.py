"""The study end to end at smoke scale, its language and readers, and the design that its docstring promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchstone.lab.progress import Quiet
from torchstone.lab.runnable import Runnable
from torchstone.studies import _longppl as readers
from torchstone.studies import _longppl_training as training
from torchstone.studies import _longppl_windows as windows
from torchstone.studies._longppl_arms import READERS, TAGS, WINDOWS
from torchstone.studies.longppl import LongPPL

SMALL = {**READERS, "models": 6, "documents": 3, "length": 256}


def test_claims_and_arms_at_every_scale() -> None:
    study = LongPPL()
    for name, scale in study.scales.items():
        arms = {arm.name: arm for arm in study.check(scale)}
        controls = {"random", "by-loss", "short-evaluator", "poor-evaluator", "trained", "shuffled", "weights-by-loss"}
        assert controls <= set(arms)
        assert ("gamma-none" in arms) == (name == "gpu")
        assert scale.settings["seeds"] == scale.seeds
    assert TAGS["short"] + TAGS["step_of_windows"] - 1 < TAGS["every"]  # no window reaches the last tag
    assert study.scales["toy"].seeds >= 5


def test_smoke_gives_every_arm_its_numbers(tmp_path) -> None:
    finished = Runnable(LongPPL()).run("smoke", seeds=1, out=tmp_path, on="inline", progress=Quiet())
    assert [cell.error for cell in finished.result.cells if cell.status != "done"] == []
    found = {cell.arm: cell.metrics for cell in finished.result.cells}
    assert found["longppl"]["copies"] > found["random"]["copies"]
    assert set(found["longce"]) == {"loss", "far_loss", "recall"}
    titles = [table.title for table in finished.result.tables]
    assert titles[-4:] == [
        "Correlations by seed",
        "Trained models by window and width",
        "Fine-tuning by weighted losses",
        "Robustness at β = -2",
    ]
    models = next(table for table in finished.result.tables if table.title.startswith("Trained"))
    assert [row[0] for row in models.rows] == [f"window {w}, width {d}" for d in (24, 48) for w in (32, 64, 128, 256)]


def test_copies_are_runs_of_the_permutation() -> None:
    text = readers.documents(readers.language(1), 1, 4, 256)
    assert text.copied_nt[:, : readers.VOCABULARY].sum() == 0 and text.copied_nt.sum() > 20
    for tokens, copied in zip(text.tokens_nt, text.copied_nt, strict=True):
        assert sorted(tokens[: readers.VOCABULARY]) == list(range(readers.VOCABULARY))
        triples = {tuple(tokens[at : at + 3]) for at in range(readers.VOCABULARY - 2)}
        assert all(tuple(tokens[at - 2 : at + 1]) in triples for at in np.flatnonzero(copied))


def test_a_reader_sees_its_window_and_no_more() -> None:
    log_p = readers.language(2)
    tokens = readers.documents(log_p, 2, 1, 256).tokens_nt
    near, far = readers.losses(readers.Reader(log_p, 40), tokens), readers.losses(readers.Reader(log_p, 10**6), tokens)
    changed = tokens.copy()
    changed[0, :150] = (changed[0, :150] + 1) % readers.VOCABULARY
    np.testing.assert_allclose(readers.losses(readers.Reader(log_p, 40), changed)[0, 195:], near[0, 195:], atol=1e-6)
    assert np.abs(readers.losses(readers.Reader(log_p, 10**6), changed)[0, 195:] - far[0, 195:]).max() > 0.5
    probabilities = readers.Reader(log_p, 10**6)(torch.from_numpy(tokens)).exp().sum(-1)
    torch.testing.assert_close(probabilities, torch.ones(1, 256))


def test_controls_choose_as_many_tokens_as_are_key() -> None:
    found = readers.bench(3, SMALL)
    key = readers.chosen(found, "key", SMALL, 3)
    for rule in ("random", "loss"):
        mask = readers.chosen(found, rule, SMALL, 3)
        assert mask.sum() == key.sum() > 0
        assert not mask[np.isnan(found.short_nt)].any()
    assert found.full_nt[readers.chosen(found, "loss", SMALL, 3)].min() > found.full_nt[key].max()


def test_tags_follow_markers_and_nothing_near_tells_them() -> None:
    data = training.data_of(TAGS)
    batch = data.batch(0, 0, 8)
    far = data.far(batch)
    assert far.sum() == 8 * (TAGS["row"] // TAGS["every"])
    assert torch.equal(batch.targets_bt[far].view(8, -1), batch.tokens_bt[:, :1].expand(-1, far.sum() // 8))
    assert torch.equal(batch.targets_bt[:, :-1], batch.tokens_bt[:, 1:])
    assert not torch.equal(batch.tokens_bt, data.batch(1, 0, 8).tokens_bt)


def test_shuffled_weights_are_the_same_numbers_elsewhere() -> None:
    settings = {**TAGS, "width": 16}
    data, plain = training.data_of(settings), {"gamma": 5.0, "normalize": False}
    model, batch = training.build(settings, data.vocab_size, 0), data.batch(0, 0, 4)
    weights = {
        name: training.objective_of({"weights": name, **plain}, settings)(model, batch).weights_bt
        for name in ("longce", "shuffled", "loss")
    }
    torch.testing.assert_close(weights["shuffled"].flatten().sort()[0], weights["longce"].flatten().sort()[0])
    assert not torch.equal(weights["shuffled"], weights["longce"])
    assert float(weights["loss"].max()) <= 5.0


def test_mentions_tell_the_member_and_how_far_back_it_was() -> None:
    data = windows.mentions(WINDOWS)
    batch, back_nt = data.rows(1, 2, 6)
    rows = torch.cat([batch.tokens_bt, batch.targets_bt[:, -1:]], dim=1).numpy()
    back_nt = np.concatenate([np.zeros((6, 1), dtype=np.int64), back_nt], axis=1)
    assert rows.max() < data.vocab_size and (back_nt > 0).sum() > 100
    for row, back in zip(rows, back_nt, strict=True):
        for at in np.flatnonzero(back):
            marker, member = row[at - 1] - data.local, row[at] - data.local - data.classes
            assert 0 <= marker < data.classes and member // data.members == marker
            since = row[at - back[at] + 1 : at]
            assert row[at - back[at]] == row[at] and row[at] not in since
    assert WINDOWS["nearest"] < min(WINDOWS["windows"]) and max(WINDOWS["windows"]) < WINDOWS["furthest"]
    assert WINDOWS["trunc_len"] + WINDOWS["stride"] <= min(WINDOWS["windows"])


def test_rows_share_a_language_and_nothing_else() -> None:
    data = windows.mentions(WINDOWS)
    one, same, other = (data.rows(1, seed, 2)[0].tokens_bt for seed in (2, 2, 3))
    assert torch.equal(one, same) and not torch.equal(one, other)
    pairs = [set(zip(x.flatten().tolist(), x.flatten().tolist()[1:], strict=False)) for x in (one, other)]
    strangers = data.rows(9, 3, 2)[0].tokens_bt.flatten().tolist()
    assert len(pairs[0] & pairs[1]) > 1.5 * len(pairs[0] & set(zip(strangers, strangers[1:], strict=False)))


def test_a_window_is_what_the_trained_model_sees() -> None:
    model = windows.decoder(WINDOWS, 24, 32, 0)
    batch, _ = windows.mentions(WINDOWS).rows(1, 2, 2)
    changed = batch.tokens_bt.clone()
    changed[:, :100] = (changed[:, :100] + 1) % WINDOWS["local"]
    with torch.no_grad():
        found, moved = (model(tokens_bt).hidden_btd for tokens_bt in (batch.tokens_bt, changed))
    torch.testing.assert_close(found[:, 131:], moved[:, 131:])
    assert not torch.allclose(found[:, 130], moved[:, 130])


def test_the_numbers_of_trained_models_are_of_the_same_tokens() -> None:
    small = {**WINDOWS, "steps": 30, "rows": 8, "batch": 2, "length": 160, "alpha": -9.0, "beta": -99.0}
    found, numbers = windows.trained(small, 3), windows.measure(small, 3)
    scored_nt = ~np.isnan(found.short_nt)
    assert numbers["metrics"]["share"] == scored_nt.mean()  # with such thresholds every scored token is key
    expected = found.losses_mnt[:, scored_nt].astype(np.float64).mean(axis=1)
    np.testing.assert_allclose([row[2] for row in numbers["models"]], expected)
    np.testing.assert_allclose([row[4] for row in numbers["models"]], expected)  # as many random ones are all of them
    assert numbers["metrics"]["trained_longppl"] == pytest.approx(np.corrcoef(expected, found.recall_m)[0, 1])
