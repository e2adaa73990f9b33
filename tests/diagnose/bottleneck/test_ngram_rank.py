"""Data rank: counting, fits that reach planted ranks, noise, the critical rank, and bad input."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from tests.support.subjects import texts

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.bottleneck.critical_rank import critical_rank, power_law
from torchstone.diagnose.bottleneck.ngram_rank import (
    NgramMatrix,
    count_ngrams,
    fitted_gap,
    ngram_matrix,
    ngram_rank_finding,
    noise_counts,
    rank_curve,
)
from torchstone.errors import ConfigError, DataError
from torchstone.models.decoder import DecoderConfig


def planted(rank: int, contexts: int = 40, tokens: int = 30) -> NgramMatrix:
    """Distributions whose logits have a rank."""
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(contexts, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, tokens, generator=generator, dtype=torch.float64)
    weight_c = torch.rand(contexts, generator=generator, dtype=torch.float64) + 0.1
    return NgramMatrix((left @ right).softmax(1), weight_c / weight_c.sum())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_counts_are_those_of_a_dictionary(order: int) -> None:
    documents = [[1, 2, 3, 1, 2, 3, 1, 2, 0, 5], [1, 2, 3, 3], [7], [2, 2, 2, 2, 2]]
    pairs = Counter(
        (tuple(document[at : at + order]), document[at + order])
        for document in documents
        for at in range(len(document) - order)
    )
    contexts = Counter(dict.fromkeys(sorted({context for context, _ in pairs}), 0))
    for (context, _), often in pairs.items():
        contexts[context] += often
    chosen = [context for context, _ in contexts.most_common(3)]
    columns = sorted({token for (context, token) in pairs if context in chosen})
    expected = [[pairs[context, token] for token in columns] for context in chosen]
    assert count_ngrams(documents, order, 3).tolist() == expected


def test_only_tokens_that_occur_are_numbered() -> None:
    """Ids as large as those of current tokenizers are no obstacle, and leave the order of contexts and columns as it is."""
    documents = [[1, 2, 3, 1, 2, 3, 1, 2, 0, 5], [1, 2, 3, 3, 9], [2, 2, 2, 2, 2, 9, 9]]
    sparse = {0: 0, 1: 7, 2: 90, 3: 54321, 5: 100_000, 9: 128_255}
    renamed = [[sparse[token] for token in document] for document in documents]
    for order in (1, 3):
        assert (count_ngrams(renamed, order, 4) == count_ngrams(documents, order, 4)).all()


def test_no_ngram_spans_two_documents() -> None:
    assert count_ngrams([[0, 1], [2, 3]], 1, 10).sum() == 2


@pytest.mark.parametrize("rank", [1, 3])
def test_the_fit_finds_a_planted_rank_and_cutting_is_never_better(rank: int) -> None:
    matrix = planted(rank)
    assert fitted_gap(matrix, rank) < 1e-3
    assert matrix.tail(rank)[1] < 1e-12 and matrix.gap(matrix.truncated(rank)) == pytest.approx(0, abs=1e-12)
    for lower in range(1, rank):
        assert 0.01 < fitted_gap(matrix, lower) <= matrix.gap(matrix.truncated(lower))


def test_gaps_fall_with_rank_on_text() -> None:
    counts = count_ngrams([list(text.encode()) for text in texts(60)], 2, 60)
    curve = rank_curve(counts, (1, 2, 4, 8, 16, 999))
    assert curve.ranks == (1, 2, 4, 8, 16)
    assert all(high >= low - 1e-4 for high, low in zip(curve.fitted, curve.fitted[1:], strict=False))
    assert all(fitted <= cut + 1e-9 for fitted, cut in zip(curve.fitted, curve.truncated, strict=True))
    assert list(curve.tail) == sorted(curve.tail, reverse=True)


def test_noise_keeps_totals_and_loses_structure() -> None:
    counts = 200 * np.eye(12, dtype=np.int64) + 1
    noise = noise_counts(counts)
    assert (noise.sum(1) == counts.sum(1)).all() and not (noise == counts).all()
    real, drawn = (ngram_matrix(torch.from_numpy(table)) for table in (counts, noise))
    assert fitted_gap(real, 1) > 10 * fitted_gap(drawn, 1)
    assert (noise_counts(counts) == noise).all() and not (noise_counts(counts, 1) == noise).all()


def test_a_context_that_never_occurs_weighs_nothing() -> None:
    matrix = ngram_matrix(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), 0.5)
    assert matrix.weight_c.tolist() == [1.0, 0.0] and matrix.prob_cv[1].tolist() == [0.5, 0.5]
    assert fitted_gap(matrix, 1) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("counts", "alpha"),
    [([[0.0, 0.0]], 0.1), ([[-1.0, 3.0]], 0.1), ([[float("nan"), 3.0]], 0.1), ([[1.0, 3.0]], 0.0)],
)
def test_bad_counts(counts: list[list[float]], alpha: float) -> None:
    with pytest.raises(DataError):
        ngram_matrix(torch.tensor(counts), alpha)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        count_ngrams([[1, 2]], 0, 5)
    with pytest.raises(ConfigError, match="too long"):
        count_ngrams([list(range(50_000))], 5, 5)
    with pytest.raises(DataError, match="longer texts"):
        count_ngrams([[1, 2], []], 3, 5)
    with pytest.raises(ConfigError, match="rank 31"):
        fitted_gap(planted(1), 31)


def test_critical_rank_between_measured_ranks() -> None:
    ranks = (4, 8, 16, 32)
    gaps = [1.6 * rank**-2.0 for rank in ranks]
    assert critical_rank(ranks, gaps, 0.01) == pytest.approx((1.6 / 0.01) ** 0.5)
    law = power_law(ranks, gaps)
    assert law is not None and law.c == pytest.approx(1.6) and law.p == pytest.approx(2)
    assert critical_rank((32, 4, 16, 8), gaps[::-1][:1] + gaps[:1] + [gaps[2], gaps[1]], 0.01) == pytest.approx(
        160**0.5
    )
    assert critical_rank((4, 8), (0.5, 0.4)) is None and critical_rank((4, 8), (0.005, 0.001)) is None
    assert 4 < critical_rank((4, 8), (0.03, -0.01)) < 8
    assert critical_rank((2, 4, 8), (0.02, 0.001, 0.02)) is None  # it is above again at the last
    assert power_law((1, 2), (0.1, -0.1)) is None
    with pytest.raises(DataError):
        critical_rank((1, 2), (0.1,))
    with pytest.raises(DataError):
        critical_rank((1, 2), (0.1, float("nan")))


def test_finding_with_bytes_and_with_a_models_tokens() -> None:
    found = ngram_rank_finding(None, texts(), order=1, top=20, ranks=(1, 2, 4), steps=50)
    assert found.analysis == "ngram-rank" and "no model" in found.subject
    assert [row[0] for row in found.tables[0].rows] == [1, 2, 4]
    model = DecoderConfig(width=8, depth=1, head_dim=8).build(257, 32, 0)
    subject = open_subject(model, tokenizer=ByteTokenizer())
    tokens = ngram_rank_finding(subject, texts(), order=1, top=20, ranks=(1, 2, 4), steps=50)
    assert [row[0] for row in tokens.tables[0].rows] == [1, 2, 4, 8]
    assert "width of 8" in tokens.answer and "tokens of" in tokens.subject


def test_only_the_first_characters_are_counted() -> None:
    cut = ngram_rank_finding(None, ["abab" * 50, "cdcd" * 50], order=1, top=20, ranks=(1,), steps=5, most=200)
    assert "1 texts, 200 characters." in cut.notes
    with pytest.raises(ConfigError, match="most is 0"):
        ngram_rank_finding(None, ["abc"], most=0)
