"""The router, SMoE, MoA and a whole model equal JetMoE's own code: choices, outputs, losses, gradients.

Sizes are read from the vector file and from the shapes in it; nothing here knows them. Indices agree exactly, everything else
within an absolute 2e-5 plus a relative 1e-4. JetMoE's auxiliary loss of a router is balance + 0.1 · z-loss
(`z_loss_weight_inside_aux`) and enters the loss with a factor of 0.01 (`aux_loss_coef`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.attention.observe import observe
from torchstone.nn.context import BuildContext
from torchstone.nn.experts.balance import balance_loss, load, z_loss
from torchstone.nn.experts.choice import Routing
from torchstone.nn.experts.moa import MixtureOfAttentionHeads, MoAConfig
from torchstone.nn.experts.router import RoutedPart, Router
from torchstone.nn.experts.smoe import SMoE, SMoEConfig
from torchstone.nn.span import Span

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "jetmoe.npz"
ABSOLUTE, RELATIVE = 2e-5, 1e-4

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")

# their name → ours, of the parameters of one layer
FEEDFORWARD = {"bias": "bias", "input_linear.weight": "w_in", "output_linear.weight": "w_out",
               "router.layer.weight": "router.weight"}  # fmt: skip
MIXER = {"experts.bias": "bias", "experts.input_linear.weight": "query_experts",
         "experts.output_linear.weight": "output_experts", "experts.router.layer.weight": "router.weight"}  # fmt: skip
KEYS_VALUES = "kv_proj.weight"

both_dispatches = pytest.mark.parametrize("dispatch", ["grouped", "loop"])


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, Any] = json.loads(str(VECTORS["config"])) if VECTORS else {}


def tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name]))


def close(ours: Tensor, name: str) -> None:
    theirs = tensor(name)
    assert ours.shape == theirs.shape, name
    torch.testing.assert_close(ours.detach(), theirs, atol=ABSOLUTE, rtol=RELATIVE, msg=lambda text: f"{name}: {text}")


def factors() -> dict[str, Any]:
    """Coefficients that make the auxiliary losses of one router JetMoE's `aux_loss`."""
    return {"balance_coef": 1.0, "z_coef": CONFIG["z_loss_weight_inside_aux"]}


def routed(dispatch: str, **coefficients: float) -> dict[str, Any]:
    return {"num_experts": CONFIG["num_experts"], "top_k": CONFIG["top_k"], "dispatch": dispatch, **coefficients}


def mixer(dispatch: str, **coefficients: float) -> MoAConfig:
    position = {"kind": "rotary", "layout": "half", "base": CONFIG["rope_theta"]}
    sizes = {"kv_heads": CONFIG["num_kv_heads"], "head_dim": CONFIG["head_dim"], "position": position}
    return MoAConfig.model_validate({**routed(dispatch, **coefficients), **sizes})


def feedforward(dispatch: str, **coefficients: float) -> SMoEConfig:
    return SMoEConfig.model_validate({**routed(dispatch, **coefficients), "hidden": CONFIG["ffn_hidden_size"]})


def context() -> BuildContext:
    length = VECTORS["moa.x"].shape[1]
    return BuildContext(CONFIG["hidden_size"], CONFIG["head_dim"], 1, 0, CONFIG["vocab_size"], length)


def ours_of(prefix: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Our names → the tensors of the file under a prefix; keys and values, one matrix there, are two here."""
    found = {ours: tensor(f"{prefix}.{theirs}") for theirs, ours in names.items()}
    if names is MIXER:
        found["w_k.weight"], found["w_v.weight"] = tensor(f"{prefix}.{KEYS_VALUES}").chunk(2)
    return found


def load_layer(layer: nn.Module, prefix: str, names: dict[str, str]) -> None:
    given = ours_of(prefix, names)
    assert {name.removeprefix(f"{prefix}.") for name in VECTORS if name.startswith(f"{prefix}.")} == {
        *names, *([KEYS_VALUES] if names is MIXER else [])
    }  # fmt: skip
    layer.load_state_dict(given)


def left_in(span: Span) -> Tensor:
    left = span.left()
    assert left is not None
    return left


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def compare_gradients(layer: nn.Module, prefix: str, names: dict[str, str]) -> None:
    gradients = gradients_of(layer)
    for theirs, ours in names.items():
        close(gradients[ours], f"{prefix}.{theirs}")
    if names is MIXER:
        close(torch.cat([gradients["w_k.weight"], gradients["w_v.weight"]]), f"{prefix}.{KEYS_VALUES}")


# Router -------------------------------------------------------------------------------------------


def router() -> tuple[Router, Tensor]:
    """The router of the file and the routing's input; its size is the file's own."""
    weight = tensor("router.weight")
    size = BuildContext(weight.shape[1], weight.shape[1], 1, 0, CONFIG["vocab_size"], 1)
    part = RoutedPart(
        kind="router", num_experts=weight.shape[0], top_k=VECTORS["router.topk_indices"].shape[1], **factors()
    )
    made = Router(size, part)
    made.load_state_dict({"weight": weight})
    return made, tensor("router.x").unsqueeze(0).requires_grad_()


def test_router_choices_and_losses() -> None:
    made, x_1nd = router()
    span = Span().opened()
    routing: Routing = made(x_1nd, span)
    assert torch.equal(routing.experts_nk, tensor("router.topk_indices"))
    close(routing.gates_nk, "router.topk_gates")
    experts = made.weight.shape[0]
    counts = load(routing, None) * routing.experts_nk.numel() / experts
    assert torch.equal(counts.round().long(), tensor("router.expert_size"))
    close(balance_loss(routing, None), "router.balance")
    close(z_loss(routing, None), "router.z")
    close(left_in(span), "router.aux_loss")


def test_router_gradients() -> None:
    made, x_1nd = router()
    span = Span().opened()
    routing = made(x_1nd, span)
    ((routing.gates_nk * tensor("router.w")).sum() + left_in(span)).backward()
    assert x_1nd.grad is not None and made.weight.grad is not None
    close(x_1nd.grad[0], "router.grad.x")
    close(made.weight.grad, "router.grad.weight")


def test_router_gradient_of_the_auxiliary_loss_alone() -> None:
    made, x_1nd = router()
    span = Span().opened()
    made(x_1nd, span)
    left_in(span).backward()
    assert made.weight.grad is not None
    close(made.weight.grad, "router.aux_grad.weight")


# Layers -------------------------------------------------------------------------------------------


@both_dispatches
def test_feedforward(dispatch: str) -> None:
    layer: SMoE = feedforward(dispatch, **factors()).build(context())
    load_layer(layer, "ffn.param", FEEDFORWARD)
    x_btd, span = tensor("ffn.x").requires_grad_(), Span().opened()
    y_btd = layer(x_btd, span)
    close(y_btd, "ffn.y")
    close(left_in(span), "ffn.aux_loss")
    ((y_btd * tensor("ffn.w")).sum() + left_in(span)).backward()
    assert x_btd.grad is not None
    close(x_btd.grad, "ffn.grad.x")
    compare_gradients(layer, "ffn.grad", FEEDFORWARD)


@both_dispatches
def test_mixture_of_attention_heads(dispatch: str) -> None:
    layer: MixtureOfAttentionHeads = mixer(dispatch, **factors()).build(context())
    load_layer(layer, "moa.param", MIXER)
    x_btd, span = tensor("moa.x").requires_grad_(), Span().opened()
    y_btd, _ = layer(x_btd, span)
    close(y_btd, "moa.y")
    close(left_in(span), "moa.aux_loss")
    ((y_btd * tensor("moa.w")).sum() + left_in(span)).backward()
    assert x_btd.grad is not None
    close(x_btd.grad, "moa.grad.x")
    compare_gradients(layer, "moa.grad", MIXER)


@torch.no_grad()
def test_attention_maps_slot_by_slot() -> None:
    layer: MixtureOfAttentionHeads = mixer("grouped").build(context())
    load_layer(layer, "moa.param", MIXER)
    with observe(layer) as record:
        y_btd, _ = layer(tensor("moa.x"), Span())
    close(y_btd, "moa.y")
    maps_bhts = next(iter(record.values())).maps
    assert maps_bhts is not None
    # ours: the slots of one key head side by side; theirs: slot by slot
    close(maps_bhts.unflatten(1, (-1, CONFIG["top_k"])).transpose(1, 2).flatten(1, 2), "moa.attn_probs")


# Model --------------------------------------------------------------------------------------------


def model(dispatch: str) -> Decoder:
    """A decoder with the weights of the file; coefficients are those of the total loss."""
    total = {
        "balance_coef": CONFIG["aux_loss_coef"],
        "z_coef": CONFIG["aux_loss_coef"] * CONFIG["z_loss_weight_inside_aux"],
    }
    config = DecoderConfig.model_validate(
        {
            "width": CONFIG["hidden_size"],
            "depth": CONFIG["num_layers"],
            "block": {
                "mixer": mixer(dispatch, **total).model_dump(),
                "feedforward": feedforward(dispatch, **total).model_dump(),
                "norm": {"kind": "rmsnorm", "eps": CONFIG["rms_norm_eps"]},
            },
            "head": {"kind": "linear", "tied": True},
        }
    )
    made = config.build(CONFIG["vocab_size"], VECTORS["model.tokens"].shape[1], seed=0)
    weights = {
        "embed.weight": tensor("model.param.embed_tokens.weight"),
        "norm.gain": tensor("model.param.norm.weight"),
    }
    for number in range(CONFIG["num_layers"]):
        theirs, ours = f"model.param.layers.{number}", f"blocks.{number}"
        weights[f"{ours}.mixer_norm.gain"] = tensor(f"{theirs}.input_layernorm.weight")
        weights[f"{ours}.feedforward_norm.gain"] = tensor(f"{theirs}.post_attention_layernorm.weight")
        for part, name, names in (("mixer", "self_attention", MIXER), ("feedforward", "mlp", FEEDFORWARD)):
            weights |= {f"{ours}.{part}.{local}": value for local, value in ours_of(f"{theirs}.{name}", names).items()}
    made.load_state_dict(weights)
    return made


@both_dispatches
def test_model(dispatch: str) -> None:
    made, tokens_bt = model(dispatch), tensor("model.tokens")
    output = made(tokens_bt)
    logits_btv = made.logits(output.hidden_btd)
    close(logits_btv, "model.logits")
    loss = nn.functional.cross_entropy(logits_btv[:, :-1].flatten(0, 1), tokens_bt[:, 1:].flatten())
    close(loss, "model.ce")
    assert output.auxiliary is not None
    close(output.auxiliary / CONFIG["aux_loss_coef"], "model.aux_loss_sum")
    close(loss + output.auxiliary, "model.loss")
    (loss + output.auxiliary).backward()
    gradients = gradients_of(made)
    close(gradients["embed.weight"].norm(), "model.gradnorm.embed_tokens.weight")
    close(gradients["norm.gain"].norm(), "model.gradnorm.norm.weight")
    compared = 2
    for number in range(CONFIG["num_layers"]):
        theirs, ours = f"model.gradnorm.layers.{number}", f"blocks.{number}"
        close(gradients[f"{ours}.mixer_norm.gain"].norm(), f"{theirs}.input_layernorm.weight")
        close(gradients[f"{ours}.feedforward_norm.gain"].norm(), f"{theirs}.post_attention_layernorm.weight")
        for part, name, names in (("mixer", "self_attention", MIXER), ("feedforward", "mlp", FEEDFORWARD)):
            for their_name, our_name in names.items():
                close(gradients[f"{ours}.{part}.{our_name}"].norm(), f"{theirs}.{name}.{their_name}")
        keys_values = [gradients[f"{ours}.mixer.{name}.weight"] for name in ("w_k", "w_v")]
        close(torch.cat(keys_values).norm(), f"{theirs}.self_attention.{KEYS_VALUES}")
        compared += 2 + len(MIXER) + len(FEEDFORWARD) + 1
    assert compared == sum(name.startswith("model.gradnorm.") for name in VECTORS)
