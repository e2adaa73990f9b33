"""F29: evaluation called again, after training steps or with another batch size, sees the same items."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torchstone.data.source import DataSource
from torchstone.data.synthetic.recall import RecallConfig
from torchstone.data.text import TextConfig


@pytest.fixture(params=["recall", "recall under stress", "text", "masked text"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> DataSource:
    if request.param.startswith("recall"):
        return RecallConfig(stress=4 if "stress" in request.param else 1).build(None)
    rows = (json.dumps({"text": f"row {n} of the text, and {n * n}"}) + "\n" for n in range(600))
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    corpus = {"kind": "files", "paths": str(tmp_path / "rows.jsonl")}
    masked = request.param == "masked text"
    return TextConfig(corpus=corpus, tokenizer="bytes", length=16, mask_documents=masked).build(tmp_path)


def arrays(source: DataSource, size: int, sequences: int = 24) -> list[torch.Tensor | tuple[int, ...]]:
    """All held-out items joined, whatever the batch size."""
    batches = list(source.evaluation(size, sequences))
    joined: list[torch.Tensor | tuple[int, ...]] = [sum((batch.rows for batch in batches), ())]
    for name in ("tokens_bt", "targets_bt", "positions_bt", "documents_bt"):
        parts = [getattr(batch, name) for batch in batches if getattr(batch, name) is not None]
        joined.extend([torch.cat(parts)] if parts else [])
    return joined


def same(first: list, second: list) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def loss_sum(source: DataSource, size: int) -> float:
    """Summed loss of a fixed linear model in float64; any item that differs changes it."""
    size_v, draw = source.vocab_size, torch.Generator().manual_seed(0)
    table = torch.randn(size_v, size_v, generator=draw, dtype=torch.float64)
    return sum(
        torch.nn.functional.cross_entropy(
            table[batch.tokens_bt].flatten(0, 1), batch.targets_bt.flatten(), reduction="sum"
        ).item()
        for batch in source.evaluation(size, 24)
    )


def test_evaluation_is_the_same_after_training_steps(source: DataSource) -> None:
    first = arrays(source, 8)
    training = source.batch(0, 1, 4).tokens_bt
    half_read = source.evaluation(8, 24)
    next(half_read)
    for seed in range(3):
        source.batch(seed, 0, 4)
    assert same(arrays(source, 8), first)
    assert torch.equal(source.batch(0, 1, 4).tokens_bt, training)  # nor is the training stream moved


@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_evaluation_does_not_depend_on_the_batch_size(source: DataSource, size: int) -> None:
    assert same(arrays(source, size), arrays(source, 8))
    assert loss_sum(source, size) == pytest.approx(loss_sum(source, 8), rel=1e-12)


def test_random_numbers_of_others_change_nothing(source: DataSource) -> None:
    first = arrays(source, 8)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        torch.rand(7)
        assert same(arrays(source, 8), first)
