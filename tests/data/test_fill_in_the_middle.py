"""Fill in the middle: every piece can be put together again, goals are drawn within their range, rows are pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchstone.data.batch import IGNORE
from torchstone.data.fill_in_the_middle import FillInTheMiddleConfig, FillInTheMiddleSource
from torchstone.data.source import DataSource
from torchstone.data.text import TextSource

END, FIM = 256, 257
Build = Callable[..., FillInTheMiddleSource]


@pytest.fixture
def source(stories: Callable[..., TextSource]) -> Build:
    """Builds rearranged stories: source(piece=24, order="as-written", …)."""

    def build(length: int = 32, **settings: Any) -> FillInTheMiddleSource:
        text = stories(length=length)
        config = FillInTheMiddleConfig(**{"piece": 40, "goal_min": 3, "goal_max": 9, **settings})
        return FillInTheMiddleSource(config, text)

    return build


def stream_of(found: FillInTheMiddleSource, seed: int, epoch: int = 0) -> list[int]:
    """All tokens of an epoch in the order of the text."""
    windows = found.train.windows(found.length)
    batch = found.batch(seed, epoch, windows)
    rows: dict[int, list[int]] = {}
    from torchstone.data.order import item_at

    items = item_at([epoch * windows + row for row in range(windows)], windows, seed)
    for item, row in zip(items, batch.tokens_bt.tolist(), strict=True):
        rows[int(item)] = row
    return [token for item in sorted(rows) for token in rows[item]]


def pieces_of(tokens: list[int]) -> list[list[int]]:
    """Complete pieces, without their end tokens."""
    pieces: list[list[int]] = [[]]
    for token in tokens:
        if token == END:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces[:-1]


def test_pieces_give_back_the_text(source: Build) -> None:
    found = source()
    again = []
    goals = []
    for piece in pieces_of(stream_of(found, seed=0)):
        cut = piece.index(FIM)
        goals.append(cut)
        assert FIM not in piece[cut + 1 :]
        again.append(piece[cut + 1 :] + piece[:cut])
    assert min(goals) >= 0 and max(goals) == 9
    assert {length for goal, piece in zip(goals, again, strict=True) if len(piece) > 9 for length in [goal]} == set(
        range(3, 10)
    )
    shard = found.text.shards.train
    texts, begin = [], 0
    for end in shard.ends:
        text = shard.read(begin, int(end) - 1).tolist()
        texts += [text[start : start + 40] for start in range(0, len(text), 40)]
        begin = int(end)
    assert again == texts[: len(again)] and len(texts) - len(again) <= 2


def test_as_written_keeps_the_order_and_the_same_pieces(source: Build) -> None:
    plain, turned = source(order="as-written"), source()
    assert plain.train.document_p.tolist() == turned.train.document_p.tolist()
    wanted = [piece[piece.index(FIM) + 1 :] + piece[: piece.index(FIM)] for piece in pieces_of(stream_of(turned, 0))]
    found = pieces_of(stream_of(plain, 0))
    shared = min(len(found), len(wanted))
    assert shared > 100 and found[:shared] == wanted[:shared]


def test_rows_depend_on_seed_step_and_row_alone(source: Build) -> None:
    found, again = source(), source()
    whole = found.batch(3, 5, 12)
    parts = [again.batch(3, 5, 12, start, start + 4) for start in (8, 0, 4)]
    parts.sort(key=lambda part: part.rows)
    for name in ("tokens_bt", "targets_bt", "positions_bt", "documents_bt"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert not torch.equal(found.batch(4, 5, 12).tokens_bt, whole.tokens_bt)


def test_goals_are_drawn_anew_in_the_next_epoch_and_never_for_held_out_rows(source: Build) -> None:
    found = source()
    first, second = (stream_of(found, 0, epoch) for epoch in (0, 1))
    assert first != second
    assert sorted(token for token in first if token != FIM) != [] and len(first) == len(second)
    held = [torch.cat([batch.tokens_bt for batch in found.evaluation(size, 7)]) for size in (2, 7)]
    assert torch.equal(held[0], held[1])


def test_attention_and_targets_stop_at_the_end_of_a_piece(source: Build) -> None:
    batch = source().batch(0, 0, 16)
    assert batch.documents_bt is not None and batch.positions_bt is not None
    ends_bt = batch.tokens_bt == END
    assert ends_bt.any()
    assert (batch.targets_bt[ends_bt] == IGNORE).all() and (batch.targets_bt[~ends_bt] != IGNORE).all()
    inner = ends_bt[:, :-1]
    assert torch.equal(batch.documents_bt.diff(dim=1), inner.long())
    assert (batch.positions_bt[:, 1:][inner] == 0).all()
    shifted = batch.targets_bt[:, :-1][~inner]
    assert torch.equal(shifted, batch.tokens_bt[:, 1:][~inner])


def test_documents_name_the_pieces(source: Build) -> None:
    found = source()
    batch, spans = found.batch(1, 2, 4), found.documents(1, 2, 4)
    for row, inside in zip(batch.tokens_bt.tolist(), spans, strict=True):
        assert inside[0].start == 0 and inside[-1].stop == len(row)
        assert [span.stop for span in inside[:-1]] == [
            place + 1 for place, token in enumerate(row[:-1]) if token == END
        ]
        assert all(span.id.startswith("story-") for span in inside)


def test_it_is_a_source_with_one_more_token(source: Build) -> None:
    found = source()
    assert isinstance(found, DataSource)
    assert found.vocab_size == 258 and found.fim_token == FIM and found.end_token == END and found.length == 32
    assert found.settings.vocabulary() != 0 and source(order="as-written").fingerprint != found.fingerprint


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="suffixes of 25 to 75 tokens do not fit pieces of 60"):
        FillInTheMiddleConfig(piece=60)
    with pytest.raises(ValueError, match="text is of the kind recall"):
        FillInTheMiddleConfig.model_validate({"text": {"kind": "recall"}})
