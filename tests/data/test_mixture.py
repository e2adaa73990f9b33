"""Mixtures: fixed shares, ids of their own, the order that each source has alone, and honest errors."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from torchstone.data.batch import IGNORE
from torchstone.data.mixture import Mixture, MixtureConfig
from torchstone.data.source import DataSource
from torchstone.data.synthetic.gap_recall import GapRecallConfig
from torchstone.data.synthetic.recall import RecallConfig
from torchstone.errors import ConfigError, DataError
from torchstone.recipe.registry import parse_part

TASKS = [{"kind": "recall", "cells": 16}, {"kind": "gap-recall", "cells": 16}]


def build(shares: list[float] | None = None) -> Mixture:
    return parse_part("data", {"kind": "mixture", "sources": TASKS, "shares": shares or [0.75, 0.25]}).build(None)


def test_every_batch_has_the_shares_and_the_rows_of_each_source_alone() -> None:
    mixture = build()
    first, second = RecallConfig(cells=16).build(None), GapRecallConfig(cells=16).build(None)
    batch = mixture.batch(3, 5, 8)
    assert isinstance(mixture, DataSource) and mixture.counts(8) == [6, 2]
    assert torch.equal(batch.tokens_bt[:6], first.batch(3, 5, 6).tokens_bt)
    assert torch.equal(batch.tokens_bt[6:], second.batch(3, 5, 2).tokens_bt + first.vocab_size)
    targets_bt = second.batch(3, 5, 2).targets_bt
    expected_bt = torch.where(targets_bt == IGNORE, IGNORE, targets_bt + first.vocab_size)
    assert torch.equal(batch.targets_bt[6:], expected_bt)
    assert batch.rows == tuple(range(40, 48))
    assert mixture.vocab_size == first.vocab_size + second.vocab_size
    assert [row[0].stop for row in mixture.documents(3, 5, 8)] == [32] * 8


@pytest.mark.parametrize("cuts", [(0, 8), (0, 3, 8), (0, 6, 7, 8), (0, 1, 2, 5, 8)])
def test_any_split_over_processes_is_the_same_batch(cuts: tuple[int, ...]) -> None:
    mixture = build()
    whole = mixture.batch(1, 2, 8)
    parts = [mixture.batch(1, 2, 8, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat([part.tokens_bt for part in parts]), whole.tokens_bt)
    assert torch.equal(torch.cat([part.targets_bt for part in parts]), whole.targets_bt)
    assert sum((part.rows for part in parts), ()) == whole.rows


def test_each_half_is_evaluated_alone_and_together() -> None:
    mixture = build([0.5, 0.5])
    together = list(mixture.evaluation(4, 12))
    assert [row for batch in together for row in batch.rows] == list(range(12))
    for index, begin in ((0, 0), (1, 6)):
        part = mixture.part(index)
        alone = torch.cat([batch.tokens_bt for batch in part.evaluation(4, 6)])
        assert torch.equal(torch.cat([batch.tokens_bt for batch in together])[begin : begin + 6], alone)
        inner = torch.cat([batch.tokens_bt for batch in part.inner.evaluation(4, 6)])
        assert torch.equal(part.own_ids(alone), inner)


def test_text_keeps_its_documents_beside_tasks(stories) -> None:
    text, task = stories(mask_documents=True), RecallConfig(cells=16).build(None)
    mixture = Mixture([text, task], [0.5, 0.5])
    batch = mixture.batch(0, 0, 4)
    assert batch.documents_bt is not None and batch.positions_bt is not None
    assert torch.equal(batch.documents_bt[:2], text.batch(0, 0, 2).documents_bt)
    assert not batch.documents_bt[2:].any() and batch.positions_bt[3].tolist() == list(range(32))
    assert next(mixture.evaluation(2, 4)).documents_bt is not None


def test_recipes_count_and_round_trip() -> None:
    part = parse_part("data", {"kind": "mixture", "sources": TASKS, "shares": [0.5, 0.5]})
    again = parse_part("data", part.model_dump(mode="json"))
    assert again == part and part.build(None).fingerprint == again.build(None).fingerprint
    assert part.vocabulary() == build().vocab_size and part.sequence_length() == 32
    assert build([0.5, 0.5]).fingerprint != build().fingerprint
    assert isinstance(MixtureConfig().sources[0].vocabulary(), int)


def test_shares_and_lengths_must_fit() -> None:
    for shares in ([1.0], [0.5, 0.6], [1.0, 0.0]):
        with pytest.raises((ConfigError, ValidationError), match="one positive share for each"):
            parse_part("data", {"kind": "mixture", "sources": TASKS, "shares": shares})
    with pytest.raises((ConfigError, ValidationError), match="equally long"):
        sources = [{"kind": "recall", "cells": 8}, {"kind": "recall", "cells": 9}]
        parse_part("data", {"kind": "mixture", "sources": sources, "shares": [0.5, 0.5]})
    with pytest.raises(ConfigError, match="one for each"):
        Mixture([], [])


def test_a_source_without_a_row_is_named() -> None:
    with pytest.raises(DataError, match=r"source 1 of the mixture without a row.*batch.sequences"):
        build().batch(0, 0, 1)


def test_two_sources_of_one_task_are_refused() -> None:
    """Rows of one task come from the same random numbers, whatever its settings: most of their tokens are equal."""
    other, first = TASKS
    second = {**first, "max_gap": 3}
    rows = [parse_part("data", part).build(None).batch(0, 0, 50).tokens_bt for part in (first, second)]
    assert (rows[0] == rows[1]).double().mean() > 0.8
    mixed = {"kind": "mixture", "sources": [first, other], "shares": [0.5, 0.5]}
    for sources in ([first, second], [first, first], [second, mixed]):
        part = parse_part("data", {"kind": "mixture", "sources": sources, "shares": [0.5, 0.5]})
        with pytest.raises(ConfigError, match="two sources of the task gap-recall; .*same random numbers"):
            part.build(None)


def test_two_corpora_may_be_mixed(stories) -> None:
    text = stories()
    assert Mixture([text, text], [0.5, 0.5]).vocab_size == 2 * text.vocab_size


def test_the_message_shows_the_sum_of_the_shares() -> None:
    for shares, total in (([0.5, 0.6], "1.1"), ([0.2, 0.2], "0.4"), ([0.5, 0.50001], "1.00001")):
        with pytest.raises(
            (ConfigError, ValidationError), match=rf"add up to {total}; give one positive share for each"
        ):
            parse_part("data", {"kind": "mixture", "sources": TASKS, "shares": shares})
    assert MixtureConfig(shares=[0.1, 0.9000000001]).shares[0] == 0.1


# Shared token ids ---------------------------------------------------------------------------------


def test_shared_ids_are_those_of_each_text(stories) -> None:
    text, masked = stories(), stories(mask_documents=True)
    mixture = Mixture([text, masked], [0.5, 0.5], "shared")
    assert mixture.vocab_size == text.vocab_size and mixture.tokenizer is text.tokenizer
    batch = mixture.batch(3, 5, 8)
    assert torch.equal(batch.tokens_bt[:4], text.batch(3, 5, 4).tokens_bt)
    assert torch.equal(batch.tokens_bt[4:], masked.batch(3, 5, 4).tokens_bt)
    assert torch.equal(batch.targets_bt[4:], masked.batch(3, 5, 4).targets_bt)
    assert torch.equal(mixture.part(1).own_ids(batch.tokens_bt), batch.tokens_bt)
    separate = Mixture([text, masked], [0.5, 0.5])
    assert separate.tokenizer is None and separate.bytes_per_token is None
    assert separate.fingerprint != mixture.fingerprint


def test_bytes_per_token_are_those_of_the_held_out_rows(json_lines, tmp_path) -> None:
    """A text of two-byte characters has as many tokens as bytes, but for the ends of its documents."""
    files = [
        json_lines([{"text": "word " * 40}] * 40, "long.jsonl"),
        json_lines([{"text": "übergrößenträger"}] * 400, "short.jsonl"),
    ]
    config = {"kind": "text", "tokenizer": "bytes", "length": 16, "validation_fraction": 0.5}
    sources = [{**config, "corpus": {"kind": "files", "paths": str(path)}} for path in files]
    part = parse_part("data", {"kind": "mixture", "sources": sources, "shares": [0.75, 0.25], "token_ids": "shared"})
    mixture = part.build(tmp_path / "cache")
    long, short = (part.inner.bytes_per_token for part in mixture.parts)
    assert short < long < 1
    assert mixture.bytes_per_token == pytest.approx(0.75 * long + 0.25 * short)
    assert part.vocabulary() == mixture.vocab_size == part.sources[0].vocabulary()


def test_shared_ids_need_one_tokenizer(stories) -> None:
    text, task = stories(), RecallConfig(cells=16).build(None)
    with pytest.raises(ConfigError, match="source 1 of the mixture has no tokenizer; use token_ids: separate"):
        Mixture([text, task], [0.5, 0.5], "shared")
    other = stories(tokenizer={"kind": "bpe", "vocab_size": 300})
    with pytest.raises(ConfigError, match=r"that of source 1 \(300 ids\) is not that of source 0 .*tokenizer: bytes"):
        Mixture([text, other], [0.5, 0.5], "shared")
    assert Mixture([other, other], [0.5, 0.5], "shared").vocab_size == 300
    whole = Mixture([Mixture([text, text], [0.5, 0.5], "shared"), text], [0.5, 0.5], "shared")
    assert whole.tokenizer is text.tokenizer
