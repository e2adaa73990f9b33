"""Scored data: the right row for every seed and epoch, and refusal of stores of other data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from torchstone.data.batch import IGNORE
from torchstone.data.loss_store import Header, LossStore, LossStoreWriter
from torchstone.data.mixture import Mixture
from torchstone.data.scored import ScoredConfig, ScoredSource
from torchstone.data.source import DataSource
from torchstone.data.text import TextSource
from torchstone.errors import ConfigError, DataError
from torchstone.recipe.load import load_recipe

Stories = Callable[..., TextSource]


def marked_store(source: TextSource, path: Path, rows: int = 7) -> LossStore:
    """A store whose losses are a function of the window's own targets, so that a wrong row shows."""
    about = {"model": "none"}
    header = Header(
        source.fingerprint, source.tokenizer.fingerprint, about, source.windows, source.length, rows, "float32"
    )
    writer = LossStoreWriter(path, header)
    for block in writer.missing():
        writer.write(block, mark(source.window(np.asarray(header.span(block))).targets_bt).numpy())
    return writer.finish()


def mark(targets_bt: torch.Tensor) -> torch.Tensor:
    return (targets_bt.clamp(min=0) * 0.01 + torch.arange(targets_bt.shape[1]) * 0.001).float()


@pytest.mark.parametrize("masked", [False, True])
def test_every_seed_step_and_epoch_finds_its_rows(stories: Stories, tmp_path: Path, masked: bool) -> None:
    source = stories(mask_documents=masked)
    scored = ScoredSource(source, marked_store(source, tmp_path / "store"))
    assert isinstance(scored, DataSource)
    epoch = source.windows // 8
    for seed, step in ((0, 0), (0, 3), (5, epoch), (9, 2 * epoch + 1)):
        batch, plain = scored.batch(seed, step, 8, 2, 7), source.batch(seed, step, 8, 2, 7)
        assert torch.equal(batch.tokens_bt, plain.tokens_bt) and torch.equal(batch.targets_bt, plain.targets_bt)
        assert batch.rows == plain.rows and batch.reference_bt is not None and batch.reference_bt.dtype == torch.float32
        expected = mark(batch.targets_bt).masked_fill(batch.targets_bt == IGNORE, 0.0)
        assert torch.equal(batch.reference_bt, expected)
    held_out = next(scored.evaluation(4, 4))
    assert held_out.reference_bt is None
    assert torch.equal(held_out.tokens_bt, next(source.evaluation(4, 4)).tokens_bt)


def test_the_source_shows_through(stories: Stories, tmp_path: Path) -> None:
    source = stories()
    scored = ScoredSource(source, marked_store(source, tmp_path / "store"))
    assert (scored.vocab_size, scored.length) == (source.vocab_size, source.length)
    assert scored.tokenizer is source.tokenizer and scored.bytes_per_token == source.bytes_per_token
    assert scored.documents(0, 0, 4) == source.documents(0, 0, 4)
    assert scored.fingerprint != source.fingerprint
    again = ScoredSource(source, marked_store(source, tmp_path / "copy"))
    assert again.fingerprint == scored.fingerprint


def test_stores_of_other_data_are_refused(stories: Stories, tmp_path: Path) -> None:
    store = marked_store(stories(), tmp_path / "store")
    with pytest.raises(DataError, match="of another length: 32 there, 16 in this recipe"):
        ScoredSource(stories(length=16), store)
    with pytest.raises(DataError, match="of another data source"):
        ScoredSource(stories(mask_documents=True), store)
    with pytest.raises(DataError, match="of another"):
        ScoredSource(stories(validation_fraction=0.2), store)


def test_sources_without_windows_are_refused_by_name(tmp_path: Path) -> None:
    for kind, words in (
        ("noisy-trigram", "noisy-trigram was given.*objective.reference"),
        ("mixture", "mixture was given.*wrap each text source"),
        ("fill-in-the-middle", "fill-in-the-middle was given"),
    ):
        with pytest.raises(ValueError, match=words):
            ScoredConfig(source={"kind": kind}, scores=str(tmp_path))
    with pytest.raises(DataError, match="is no loss store.*torchstone score data"):
        ScoredConfig(source={"kind": "text", "tokenizer": "bytes"}, scores=str(tmp_path)).build(tmp_path / "cache")
    with pytest.raises(ConfigError, match="scores"):
        load_recipe({"model": "decoder", "data": {"kind": "scored"}, "budget": {"steps": 1}})


def test_a_recipe_holds_it(story_file: Path, stories: Stories, story_cache: Path, tmp_path: Path) -> None:
    store = marked_store(stories(), tmp_path / "store")
    inner = {"kind": "text", "corpus": {"kind": "files", "paths": str(story_file)}, "tokenizer": "bytes", "length": 32}
    recipe = load_recipe(
        {
            "model": "decoder",
            "data": {"kind": "scored", "source": inner, "scores": str(store.path)},
            "budget": {"steps": 1},
        }
    )
    assert recipe.data.vocabulary() == 257 and recipe.data.sequence_length() == 32
    assert recipe.data.build(story_cache).batch(0, 0, 2).reference_bt is not None
    assert load_recipe(recipe.data_dict()) == recipe


def test_a_mixture_of_scored_texts_keeps_their_losses(stories: Stories, tmp_path: Path) -> None:
    first, second = stories(), stories(mask_documents=True)
    parts = [ScoredSource(one, marked_store(one, tmp_path / str(i))) for i, one in enumerate((first, second))]
    batch = Mixture(parts, (0.5, 0.5), "shared").batch(3, 1, 8)
    assert batch.reference_bt is not None
    assert torch.equal(batch.reference_bt, mark(batch.targets_bt).masked_fill(batch.targets_bt == IGNORE, 0.0))
    with pytest.raises(
        ConfigError, match="source 1 of the mixture brings no stored reference losses, and source 0 does"
    ):
        Mixture([parts[0], second], (0.5, 0.5), "shared").batch(3, 1, 8)
