"""The decoder's own settings: patterns by letters, embedding scale, shared modules, states of the right batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.models.pattern import LETTERS, spelled_out
from torchstone.recipe.registry import kinds

TOKENS = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))


def build(**settings: Any) -> Decoder:
    return DecoderConfig.model_validate({"width": 16, "depth": 3, "head_dim": 8, **settings}).build(11, 6, 0).eval()


def test_letters_stand_for_kinds() -> None:
    assert set(LETTERS.values()) <= set(kinds("mixer"))
    assert spelled_out("GDG") == ["attention", "differential", "attention"]
    config = DecoderConfig.model_validate({"width": 16, "depth": 3, "head_dim": 8, "pattern": "GD"})
    assert [mixer.kind for mixer in config.pattern] == ["attention", "differential"]
    again = DecoderConfig.model_validate(config.model_dump(mode="json"))
    assert again == config
    names = [type(block.mixer).__name__ for block in config.build(11, 6, 0)._blocks()]
    assert names == ["MultiHeadAttention", "DifferentialV1", "MultiHeadAttention"]


def test_an_unknown_letter_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"the letter 'Q'.*A \(local-attention\)"):
        spelled_out("RQA")


@pytest.mark.parametrize(
    ("scale", "factor"), [(None, 1.0), (2, 2.0), ("sqrt-width", 5120**0.5), ("sqrt-width-bf16", 71.5)]
)
def test_embedding_scale(scale: Any, factor: float) -> None:
    config = DecoderConfig.model_validate({"width": 5120, "depth": 1, "head_dim": 8, "embedding_scale": scale})
    assert config.skeleton(11, 6).embedding_factor == pytest.approx(factor, abs=1e-12)


@torch.no_grad()
def test_embedding_scale_multiplies_embeddings_and_not_the_head() -> None:
    plain, scaled = build(), build(embedding_scale=3.0)
    hidden_btd = scaled(TOKENS).hidden_btd
    plain.embed.weight.mul_(3.0)
    torch.testing.assert_close(plain(TOKENS).hidden_btd, hidden_btd)
    torch.testing.assert_close(plain.logits(hidden_btd), 3.0 * scaled.logits(hidden_btd))


def test_embedding_scale_must_be_positive() -> None:
    with pytest.raises(ValueError, match="embedding_scale"):
        build(embedding_scale=-1.0)


@torch.no_grad()
def test_a_state_of_another_batch_is_refused() -> None:
    model = build()
    with pytest.raises(ConfigError, match="holds 3 rows and 2 rows of tokens were given"):
        model(TOKENS, state=model.new_state(3, 6))
