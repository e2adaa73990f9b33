"""Every trainable parameter is in exactly one group: matrices decay, vectors and exempt parameters do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchstone.errors import ConfigError
from torchstone.optim.groups import decay_rules, parameter_groups, split_parameters


class Layer(nn.Module):
    def __init__(self, exempt: tuple[str, ...] = ("scale",)) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 3))
        self.gain = nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.ones(2, 2))
        self.exempt = exempt

    def no_decay_parameters(self) -> tuple[str, ...]:
        return self.exempt


def names(model: nn.Module, group: list[nn.Parameter]) -> set[str]:
    found = {id(parameter) for parameter in group}
    return {name for name, parameter in model.named_parameters() if id(parameter) in found}


def test_matrices_decay_and_vectors_and_exempt_ones_do_not():
    model = nn.Sequential(Layer(), nn.Linear(3, 4))
    groups = split_parameters(model, decay_rules(model))
    assert names(model, groups["decay"]) == {"0.matrix", "1.weight"}
    assert names(model, groups["no_decay"]) == {"0.gain", "0.scale", "1.bias"}


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = nn.Sequential(Layer(), nn.Linear(3, 4))
    model[1].bias.requires_grad_(False)
    grouped = [id(value) for group in parameter_groups(model, 0.1) for value in group["params"]]
    wanted = [id(value) for value in model.parameters() if value.requires_grad]
    assert sorted(grouped) == sorted(wanted)


def test_a_shared_parameter_that_one_of_its_names_exempts_is_not_decayed():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), Layer()])
    model[0].weight = model[1].scale
    assert all(value is not model[1].scale for value in split_parameters(model, decay_rules(model))["decay"])


@pytest.mark.parametrize(
    "rules, word",
    [
        ({"decay": lambda name, value: value.dim() == 2}, "no group"),
        ({"decay": lambda name, value: True, "rest": lambda name, value: value.dim() == 1}, "decay and rest"),
    ],
)
def test_a_parameter_in_no_group_or_in_two_is_an_error(rules, word):
    with pytest.raises(ConfigError, match=rf"gain \(in {word}\)"):
        split_parameters(Layer(), rules)


def test_an_exemption_of_nothing_is_an_error():
    with pytest.raises(ConfigError, match="scales, which the model does not have"):
        decay_rules(Layer(exempt=("scales",)))


def test_nothing_to_train_is_an_error():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        parameter_groups(frozen, 0.1)


def test_empty_groups_are_left_out():
    assert [group["weight_decay"] for group in parameter_groups(nn.Linear(2, 2, bias=False), 0.3)] == [0.3]
