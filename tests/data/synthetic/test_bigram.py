"""Bigram tables: known entropy, exact excess, sequences that follow the table, and tables of two kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchstone.data.synthetic.bigram import BigramConfig
from torchstone.errors import ConfigError
from torchstone.recipe.load import load_recipe

SMALL = {"vocab_size": 6, "length": 50}
MIXTURE = {"latent": 2, "components": 3, "scale": 2.0}


@pytest.mark.parametrize("table", [{}, MIXTURE], ids=["free", "mixture"])
def test_tables_are_distributions_of_full_rank(table: dict[str, float]) -> None:
    task = BigramConfig(vocab_size=40, **table).build()
    np.testing.assert_allclose(np.exp(task.log_table_vv).sum(1), 1.0)
    np.testing.assert_allclose(task.stationary_v @ np.exp(task.log_table_vv), task.stationary_v)
    centred = task.log_table_vv - task.log_table_vv.mean(1, keepdims=True)
    values = np.linalg.svd(centred, compute_uv=False)
    assert values[38] > 1e-7 * values[0]
    assert 0 < task.entropy < np.log(40)


def test_a_mixture_table_needs_less_rank_than_a_free_one_and_more_than_its_channels() -> None:
    tails = []
    for table in ({}, MIXTURE):
        logits = BigramConfig(vocab_size=64, **table).build().log_table_vv
        squares = np.linalg.svd(logits - logits.mean(1, keepdims=True), compute_uv=False) ** 2
        tails.append(squares[8:].sum() / squares.sum())
    assert 1e-3 < tails[1] < tails[0] / 5


@pytest.mark.parametrize("table", [{}, MIXTURE], ids=["free", "mixture"])
def test_sequences_follow_the_table(table: dict[str, float]) -> None:
    task = BigramConfig(**SMALL, **table).build()
    batch = task.batch(seed=0, step=0, size=2000)
    assert torch.equal(batch.tokens_bt[:, 1:], batch.targets_bt[:, :-1])
    counts = np.zeros((6, 6))
    np.add.at(counts, (batch.tokens_bt.numpy().ravel(), batch.targets_bt.numpy().ravel()), 1)
    expected = counts.sum(1, keepdims=True) * np.exp(task.log_table_vv)
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected.max())
    first = np.bincount(batch.tokens_bt[:, 0].numpy(), minlength=6) / 2000
    np.testing.assert_allclose(first, task.stationary_v, atol=0.05)


def test_rows_depend_on_their_key_alone() -> None:
    task = BigramConfig(**SMALL).build()
    whole = task.batch(3, 7, 8).tokens_bt
    assert torch.equal(task.batch(3, 7, 8, 2, 5).tokens_bt, whole[2:5])
    assert not torch.equal(task.batch(4, 7, 8).tokens_bt, whole) and not torch.equal(
        task.batch(3, 8, 8).tokens_bt, whole
    )
    other = BigramConfig(**SMALL, table_seed=1).build()
    assert other.entropy != task.entropy and other.fingerprint != task.fingerprint
    held = torch.cat([batch.tokens_bt for batch in task.evaluation(3, 8)])
    assert held.shape == (8, 50) and not torch.equal(held, whole)


def test_excess_is_the_loss_beyond_the_entropy() -> None:
    task = BigramConfig(**SMALL).build()
    batch = task.batch(0, 0, 500)
    exact_btv = torch.from_numpy(task.log_table_vv)[batch.tokens_bt]
    assert float(task.excess(batch.tokens_bt, exact_btv + 5).abs().max()) < 1e-12
    flat = torch.zeros(500, 50, 6)
    excess = float(task.excess(batch.tokens_bt, flat).mean())
    assert np.log(6) - task.entropy == pytest.approx(excess, abs=0.02)


def test_half_a_mixture_is_refused() -> None:
    with pytest.raises(ConfigError, match="belong together"):
        load_recipe({"model": "decoder", "data": {"kind": "bigram", "latent": 4}})
