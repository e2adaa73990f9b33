"""Decay by role: declared by modules, checked, counted once, and written in one way."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_recipe
from torch import nn

from torchstone.errors import ConfigError
from torchstone.kinds import KINDS
from torchstone.optim.groups import decay_groups, group_table, parameter_groups
from torchstone.optim.weight_decay import WeightDecay
from torchstone.recipe.diff import differences
from torchstone.recipe.fingerprint import recipe_fingerprint
from torchstone.recipe.load import load_recipe
from torchstone.recipe.registry import kinds, parse_part
from torchstone.recipe.yaml import dump_yaml

BY_ROLE = WeightDecay(default=0.3, attention_qk=0.0, attention_vo=0.05, mlp=0.1, embeddings=0.2)


class Fused(nn.Module):
    """Queries, keys and values in one matrix."""

    def __init__(self, roles=("attention_qk", "attention_vo")) -> None:
        super().__init__()
        self.w_qkv = nn.Linear(2, 6)
        self.roles = roles

    def parameter_roles(self):
        return {"w_qkv.weight": self.roles}


def decoder(**settings) -> nn.Module:
    config = {"kind": "decoder", "width": 32, "depth": 2, "head_dim": 8, **settings}
    return parse_part("model", config).skeleton(24, 16)


def decay_by_name(model: nn.Module, decay) -> dict[str, float]:
    return {name: group.weight_decay for group in decay_groups(model, decay) for name in group.parameters}


MIXERS = [
    {"kind": "attention", "kv_heads": 2, "qk_norm": True, "output_norm": True},
    {"kind": "differential"},
    {"kind": "differential", "version": "v2", "kv_heads": 2},
]


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: f"{mixer['kind']} {mixer.get('version', '')}")
def test_each_projection_gets_the_decay_of_its_role(mixer):
    model = decoder(block={"mixer": mixer}, head={"kind": "linear", "tied": False})
    found = decay_by_name(model, BY_ROLE)
    assert set(found) == {name for name, _ in model.named_parameters()}
    expected = {"w_q": 0.0, "w_k": 0.0, "w_v": 0.05, "w_o": 0.05, "w_lambda": 0.3, "embed": 0.2, "project": 0.2}
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        wanted = 0.1 if "feedforward." in name else expected.get(module, 0.3)
        assert found[name] == (wanted if parameter.dim() == 2 else 0.0), name


def every_part():
    """One model setting for each shipped kind of the parts that hold parameters."""
    for kind in kinds("mixer"):
        yield {"block": {"mixer": {"kind": kind}}}
    for kind in kinds("feedforward"):
        yield {"block": {"feedforward": {"kind": kind}}}
    for kind in kinds("head"):
        yield {"head": {"kind": kind}}
    for position, processor in itertools.product(kinds("position"), (None, *KINDS.get("score_processor", {}))):
        mixer = {"kind": "attention", "position": {"kind": position}}
        yield {"block": {"mixer": mixer if processor is None else mixer | {"score_processor": {"kind": processor}}}}


@pytest.mark.parametrize("settings", list(every_part()), ids=str)
def test_every_matrix_of_every_kind_has_one_role_or_is_exempt(settings):
    model = decoder(**settings)
    table = group_table(model, WeightDecay(default=0.1, mlp=0.2))
    names = [name for row in table for name in row["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(row["parameters"] for row in table) == sum(value.numel() for value in model.parameters())


def test_a_plain_number_groups_as_it_always_did():
    model = decoder()
    matrices = [value for value in model.parameters() if value.dim() >= 2]
    for decay in (0.3, WeightDecay(default=0.3)):
        first, second = parameter_groups(model, decay)
        assert (first["weight_decay"], second["weight_decay"]) == (0.3, 0.0)
        assert list(map(id, first["params"])) == list(map(id, matrices))


def test_roles_without_a_number_take_the_default():
    found = decay_by_name(decoder(), WeightDecay(default=0.3, attention_qk=0.0))
    assert found["embed.weight"] == found["blocks.0.mixer.w_v.weight"] == 0.3
    assert found["blocks.1.feedforward.w_up.weight"] == 0.3
    assert found["blocks.1.mixer.w_k.weight"] == 0.0


def test_tied_embeddings_are_counted_once():
    rows = group_table(decoder(head={"kind": "linear", "tied": True}), BY_ROLE)
    (row,) = [row for row in rows if row["group"] == "embeddings"]
    assert (row["names"], row["parameters"]) == (["embed.weight"], 24 * 32)


def test_a_tensor_that_two_modules_share_needs_one_role():
    class Up(nn.Linear):
        def parameter_roles(self):
            return {"weight": "mlp"}

    class Table(nn.Embedding):
        def parameter_roles(self):
            return {"weight": "embeddings"}

    model = nn.ModuleList([Table(2, 2), Up(2, 2, bias=False)])
    model[1].weight = model[0].weight
    with pytest.raises(ConfigError, match=r"0\.weight \(in mlp and embeddings\)"):
        decay_groups(model, WeightDecay(mlp=0.2))
    assert [group.weight_decay for group in decay_groups(model, 0.2)] == [0.2]


def test_a_matrix_without_a_role_is_an_error_where_roles_matter():
    model = nn.ModuleList([decoder(), nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match=r"1\.weight \(in no group\).*parameter_roles"):
        decay_groups(model, BY_ROLE)
    assert "1.weight" in decay_by_name(model, 0.1)


def test_a_role_and_an_exemption_contradict_each_other():
    class Both(Fused):
        def no_decay_parameters(self):
            return ("w_qkv.weight",)

    with pytest.raises(ConfigError, match=r"w_qkv.weight \(in attention_qk and no_decay\)"):
        decay_groups(Both("attention_qk"), WeightDecay(attention_qk=0.0))


def test_a_fused_matrix_takes_one_value_and_no_two():
    with pytest.raises(ConfigError, match="w_qkv.weight is one matrix for attention_qk and attention_vo.* 0 and 0.1"):
        decay_groups(Fused(), WeightDecay(attention_qk=0.0))
    assert decay_by_name(Fused(), WeightDecay(attention_qk=0.2, attention_vo=0.2))["w_qkv.weight"] == 0.2


def test_a_value_for_a_role_that_nothing_has_is_refused():
    with pytest.raises(ConfigError, match="gives a value to mlp.*roles here are attention_qk"):
        decay_groups(Fused("attention_qk"), WeightDecay(mlp=0.2))


def test_an_unknown_role_or_name_is_the_modules_mistake():
    with pytest.raises(ConfigError, match="the role attention"):
        decay_groups(Fused("attention"), WeightDecay(mlp=0.2))
    lying = Fused("mlp")
    lying.w_qkv = nn.Identity()
    with pytest.raises(ConfigError, match="parameter_roles names w_qkv.weight, which"):
        decay_groups(lying, WeightDecay(mlp=0.2))


def test_a_step_multiplies_by_one_minus_the_scheduled_rate_times_the_decay():
    model = parse_part("model", {"kind": "decoder", "width": 16, "depth": 1, "head_dim": 8}).build(8, 4, 0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = parse_part("optimizer", {"kind": "adamw", "weight_decay": BY_ROLE}).build(model)
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    optimizer.step()
    decays = decay_by_name(model, BY_ROLE)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] * (1 - 0.5e-3 * decays[name]), rtol=1e-6, atol=0)


# In recipes ---------------------------------------------------------------------------------------


@pytest.fixture
def recipe():
    return load_recipe(tiny_recipe())


def test_one_role_is_set_from_the_command_line_and_the_number_stays(recipe):
    changed = load_recipe(recipe, ["optimizer.weight_decay=0.2", "optimizer.weight_decay.attention_qk=0"])
    assert changed.optimizer.weight_decay == WeightDecay(default=0.2, attention_qk=0)
    assert load_recipe(changed, ["optimizer.weight_decay={mlp: 1}"]).optimizer.weight_decay.given == {
        "attention_qk": 0.0,
        "mlp": 1.0,
    }
    assert load_recipe(changed, ["optimizer.weight_decay=0.4"]).optimizer.weight_decay == WeightDecay(default=0.4)


def test_yaml_gives_the_same_back(recipe):
    for override in ("optimizer.weight_decay=0.25", "optimizer.weight_decay.attention_vo=0.05"):
        changed = load_recipe(recipe, [override])
        assert load_recipe(dump_yaml(changed)) == changed


def test_equal_decay_has_one_fingerprint_however_it_is_written(recipe):
    assert recipe.data_dict()["optimizer"]["weight_decay"] == 0.1
    spelled = load_recipe(recipe, ["optimizer.weight_decay={default: 0.1, mlp: null}"])
    assert recipe_fingerprint(spelled) == recipe_fingerprint(recipe)
    assert recipe_fingerprint(load_recipe(recipe, ["optimizer.weight_decay.mlp=0.1"])) != recipe_fingerprint(recipe)


def test_differences_name_the_role(recipe):
    changed = load_recipe(recipe, ["optimizer.weight_decay.attention_qk=0"])
    assert [tuple(change) for change in differences(recipe, changed)] == [
        ("optimizer.weight_decay.attention_qk", None, 0.0)
    ]
    (change,) = differences(recipe, load_recipe(recipe, ["optimizer.weight_decay=0.2"]))
    assert tuple(change) == ("optimizer.weight_decay", 0.1, 0.2)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "optimizer.weight_decay.attention=0",
            "unknown key optimizer.weight_decay.attention; allowed keys.*attention_qk",
        ),
        ("optimizer.weight_decay.mlp=-1", "optimizer.weight_decay.mlp cannot be -1; allowed: number >= 0 or null"),
        ("optimizer.weight_decay=-1", "cannot be -1; allowed: number >= 0"),
        ("optimizer.weight_decay=true", "a number is due"),
        ("optimizer.weight_decay=null", "cannot be null; allowed: number >= 0, or mapping with default, attention_qk"),
        ("optimizer.weight_decay=strong", "cannot be 'strong'; allowed: number >= 0, or mapping"),
    ],
)
def test_what_cannot_be_a_decay_is_refused(recipe, override, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe(recipe, [override])


def test_a_role_cannot_be_mistyped_in_python():
    with pytest.raises(ValidationError, match="attention"):
        WeightDecay(attention=0.0)
