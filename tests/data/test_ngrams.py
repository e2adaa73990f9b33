"""AR-hits against a search by hand."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.ngrams import ar_hits


def slow(batch: Batch) -> torch.Tensor:
    tokens, targets = batch.tokens_bt.tolist(), batch.targets_bt.tolist()
    documents = torch.zeros_like(batch.tokens_bt) if batch.documents_bt is None else batch.documents_bt
    hits = torch.zeros_like(batch.tokens_bt, dtype=torch.bool)
    for b, row in enumerate(tokens):
        for t, token in enumerate(row):
            for s in range(t):
                same = (row[s], row[s + 1]) == (token, targets[b][t])
                inside = documents[b, s] == documents[b, s + 1] == documents[b, t]
                hits[b, t] |= bool(targets[b][t] != IGNORE and same and inside)
    return hits


@given(
    vocabulary=st.integers(1, 6),
    length=st.integers(1, 16),
    seed=st.integers(0, 10_000),
    masked=st.booleans(),
    ignored=st.booleans(),
)
def test_equals_the_search(vocabulary: int, length: int, seed: int, masked: bool, ignored: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    window = torch.randint(vocabulary, (3, length + 1), generator=draw)
    targets = window[:, 1:].clone()
    if ignored:
        targets[torch.rand(targets.shape, generator=draw) < 0.3] = IGNORE
    starts = torch.rand(3, length, generator=draw) < 0.3
    batch = Batch(window[:, :-1], targets, None, starts.cumsum(1) if masked else None)
    assert torch.equal(ar_hits(batch), slow(batch))


def test_an_example() -> None:
    window = torch.tensor([[1, 2, 3, 1, 2, 4, 1, 2]])
    hits = ar_hits(Batch(window[:, :-1], window[:, 1:]))
    assert hits.tolist() == [[False, False, False, True, False, False, True]]


def test_a_large_vocabulary_does_not_overflow() -> None:
    high = 260_000
    window = torch.tensor([[high, high - 1, high, high - 1, 0]] * 64)
    hits = ar_hits(Batch(window[:, :-1], window[:, 1:]))
    assert hits.tolist() == [[False, False, True, False]] * 64
