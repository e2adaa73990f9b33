"""The controls of LongPPL: foreign and missing far context, on a model whose far context is known."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters import open_subject
from torchstone.evals.longppl import longppl
from torchstone.evals.longppl_controls import far_context
from torchstone.evals.longppl_finding import longppl_finding
from torchstone.evals.longppl_scorer import scorer_of
from torchstone.models.decoder import DecoderConfig

RULE = {"trunc_len": 24, "stride": 8, "alpha": 2.0, "beta": -2.0}


class Codec:
    """Characters as ids."""

    def spans(self, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        return [ord(letter) - 96 for letter in text], [(at, at + 1) for at in range(len(text))]


def remembers(tokens_bt: Tensor) -> Tensor:
    """Logits that repeat what followed the last two tokens, wherever they stood before; else nothing is known."""
    logits_btv = torch.zeros(*tokens_bt.shape, 27)
    for row, tokens_t in enumerate(tokens_bt.tolist()):
        seen: dict[tuple[int, int], int] = {}
        for at in range(1, len(tokens_t)):
            pair = tokens_t[at - 1], tokens_t[at]
            if pair in seen:
                logits_btv[row, at, tokens_t[seen[pair] + 1]] = 8.0
            seen[pair] = at
    return logits_btv


def texts() -> list[str]:
    """Documents of random letters whose first 40 return at the end."""
    draw = np.random.default_rng(0)
    heads = ["".join(chr(97 + code) for code in draw.integers(26, size=40)) for _ in range(3)]
    return [head + "".join(chr(97 + code) for code in draw.integers(26, size=80)) + head for head in heads]


def test_key_tokens_lose_their_advantage_with_another_documents_text() -> None:
    found = longppl(texts(), remembers, remembers, tokenizer=Codec(), evaluator_tokenizer=Codec(), **RULE)
    contexts = far_context(scorer_of(remembers, Codec()), texts(), found)
    assert contexts is not None and found.longppl is not None
    count, own, foreign, near = contexts.perplexities(key=True)
    assert 40 <= count == contexts.key_k.sum() <= 3 * 2 * 8 and own is not None and own < 1.1
    assert near is not None and near > 20 and foreign is not None and foreign > 20
    np.testing.assert_allclose(contexts.near_k[contexts.key_k], np.log(27), atol=0.5)
    assert contexts.lost(key=True).effect > 2.0


def test_a_stranger_with_the_same_text_leaves_the_advantage() -> None:
    twice = texts()[:1] * 2
    found = longppl(twice, remembers, remembers, tokenizer=Codec(), evaluator_tokenizer=Codec(), **RULE)
    contexts = far_context(scorer_of(remembers, Codec()), twice, found)
    assert contexts is not None
    assert contexts.near_k[contexts.key_k].min() > 2.0 > 0.1 > contexts.foreign_k[contexts.key_k].max()


def test_it_needs_two_documents_and_key_tokens() -> None:
    found = longppl(texts()[:1], remembers, remembers, tokenizer=Codec(), evaluator_tokenizer=Codec(), **RULE)
    assert far_context(scorer_of(remembers, Codec()), texts()[:1], found) is None
    none = longppl(
        texts(), remembers, remembers, tokenizer=Codec(), evaluator_tokenizer=Codec(), **{**RULE, "alpha": 9.0}
    )
    assert far_context(scorer_of(remembers, Codec()), texts(), none) is None


def test_the_finding_shows_both_contexts() -> None:
    model = DecoderConfig(width=16, depth=2, head_dim=8).build(257, 200, 0).eval()
    subject = open_subject(model, tokenizer=ByteTokenizer())
    asked = {**RULE, "alpha": 0.0, "beta": -9.0, "evaluator": subject.name}
    found = longppl_finding(subject, texts(), **asked)
    table = next(table for table in found.tables if table.title == "What the far context is worth")
    assert [row[0] for row in table.rows] == ["key tokens", "other tokens"]
    assert "another document in place of the far context" in found.control
    alone = longppl_finding(subject, texts()[:1], **asked)
    assert "it needs two documents" in alone.control
