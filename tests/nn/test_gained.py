"""The gained projection: a linear layer at first, gains that count, roles, decay, counts, decoding, and every mixer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torchstone.models.counts import count
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.models.generate import generate
from torchstone.nn.projection.gained import GainedLinear
from torchstone.optim.groups import group_table
from torchstone.optim.lionar import LionARConfig
from torchstone.optim.weight_decay import WeightDecay


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoder(projection: str = "gained", mixer: Any = "attention", feedforward: Any = "swiglu") -> Decoder:
    block = {"mixer": mixer, "feedforward": feedforward, "projection": projection}
    config = {"width": 16, "depth": 2, "head_dim": 8, "block": block}
    return DecoderConfig.model_validate(config).build(vocab_size=11, length=12, seed=0)


def gained(model: nn.Module) -> dict[str, GainedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GainedLinear)}


def test_a_new_layer_is_the_linear_one() -> None:
    layer, x = GainedLinear(5, 7, bias=True), draw(2, 3, 5, seed=0)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_outputs_are_scaled_before_the_bias() -> None:
    layer, x = GainedLinear(5, 7, bias=True).double(), draw(4, 5, seed=0).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(draw(*parameter.shape, seed=seed + 1))
    expected = x @ (layer.gain[:, None] * layer.weight).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_half_precision_stays_half() -> None:
    layer, x = GainedLinear(5, 7, bias=True), draw(4, 5, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_model_starts_with_the_weights_and_outputs_of_the_linear_one() -> None:
    ours, theirs = decoder(), decoder("linear")
    assert len(gained(ours)) == 14
    shared = theirs.state_dict()
    extra = {name for name in ours.state_dict() if name not in shared}
    assert extra == {f"{name}.gain" for name in gained(ours)}
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in shared.items())
    tokens = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(tokens).hidden_btd, theirs(tokens).hidden_btd, atol=1e-5, rtol=1e-5)


def test_gains_are_not_decayed_and_weights_keep_their_roles() -> None:
    table = group_table(decoder(), WeightDecay(default=0.1, attention_qk=0.2, attention_vo=0.3, mlp=0.4))
    where = {name: row["group"] for row in table for name in row["names"]}
    layer = "blocks.0.mixer.w_"
    assert {where[f"{layer}{which}.gain"] for which in "qkvo"} == {"no_decay"}
    assert [where[f"{layer}{which}.weight"] for which in "qkvo"] == ["attention_qk"] * 2 + ["attention_vo"] * 2
    assert where["blocks.1.feedforward.w_down.weight"] == "mlp"


def test_counts_are_the_linear_ones_and_the_gains() -> None:
    ours, theirs = (count(decoder(kind).config, 11, 12) for kind in ("gained", "linear"))
    outputs = sum(layer.out_features for layer in gained(decoder()).values())
    assert ours.parameters - theirs.parameters == outputs
    assert ours.forward_flops_per_token == theirs.forward_flops_per_token
    assert ours.activation_values_per_token - theirs.activation_values_per_token == outputs
    layer = GainedLinear(5, 7)
    with FlopCounterMode(display=False) as counter:
        layer(draw(3, 5, seed=0))
    assert counter.get_total_flops() == 3 * layer.flops()


@pytest.mark.parametrize("mixer", ["attention", "differential", "hgrn2", "rglru", "local-attention", "moa"])
def test_every_mixer_takes_it_and_decodes_as_it_trains(mixer: str) -> None:
    model = decoder(mixer=mixer).eval()
    for layer in gained(model).values():
        layer.gain.data.copy_(1 + 0.1 * draw(*layer.gain.shape, seed=5))
    (completion,) = generate(model, [[1, 2, 3]], max_new=5, greedy=True)
    found = torch.tensor([[1, 2, 3, *completion.tokens]])
    with torch.no_grad():
        chosen = model.logits(model(found).hidden_btd)[0, 2:-1].argmax(-1)
    assert chosen.tolist() == found[0, 3:].tolist()
    model.train()
    output = model(found)
    model.logits(output.hidden_btd).square().sum().backward()
    assert all(layer.gain.grad is not None and bool(layer.gain.grad.any()) for layer in gained(model).values())


def test_under_lionar_weights_keep_their_row_norms_and_gains_move() -> None:
    model = decoder()
    optimizer = LionARConfig(learning_rate=1e-2).build(model)
    norms = {name: layer.weight.detach().norm(dim=1) for name, layer in gained(model).items()}
    tokens = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model.logits(model(tokens).hidden_btd).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        optimizer.step()
    for name, layer in gained(model).items():
        torch.testing.assert_close(layer.weight.detach().norm(dim=1), norms[name], rtol=1e-5, atol=0)
        assert bool((layer.gain != 1).all())
