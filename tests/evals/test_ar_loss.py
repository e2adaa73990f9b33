"""The loss split into AR-hits and the rest adds up to the whole."""

from __future__ import annotations

import pytest
import torch

from torchstone.data.ngrams import ar_hits
from torchstone.data.synthetic.recall import RecallConfig
from torchstone.errors import DataError
from torchstone.evals.ar_loss import ar_losses
from torchstone.objectives.next_token import NextToken
from torchstone.recipe.registry import parse_part


def test_both_parts_add_up_to_the_mean_loss():
    data = RecallConfig(cells=16, keys=2, values=8).build()
    config = parse_part("model", {"kind": "decoder", "width": 32, "depth": 1, "head_dim": 8})
    model, objective = config.build(data.vocab_size, data.length, 0).eval(), NextToken()
    batch = next(data.evaluation(64, 64))
    batch = type(batch)(batch.tokens_bt[:, :-1], batch.tokens_bt[:, 1:])

    class Everything:
        def evaluation(self, size, sequences):
            yield batch

    found = ar_losses(model, objective, Everything(), 64)
    with torch.no_grad():
        whole = objective(model, batch).per_token_bt.double()
    share = found["ar_hit_share"]
    assert share == pytest.approx(ar_hits(batch).double().mean().item())
    assert share * found["ar_hit_loss"] + (1 - share) * found["other_loss"] == pytest.approx(whole.mean().item())


def test_text_without_repeats_is_an_error():
    config = parse_part("model", {"kind": "decoder", "width": 16, "depth": 1, "head_dim": 8})
    model = config.build(32, 8, 0)

    class Distinct:
        def evaluation(self, size, sequences):
            from torchstone.data.batch import Batch

            tokens_bt = torch.arange(9)[None]
            yield Batch(tokens_bt[:, :-1], tokens_bt[:, 1:])

    with pytest.raises(DataError, match="no AR-hits"):
        ar_losses(model, NextToken(), Distinct(), 1)
