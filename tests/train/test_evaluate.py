"""Held-out loss: nothing to score is an error with a reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torchstone.data.batch import IGNORE, Batch
from torchstone.errors import DataError
from torchstone.models.decoder import DecoderConfig
from torchstone.objectives.next_token import NextToken
from torchstone.train.distributed import world
from torchstone.train.evaluate import evaluate
from torchstone.train.precision import Compute


def test_held_out_rows_without_targets_are_an_error_and_no_division_by_zero() -> None:
    class Empty:
        bytes_per_token = None

        def evaluation(self, size: int, sequences: int) -> Iterator[Batch]:
            yield Batch(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), IGNORE))

    model = DecoderConfig.model_validate({"width": 16, "depth": 1, "head_dim": 8}).build(5, 4, 0)
    with world(torch.device("cpu")) as peers, pytest.raises(DataError, match="nothing that the objective scores"):
        evaluate(model, NextToken(), Empty(), 1, 1, Compute("fp32", False), peers)
