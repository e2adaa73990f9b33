"""Arithmetic on weights: blending, differences, and holding other weights for a while."""

from __future__ import annotations

import pytest
import torch

from torchstone.diagnose.landscape.states import blend, difference, holding, parameters_of, require_alike, state_of
from torchstone.errors import ConfigError


def test_floating_tensors_are_blended_and_integers_come_from_the_first() -> None:
    a = {
        "w": torch.tensor([0.0, 4.0]),
        "buffer": torch.tensor([1.0]),
        "count": torch.tensor(3),
        "mask": torch.tensor([True]),
    }
    b = {
        "w": torch.tensor([4.0, 0.0]),
        "buffer": torch.tensor([2.0]),
        "count": torch.tensor(9),
        "mask": torch.tensor([False]),
    }
    found = blend(a, b, 0.25)
    assert torch.equal(found["w"], torch.tensor([1.0, 3.0])) and torch.equal(found["buffer"], torch.tensor([1.25]))
    assert int(found["count"]) == 3 and bool(found["mask"])
    assert torch.equal(blend(a, b, -0.25)["w"], torch.tensor([-1.0, 5.0]))


def test_ends_are_exact_and_narrow_types_are_rounded_once() -> None:
    a, b = ({"w": torch.randn(1000, generator=torch.Generator().manual_seed(seed)).bfloat16()} for seed in (0, 1))
    assert torch.equal(blend(a, b, 0.0)["w"], a["w"]) and torch.equal(blend(a, b, 1.0)["w"], b["w"])
    middle = blend(a, b, 0.3)["w"]
    assert middle.dtype == torch.bfloat16
    assert torch.equal(middle, (0.7 * a["w"].float() + 0.3 * b["w"].float()).bfloat16())


def test_a_model_holds_other_weights_and_gets_its_own_back_even_after_an_error() -> None:
    model = torch.nn.BatchNorm1d(3)
    own, other = state_of(model), state_of(model)
    other["weight"] = torch.full((3,), 7.0)
    with pytest.raises(RuntimeError), holding(model, other):
        assert model.weight[0].item() == 7.0
        raise RuntimeError("inside")
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_differences_and_parameters_leave_out_what_is_not_trained() -> None:
    model = torch.nn.BatchNorm1d(3)
    assert set(difference(state_of(model), state_of(model))) == {"weight", "bias", "running_mean", "running_var"}
    model.bias.requires_grad_(False)
    assert set(parameters_of(model)) == {"weight"}


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"weight is \[2, 3\] in one and \[2, 4\] in the other"):
        require_alike(torch.nn.Linear(3, 2).state_dict(), torch.nn.Linear(4, 2).state_dict())
    with pytest.raises(ConfigError, match="bias is in one of them only"):
        difference(torch.nn.Linear(3, 2).state_dict(), torch.nn.Linear(3, 2, bias=False).state_dict())
