"""Rotational optimizers over every registered mixer, position, feed-forward, head and projection: they build and make a step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from torchstone.data.batch import Batch
from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.objectives.next_token import NextToken
from torchstone.optim.rotational_groups import dense_weights
from torchstone.recipe.registry import kinds, parse_part

WIDTH, VOCABULARY, LENGTH = 16, 11, 8
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("mixer", "differential"): {"heads": 2, "kv_heads": 1},
    ("position", "fire"): {"width": 4},
    ("head", "factored"): {"rank": 4},
}


def model_with(family: str, kind: str) -> Decoder:
    part = {"kind": kind, **SETTINGS.get((family, kind), {})}
    block: dict[str, Any] = {}
    top: dict[str, Any] = {}
    if family == "position":
        block["mixer"] = {"kind": "attention", "position": part}
    elif family == "head":
        top["head"] = part
    else:
        block[family] = part
    data = {"width": WIDTH, "depth": 2, "head_dim": 4, "block": block, **top}
    return DecoderConfig.model_validate(data).build(vocab_size=VOCABULARY, length=LENGTH, seed=0)


def cases() -> list[tuple[str, str]]:
    families = ("mixer", "position", "feedforward", "head", "projection")
    return [(family, kind) for family in families for kind in kinds(family)]


@pytest.mark.parametrize("family, kind", cases())
@pytest.mark.parametrize("optimizer", ["lionar", "rotational"])
def test_every_part_can_be_trained(family: str, kind: str, optimizer: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_with(family, kind)
    config = parse_part("optimizer", {"kind": optimizer, "learning_rate": 1e-2})
    if (family, kind) == ("projection", "pattention"):  # tokens in the place of every dense map
        with pytest.raises(ConfigError, match=r"no parameter of the model rotates.*\(or there is none\)"):
            config.build(model)
        return
    made = config.build(model)
    turning = {id(value) for group in made.param_groups for value in group["params"] if made.rotates(group, value)}
    assert turning and turning <= dense_weights(model)
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    output = NextToken()(model, Batch(tokens[:, :-1], tokens[:, 1:]))
    output.loss_sum.backward()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    made.step()
    for name, value in model.named_parameters():
        assert value.isfinite().all()
        if id(value) in turning and value.grad is not None and bool(value.grad.any()):
            assert not torch.equal(value, before[name]), name
            torch.testing.assert_close(value.norm(dim=1), before[name].norm(dim=1), rtol=1e-5, atol=1e-7)
