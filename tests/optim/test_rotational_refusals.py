"""What rotational optimizers refuse: angles that do not exist, zero rows, tied and sparse parameters, values out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.optim.lionar import LionAR, LionARConfig
from torchstone.optim.rotational import Rotational
from torchstone.recipe.registry import parse_part


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(draw(*shape, seed=0) * 0.1)


def model() -> Decoder:
    head = {"kind": "linear", "tied": False}
    config = DecoderConfig.model_validate({"width": 16, "depth": 2, "head_dim": 8, "head": head})
    return config.build(vocab_size=20, length=8, seed=0)


@pytest.mark.parametrize(
    "make_it, words",
    [
        (lambda: Rotational([{"params": [weight(3, 4)], "rotational": True, "weight_decay": 0.0}]), "group has weight_decay 0"),
        (lambda: Rotational([weight(3, 4)], weight_decay=0.0), "weight_decay is 0 for every matrix"),
        (lambda: Rotational([{"params": [weight(3)], "rotational": True}]), r"\[3\], and its group is rotational per neuron"),
        (lambda: LionAR([weight(3, 4)], 1e-3), "linear angle schedule needs the peak learning rate, and peak_lr is None"),
        (lambda: Rotational([weight(3, 4)], angle_schedule="cubic"), "'cubic'; choose sqrt or linear"),
        (lambda: Rotational([weight(3, 4)], angles=3), "angles is no setting of a rotation"),
        (lambda: Rotational([weight(3, 4)], "adam"), "inner is 'adam'; choose one of adamw, sgdm, lion"),  # type: ignore[arg-type]
        (lambda: Rotational([weight(3, 4)], "sgdm", betas=(0.9, 0.9)), "inner sgdm has no such setting"),
        (lambda: Rotational([weight(3, 4)], "lion", momentum=0.9), r"belongs to sgdm\); leave it out"),
        (lambda: Rotational([weight(3, 4)], "lion", bias_correction="adam"), "which a sign does not see"),
        (lambda: Rotational([weight(3, 4)], betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\); give values from 0 up to"),
        (lambda: Rotational([weight(3, 4)], update_norm_decay=1.0), "update_norm_decay is 1.0"),
        (lambda: Rotational([weight(3, 4)], lr=-1.0), "lr is -1.0"),
        (lambda: Rotational([weight(3, 4)], weight_decay=-0.1), "weight_decay is -0.1"),
        (lambda: Rotational([weight(3, 4)], eps=0.0), "eps is 0.0"),
        (lambda: LionAR([weight(3, 4)], beta=0.9, betas=(0.9, 0.9), peak_lr=1.0), "give either betas, or beta with nesterov"),
    ],
)  # fmt: skip
def test_what_is_refused(make_it: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_it()


def test_a_zero_row_is_named() -> None:
    made = model()
    made.head.get_parameter("project.weight").data[17] = 0
    config = LionARConfig(rotate_embeddings=True)
    with pytest.raises(
        ConfigError, match="row 17 of head.project.weight has zero norm: a rotational update is undefined"
    ):
        config.build(made)


def test_a_row_that_became_zero_is_named_before_the_first_rotation() -> None:
    parameter = weight(4, 5)
    optimizer = Rotational([("w", parameter)])
    parameter.data[2] = 0
    with pytest.raises(ConfigError, match="row 2 of w has zero norm"):
        parameter.grad = draw(4, 5, seed=1)
        optimizer.step()


def test_a_constant_row_cannot_be_centred() -> None:
    with pytest.raises(ConfigError, match="row 1 of w is constant"):
        Rotational([("w", nn.Parameter(torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])))])


def test_a_whole_zero_tensor_is_named_without_a_row() -> None:
    with pytest.raises(ConfigError, match="^w has zero norm"):
        Rotational([("w", nn.Parameter(torch.zeros(3, 4)))], per_neuron=False)


@pytest.mark.parametrize("groups", [lambda w: [w, w], lambda w: [{"params": [w]}, {"params": [w]}]], ids=["one", "two"])
def test_a_parameter_listed_twice_is_refused(groups: Any) -> None:
    with pytest.raises(ConfigError, match=r"shape \[3, 4\] is listed twice"):
        Rotational(groups(weight(3, 4)))


def test_a_sparse_gradient_is_refused_before_anything_is_updated() -> None:
    first, table = weight(3, 4), nn.Embedding(5, 4, sparse=True)
    optimizer = Rotational([("first", first), ("table", table.weight)])
    before = first.detach().clone()
    first.grad = draw(3, 4, seed=0)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="table has a sparse gradient"):
        optimizer.step()
    assert torch.equal(first, before)


@pytest.mark.parametrize("kind", ["rotational", "lionar"])
def test_a_model_of_which_nothing_rotates_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="no parameter of the model rotates"):
        parse_part("optimizer", {"kind": kind, "weight_decay": 0.0}).build(model())


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"update_norm_decay": 1.0}, "update_norm_decay"),
        ({"inner": "sgdm", "eps": 1e-8}, "inner sgdm has no such setting"),
        ({"bias_correction": "half"}, "bias_correction"),
        ({"rrc_batch_size": 1}, "rrc_batch_size"),
    ],
)
def test_recipe_values_out_of_range_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=word):
        parse_part("optimizer", {"kind": "rotational", **settings})
