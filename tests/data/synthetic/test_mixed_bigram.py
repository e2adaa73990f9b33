"""The mixed bigram language: frequencies, exact entropy and excess by class, Hessian blocks, and the layout of pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchstone.data.batch import IGNORE
from torchstone.data.keyed import key
from torchstone.data.synthetic.mixed_bigram import MixedBigram, MixedBigramConfig
from torchstone.errors import ConfigError, DataError
from torchstone.recipe.load import load_recipe


def task_of(**settings: float) -> MixedBigram:
    return MixedBigramConfig(**{"vocab_size": 8, "pairs": 50, **settings}).build()  # type: ignore[arg-type]


def test_halves_have_equal_mass_and_certain_contexts_fall_like_zipf() -> None:
    task = task_of(vocab_size=64)
    assert task.frequency_v[:32].sum() == pytest.approx(0.5) and task.frequency_v[32:].sum() == pytest.approx(0.5)
    assert task.frequency_v[0] / task.frequency_v[7] == pytest.approx(8**1.5)
    np.testing.assert_allclose(task.frequency_v[32:], 0.5 / 32)
    np.testing.assert_allclose(task.table_vv.sum(1), 1.0)
    assert set(np.unique(task.table_vv[:32])) == {0.0, 1.0}
    assert len({int(row.argmax()) for row in task.table_vv[:32]}) == 32  # successors differ
    assert np.all(task.table_vv[32:] > 0)


def test_entropy_is_that_of_the_table() -> None:
    task = task_of(vocab_size=64)
    np.testing.assert_array_equal(task.entropy_v[:32], 0.0)
    exact = torch.distributions.Categorical(probs=torch.from_numpy(task.table_vv[32:])).entropy()
    np.testing.assert_allclose(task.entropy_v[32:], exact.numpy(), rtol=1e-9)
    assert task.entropy == pytest.approx(0.5 * task.entropy_v[32:].mean())
    assert task_of(vocab_size=64, scale=0.1).entropy > task.entropy


def test_draws_follow_frequencies_and_table() -> None:
    task = task_of()
    contexts_bn, successors_bn = task.draw(key("test", np.arange(2000)), 50)
    counts = np.zeros((8, 8))
    np.add.at(counts, (contexts_bn.ravel(), successors_bn.ravel()), 1)
    expected = 100_000 * task.frequency_v[:, None] * task.table_vv
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected.max())
    assert counts[task.table_vv == 0].sum() == 0  # never an impossible successor


def test_a_sequence_is_pairs_of_which_the_successor_is_scored() -> None:
    task = task_of()
    batch = task.batch(seed=3, step=7, size=6)
    assert batch.tokens_bt.shape == (6, 100) == batch.targets_bt.shape
    assert torch.equal(batch.targets_bt[:, 0::2], batch.tokens_bt[:, 1::2])
    assert bool((batch.targets_bt[:, 1::2] == IGNORE).all())
    assert torch.equal(task.batch(3, 7, 6, 2, 5).tokens_bt, batch.tokens_bt[2:5])
    assert not torch.equal(task.batch(3, 8, 6).tokens_bt, batch.tokens_bt)
    assert task_of(table_seed=1).fingerprint != task.fingerprint


def test_excess_is_cross_entropy_minus_entropy_of_each_class() -> None:
    task = task_of()
    logits_vv = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cross_v = -(torch.from_numpy(task.table_vv) * logits_vv.log_softmax(-1)).sum(-1)
    kl_v = (cross_v - torch.from_numpy(task.entropy_v)).numpy()
    found = task.excess(logits_vv)
    assert found.certain == pytest.approx(float(2 * task.frequency_v[:4] @ kl_v[:4]), rel=1e-12)
    assert found.uncertain == pytest.approx(float(2 * task.frequency_v[4:] @ kl_v[4:]), rel=1e-12)
    assert found.total == pytest.approx(float(task.frequency_v @ kl_v), rel=1e-12)
    both = task.excess(torch.stack([logits_vv, torch.zeros_like(logits_vv)]))
    assert both.total == pytest.approx((found.total + task.excess(torch.zeros(8, 8)).total) / 2, rel=1e-6)


def test_a_perfect_table_has_no_excess_and_uniform_logits_miss_all_of_it() -> None:
    task = task_of()
    right = task.excess(torch.from_numpy(task.table_vv).log())  # log 0 is -inf, an impossible successor
    assert right.total == pytest.approx(0.0, abs=1e-12)
    assert task.excess(torch.zeros(8, 8)).certain == pytest.approx(np.log(8))


def test_token_excess_is_exact_at_contexts() -> None:
    task = task_of()
    tokens_bt = torch.tensor([[0, 5, 6, 1]])
    logits_btv = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    found_bt = task.token_excess(tokens_bt, logits_btv)
    for position in (0, 2):
        table = torch.zeros(8, 8)
        table[tokens_bt[0, position]] = logits_btv[0, position]
        q_v = torch.from_numpy(task.table_vv[tokens_bt[0, position]])
        sampled = torch.distributions.kl_divergence(
            torch.distributions.Categorical(probs=q_v),
            torch.distributions.Categorical(logits=logits_btv[0, position].double()),
        )
        torch.testing.assert_close(found_bt[0, position], sampled, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("context", [5, 0])
def test_hessian_blocks_are_those_of_the_exact_loss(context: int) -> None:
    task = task_of()
    q_v = torch.from_numpy(task.table_vv[context])
    logits_v = torch.where(q_v > 0, q_v, 1e-16).log()

    def loss(row_v: torch.Tensor) -> torch.Tensor:
        return -task.frequency_v[context] * (q_v * row_v.log_softmax(-1)).sum()

    exact = torch.autograd.functional.hessian(loss, logits_v)
    np.testing.assert_allclose(task.hessian_block(context), exact.numpy(), atol=1e-12)
    curvature = np.trace(task.hessian_block(context)) / task.frequency_v[context]
    assert curvature == pytest.approx(0.0, abs=1e-12) if context == 0 else curvature > 0.5


def test_bad_settings_and_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 has no two equal halves; give an even number"):
        load_recipe({"model": "decoder", "data": {"kind": "mixed-bigram", "vocab_size": 7}})
    with pytest.raises(DataError, match=r"\[8, 8\]; given \[4, 8\]"):
        task_of().excess(torch.zeros(4, 8))
    with pytest.raises(DataError, match="context 8 is not among the tokens 0 … 7"):
        task_of().hessian_block(8)
