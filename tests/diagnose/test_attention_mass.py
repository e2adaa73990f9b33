"""Attention masses against sums by hand, for maps and for signed differences of maps."""

from __future__ import annotations

import pytest
import torch

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.synthetic.recall import RecallConfig
from torchstone.diagnose.attention_mass import _masses, attention_mass
from torchstone.errors import DataError
from torchstone.recipe.registry import parse_part

ANSWERS_N1S = torch.tensor([[[True, False, False]], [[False, True, False]]])


def test_maps_sum_to_one():
    weights_nhs = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], [[0.3, 0.6, 0.1], [0.9, 0.05, 0.05]]]).double()
    found = _masses(weights_nhs, ANSWERS_N1S, 3.0)
    assert found.answer == pytest.approx(0.6)  # head 0 is chosen on the first query and measured on the second
    assert found.noise == pytest.approx(0.4)
    assert found.answer_mean == pytest.approx((0.7 + 0.1 + 0.6 + 0.05) / 4)
    assert found.noise_mean == pytest.approx(1 - found.answer_mean)
    assert found.entropy == pytest.approx(-sum(p * torch.tensor(p).log().item() for p in (0.3, 0.6, 0.1)), rel=1e-6)


def test_signed_weights_are_normalised_by_their_absolute_sum():
    weights_nhs = torch.tensor([[[0.5, -0.2, 0.1]], [[-0.2, 0.6, 0.0]]]).double()
    found = _masses(weights_nhs, ANSWERS_N1S, 1.0)
    assert found.answer == pytest.approx(0.6 / 0.8)
    assert found.answer_raw == pytest.approx(0.6)
    assert found.noise == pytest.approx(0.2 / 0.8)


@pytest.mark.parametrize(
    "mixer", [{"kind": "attention"}, {"kind": "differential"}, {"kind": "differential", "version": "v2"}]
)
def test_a_model_is_measured_and_an_untrained_one_wastes_most_of_its_attention(mixer):
    data = RecallConfig(cells=8).build()
    config = parse_part("model", {"kind": "decoder", "width": 32, "depth": 2, "head_dim": 8, "block": {"mixer": mixer}})
    model = config.build(data.vocab_size, data.length, 0).eval()
    found = attention_mass(model, data.evaluation(16, 32), data.answer_positions)
    assert 0.5 < found.noise <= 1
    assert -1 <= found.answer < 0.5
    assert found.largest_score > 0


def test_nothing_to_score_is_an_error():
    data = RecallConfig(cells=8).build()
    config = parse_part("model", {"kind": "decoder", "width": 32, "depth": 1, "head_dim": 8})
    model = config.build(data.vocab_size, data.length, 0)
    tokens_bt = torch.zeros(2, 16, dtype=torch.int64)
    empty = Batch(tokens_bt, torch.full_like(tokens_bt, IGNORE))
    with pytest.raises(DataError, match="at least two scored queries"):
        attention_mass(model, [empty], data.answer_positions)
