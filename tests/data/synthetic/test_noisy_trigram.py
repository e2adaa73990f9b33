"""The noisy language: shares, flags against a plain reading of its rules, clean held-out rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchstone.data.batch import IGNORE
from torchstone.data.source import DataSource
from torchstone.data.synthetic.noisy_trigram import NoisyTrigramConfig


def test_half_of_the_targets_are_noise() -> None:
    source = NoisyTrigramConfig().build()
    assert isinstance(source, DataSource) and (source.vocab_size, source.length) == (32, 19)
    batch = source.batch(0, 0, 4096)
    scored = batch.targets_bt != IGNORE
    assert scored.sum(1).unique().tolist() == [16] and not scored[:, :3].any()
    assert batch.noise_bt is not None
    flagged = batch.noise_bt[scored].view(4096, 16)
    rows = flagged.all(1)
    assert abs(float(flagged.float().mean()) - 0.49) < 0.02
    assert abs(float(rows.float().mean()) - 0.4) < 0.03
    assert abs(float(flagged[~rows].float().mean()) - 0.15) < 0.01


def test_what_is_not_noise_follows_the_table_but_for_slips() -> None:
    source = NoisyTrigramConfig(length=12, context=1).build()
    batch = source.batch(7, 3, 2048)
    table = torch.from_numpy(source.table_vv)
    follows = table[batch.tokens_bt[:, :-1], batch.tokens_bt[:, 1:]]
    assert torch.equal(source.answers(batch.tokens_bt), follows)
    targets = batch.targets_bt[:, 1:]
    assert batch.noise_bt is not None
    right, noise = targets == follows, batch.noise_bt[:, 1:]
    assert abs(float(right[~noise].float().mean()) - (0.95 + 0.05 / 32)) < 0.01
    assert abs(float(right[noise].float().mean()) - 1 / 32) < 0.01
    assert torch.equal(batch.tokens_bt[:, 1:][:, 1:], batch.targets_bt[:, 1:-1])  # shifted by one


def test_held_out_and_reference_rows_are_the_language_alone() -> None:
    source = NoisyTrigramConfig(slip=0.0).build()
    held = next(source.evaluation(64, 64))
    clean = next(source.clean(0, 64, 64))
    for batch in (held, clean):
        scored = batch.targets_bt != IGNORE
        assert torch.equal(batch.targets_bt[:, 1:][scored[:, 1:]], source.answers(batch.tokens_bt)[scored[:, 1:]])
        assert batch.noise_bt is None
    assert not torch.equal(held.tokens_bt, clean.tokens_bt)
    assert not torch.equal(clean.tokens_bt, next(source.clean(1, 64, 64)).tokens_bt)
    assert len(next(source.evaluation(64, 8)).tokens_bt) == 8


def test_rows_are_functions_of_seed_and_step_whatever_the_share_of_the_batch() -> None:
    source = NoisyTrigramConfig().build()
    whole, part = source.batch(3, 5, 16), source.batch(3, 5, 16, 4, 9)
    assert part.noise_bt is not None and whole.noise_bt is not None
    assert torch.equal(whole.tokens_bt[4:9], part.tokens_bt) and torch.equal(whole.noise_bt[4:9], part.noise_bt)
    assert part.rows == whole.rows[4:9]
    assert not torch.equal(whole.tokens_bt, source.batch(4, 5, 16).tokens_bt)
    tokens, targets = source.rows(np.asarray([1, 2], dtype=np.uint64))
    assert tokens.shape == targets.shape == (2, 19)


@pytest.mark.parametrize(("documents", "tokens", "share"), [(0.0, 0.0, 0.0), (1.0, 0.0, 1.0), (0.0, 0.5, 0.5)])
def test_shares_are_settings(documents: float, tokens: float, share: float) -> None:
    source = NoisyTrigramConfig(noise_documents=documents, noise_tokens=tokens).build()
    batch = source.batch(0, 0, 1024)
    assert batch.noise_bt is not None
    assert abs(float(batch.noise_bt[batch.targets_bt != IGNORE].float().mean()) - share) < 0.02


def test_another_table_is_another_language() -> None:
    first, second = (NoisyTrigramConfig(table_seed=seed).build() for seed in (0, 1))
    assert first.fingerprint != second.fingerprint and (first.table_vv != second.table_vv).mean() > 0.9
    assert first.table_vv.min() >= 0 and first.table_vv.max() < 32
