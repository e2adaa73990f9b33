"""The computed shuffle is a bijection, differs between keys, and mixes well."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from torchstone.data.keyed import key
from torchstone.data.order import item_at
from torchstone.data.permutation import Permutation


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63))
def test_every_item_comes_exactly_once(n: int, seed: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, key(seed))(np.arange(n))), np.arange(n))


@given(n=st.integers(10**9, 2**50), seed=st.integers(0, 1000))
def test_huge_domains_stay_in_range_and_apart(n: int, seed: int) -> None:
    shuffle = Permutation(n, key(seed))
    images = shuffle(np.concatenate([np.arange(50), n - 1 - np.arange(50)]))
    assert images.min() >= 0 and images.max() < n and len(set(images.tolist())) == 100
    assert int(shuffle(7)) == images[7]


def test_keys_give_different_orders_that_look_random() -> None:
    n = 2000
    orders = [Permutation(n, key("test", seed))(np.arange(n)) for seed in range(40)]
    assert len({tuple(order[:5].tolist()) for order in orders}) == 40
    correlations = [np.corrcoef(order, np.arange(n))[0, 1] for order in orders]
    assert np.abs(correlations).max() < 5 / np.sqrt(n)
    fixed = [int((order == np.arange(n)).sum()) for order in orders]
    assert 0.4 < np.mean(fixed) < 1.8  # a random order leaves one item in place on average


def test_all_orders_of_three_items_occur() -> None:
    orders = [tuple(Permutation(3, key("small", seed))(np.arange(3)).tolist()) for seed in range(600)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and min(counts) > 60


@given(items=st.integers(1, 40), size=st.integers(1, 17), seed=st.integers(0, 5))
def test_epochs_hold_each_item_once_whatever_the_batch_size(items: int, size: int, seed: int) -> None:
    steps = -(-3 * items // size)
    seen = np.concatenate([item_at(step * size + np.arange(size), items, seed) for step in range(steps)])
    for epoch in range(3):
        assert sorted(seen[epoch * items : (epoch + 1) * items].tolist()) == list(range(items))
    assert np.array_equal(seen, item_at(np.arange(steps * size), items, seed))


def test_epochs_and_seeds_differ() -> None:
    first, second = item_at(np.arange(200), 100, 0).reshape(2, 100)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, item_at(np.arange(100), 100, 1))
