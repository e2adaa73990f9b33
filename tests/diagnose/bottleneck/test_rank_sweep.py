"""Rank sweeps: the zero of the scale, ranks that lose nothing and ranks that do, resuming, and models that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support.subjects import byte_subject, texts

from torchstone.diagnose.bottleneck import rank_sweep as module
from torchstone.diagnose.bottleneck.rank_sweep import Training, default_ranks, rank_sweep, rank_sweep_finding
from torchstone.diagnose.bottleneck.rank_sweep_states import cache_states, split_documents
from torchstone.errors import ConfigError, DataError

SETTINGS = {"tokens": 2000, "length": 16, "held_out": 0.5, "batch": 64, "learning_rate": 1e-3}
UNTIED = {"head": {"kind": "linear", "tied": False}}


def test_documents_are_held_out_whole() -> None:
    subject = byte_subject()
    documents = split_documents(subject, texts(), 16, 10_000, 0.25)
    sides = [{bytes(row) for _, row in rows} for rows in (documents.train, documents.held_out)]
    assert not sides[0] & sides[1]
    assert (
        len({number for number, _ in documents.held_out}) == 6 and len({number for number, _ in documents.train}) == 18
    )
    again = split_documents(subject, texts()[::-1] + texts()[:3], 16, 10_000, 0.25)
    assert again.fingerprint == documents.fingerprint  # neither order nor repetition matters


def test_cached_states_give_the_models_losses() -> None:
    subject = byte_subject(**UNTIED)
    documents = split_documents(subject, texts(6), 30, 10_000, 0.5)
    cached = cache_states(subject, documents.held_out, 30, subject.head_weight())
    assert cached.states_nd.dtype == torch.float16
    logits_nv = cached.states_nd.float() @ subject.head_weight().T
    loss = torch.nn.functional.cross_entropy(logits_nv, cached.targets_n)
    own = torch.cat([subject.losses(torch.tensor([row])).flatten() for _, row in documents.held_out])
    assert loss.item() == pytest.approx(own.mean().item(), rel=1e-3)
    assert torch.bincount(cached.document_n).tolist() == [79 - 2] * 3  # a last row of one token has no target


def test_the_full_rank_loses_nothing_and_low_ranks_do() -> None:
    subject = byte_subject(**UNTIED)
    with torch.no_grad():
        subject.model.head.project.weight.mul_(4)
    documents = split_documents(subject, texts(), 16, 2000, 0.5)
    sweep = rank_sweep(subject, documents, [16, 4, 1], Training(learning_rate=1e-9, batch=64))
    assert sweep.gaps[16] == 0.0 and abs(sweep.ranked[16].loss - sweep.untouched.loss) < 1e-4
    assert abs(sweep.change) < 1e-4
    assert sweep.full == 16 and list(sweep.gaps) == [1, 4, 16]


def test_training_lowers_the_loss_of_a_low_rank() -> None:
    subject = byte_subject(**UNTIED)
    documents = split_documents(subject, texts(), 16, 2000, 0.5)
    still, trained = (
        rank_sweep(subject, documents, [2], Training(learning_rate=rate, batch=64, epochs=4)).ranked[2].loss
        for rate in (1e-9, 1e-2)
    )
    assert trained < still - 0.1


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = byte_subject(**UNTIED)
    whole = rank_sweep_finding(subject, texts(), ranks=[8, 2], **SETTINGS)
    stopped = module.train_head
    calls = []

    def once(matrices, cached, training):
        calls.append(len(matrices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        stopped(matrices, cached, training)

    monkeypatch.setattr(module, "train_head", once)
    with pytest.raises(KeyboardInterrupt):
        rank_sweep_finding(subject, texts(), ranks=[8, 2], directory=tmp_path / "sweep", **SETTINGS)
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        "head-untouched.json",
        "head-retrained.json",
        "head-8.json",
    }
    again = rank_sweep_finding(subject, texts(), ranks=[8, 2], directory=tmp_path / "sweep", **SETTINGS)
    assert len(calls) == 4 and again.tables == whole.tables
    monkeypatch.setattr(module, "cache_states", None)  # a finished sweep runs no model
    assert (
        rank_sweep_finding(subject, texts(), ranks=[8, 2], directory=tmp_path / "sweep", **SETTINGS).tables
        == whole.tables
    )


def test_results_of_another_sweep_are_refused(tmp_path: Path) -> None:
    subject = byte_subject(**UNTIED)
    rank_sweep_finding(subject, texts(), ranks=[2], directory=tmp_path, **SETTINGS)
    with pytest.raises(ConfigError, match="another model"):
        rank_sweep_finding(byte_subject(1, **UNTIED), texts(), ranks=[2], directory=tmp_path, **SETTINGS)
    with pytest.raises(ConfigError, match="other settings"):
        rank_sweep_finding(subject, texts(), ranks=[2], directory=tmp_path, **SETTINGS | {"learning_rate": 2e-3})
    (tmp_path / "head-2.json").write_text(json.dumps({"head": "2"}))
    with pytest.raises(DataError, match=r"head-2\.json"):
        rank_sweep_finding(subject, texts(), ranks=[2], directory=tmp_path, **SETTINGS)


def test_impossible_ranks_and_texts() -> None:
    subject = byte_subject(**UNTIED)
    with pytest.raises(ConfigError, match=r"rank 17 exceeds min\(vocab 257, width 16\)"):
        rank_sweep_finding(subject, texts(), ranks=[17], **SETTINGS)
    with pytest.raises(DataError, match="at least 2"):
        rank_sweep_finding(subject, ["one text only", "one text only"], **SETTINGS)
    with pytest.raises(ConfigError, match="held_out"):
        rank_sweep_finding(subject, texts(), **SETTINGS | {"held_out": 0.0})
    assert default_ranks(100) == (50, 25, 12, 6) and default_ranks(4) == (2,)


def test_a_head_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(ConfigError, match="mixture-of-softmaxes"):
        rank_sweep_finding(byte_subject(head="mixture-of-softmaxes"), texts(), ranks=[2], **SETTINGS)
    subject = byte_subject(**UNTIED)
    documents = split_documents(subject, texts(4), 16, 100, 0.5)
    with pytest.raises(ConfigError, match="more than a matrix"):
        cache_states(subject, documents.train, 16, 2 * subject.head_weight())
    with pytest.raises(DataError, match="the head knows 50"):
        cache_states(subject, documents.train, 16, subject.head_weight()[:50])


def test_states_that_fp16_cannot_hold_are_refused() -> None:
    subject = byte_subject(**UNTIED)
    with torch.no_grad():
        subject.model.norm.gain.mul_(1e6)
    with pytest.raises(DataError, match="65504"):
        rank_sweep_finding(subject, texts(), ranks=[2], **SETTINGS)


def test_finding() -> None:
    found = rank_sweep_finding(byte_subject(), texts(), ranks=[8, 4, 2], **SETTINGS)
    assert [row[0] for row in found.tables[0].rows] == [2, 4, 8, "16, retrained", "16, untouched"]
    assert "tied" in found.notes[1] and "held out in 12 documents" in found.notes[0]
