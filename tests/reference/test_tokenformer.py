"""Pattention and TokenFormer equal the authors' code: outputs, gradients, growth, a whole small model.

Cases, modes and sizes are read from the vector file; nothing here knows how many there are. Tolerance: 2e-5 absolute and 1e-4
relative.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.projection.pattention import Pattention, PattentionConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "tokenformer.npz"
ATOL, RTOL = 2e-5, 1e-4

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")

ATTENTION = {"query": "w_q", "key": "w_k", "value": "w_v", "proj": "w_o"}
ROWS = {"key_param_tokens": "keys_nd", "value_param_tokens": "values_ne"}


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, Any] = json.loads(str(VECTORS["config"])) if VECTORS else {}
MODES = sorted(name.split(".")[1] for name in VECTORS if name.startswith("pat.") and name.endswith(".y"))
GROWN = sorted(name for name in VECTORS if name.startswith("grow.") and ".y_" in name)
WEIGHTS = sorted(name.removeprefix("model.param.") for name in VECTORS if name.startswith("model.param."))

every_mode = pytest.mark.parametrize("mode", MODES)


def _tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name]))


def _close(ours: Tensor, name: str) -> None:
    torch.testing.assert_close(ours.detach(), _tensor(name), atol=ATOL, rtol=RTOL, msg=lambda text: f"{name}: {text}")


def _layer(mode: str, keys: Tensor, values: Tensor) -> Pattention:
    """A new layer of these parameter tokens, τ of their number."""
    settings = PattentionConfig.model_validate({"norm_mode": mode.replace("_", "-")})
    layer = Pattention(settings, keys.shape[1], values.shape[1], keys.shape[0], 0, 1.0, "input")
    layer.fill_buffers()
    layer.load_state_dict({"keys_nd": keys, "values_ne": values, "tau": layer.tau})
    return layer


def test_everything_is_compared() -> None:
    known = {"pat.x", "pat.key", "pat.value", "pat.w", "config"}
    known |= {f"pat.{mode}.{what}" for mode in MODES for what in ("y", "grad.x", "grad.key", "grad.value")}
    known |= {"grow.key_new_zero", "grow.key_new_random", "grow.value_new", *GROWN}
    known |= {f"model.{what}" for what in ("hidden", "tokens", "logits", "loss")}
    known |= {f"model.{kind}.{name}" for name in WEIGHTS for kind in ("param", "gradnorm")}
    assert MODES and GROWN and WEIGHTS and set(VECTORS) == known
    assert CONFIG["norm_activation_type"] in MODES


@every_mode
def test_pattention(mode: str) -> None:
    layer, x = _layer(mode, _tensor("pat.key"), _tensor("pat.value")), _tensor("pat.x").requires_grad_()
    y = layer(x)
    _close(y, f"pat.{mode}.y")
    (y * _tensor("pat.w")).sum().backward()
    for ours, theirs in ((x, "x"), (layer.keys_nd, "key"), (layer.values_ne, "value")):
        assert ours.grad is not None
        _close(ours.grad, f"pat.{mode}.grad.{theirs}")


@pytest.mark.parametrize("name", GROWN)
def test_growth_with_following_scale(name: str) -> None:
    """The released behaviour: τ is the root of the current number of tokens."""
    _, mode, what = name.split(".")
    keys = what.removeprefix("y_").removesuffix("_keys_scale_follows_count")
    assert what == f"y_{keys}_keys_scale_follows_count"
    old, new = _tensor("pat.key"), _tensor(f"grow.key_new_{keys}")
    layer = _layer(mode, torch.cat([old, new]), torch.cat([_tensor("pat.value"), _tensor("grow.value_new")]))
    _close(layer(_tensor("pat.x")), name)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "softmax"])
def test_growth_with_zero_keys_and_the_scale_kept_changes_nothing(mode: str) -> None:
    keys = torch.cat([_tensor("pat.key"), _tensor("grow.key_new_zero")])
    layer = _layer(mode, keys, torch.cat([_tensor("pat.value"), _tensor("grow.value_new")]))
    layer.tau.fill_(math.sqrt(len(_tensor("pat.key"))))
    _close(layer(_tensor("pat.x")), f"pat.{mode}.y")


def _our_name(theirs: str) -> str:
    if theirs == "embed":
        return "embed.weight"
    _, layer, part, *rest = theirs.split(".")
    where = "feedforward.memory" if part == "mlp" else f"mixer.{ATTENTION[rest[0]]}"
    return f"blocks.{layer}.{where}.{ROWS[rest[-1]]}"


def _model() -> Decoder:
    """Our decoder with the weights of the file."""
    share, mode = CONFIG["rotary_pct"], {"norm_mode": CONFIG["norm_activation_type"].replace("_", "-")}
    position = {"kind": "rotary", "layout": "half", "base": CONFIG["rotary_base"]}
    position |= {} if share == 1 else {"variant": "partial", "p": share}
    tokens = {"input_tokens": CONFIG["qkv_slot_num"], "output_tokens": CONFIG["proj_slot_num"]}
    config = DecoderConfig.model_validate({
        "width": CONFIG["hidden_size"],
        "depth": CONFIG["num_layers"],
        "head_dim": CONFIG["hidden_size"] // CONFIG["num_attention_heads"],
        "block": {
            "mixer": {"kind": "attention", "position": position},
            "feedforward": {"kind": "pattention", "tokens": CONFIG["ffn_slot_num"], **mode},
            "norm": {"kind": "layernorm", "eps": CONFIG["layernorm_eps"], "scale": False, "bias": False},
            "projection": {"kind": "pattention", **tokens, **mode},
        },
    })  # fmt: skip
    model = config.build(CONFIG["vocab_size"], VECTORS["model.tokens"].shape[1], seed=0)
    assert {_our_name(name) for name in WEIGHTS} == {name for name, _ in model.named_parameters()}
    model.load_state_dict({_our_name(name): _tensor(f"model.param.{name}") for name in WEIGHTS}, strict=False)
    return model


def test_model() -> None:
    assert CONFIG["final_norm"] == "non-parametric layer norm"
    model, tokens_bt = _model(), _tensor("model.tokens")
    hidden: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda module, given: hidden.append(given[0]))
    logits_btv = model.logits(model(tokens_bt).hidden_btd)
    _close(hidden[0], "model.hidden")
    _close(logits_btv, "model.logits")
    loss = F.cross_entropy(logits_btv[:, :-1].flatten(0, 1), tokens_bt[:, 1:].flatten())
    _close(loss, "model.loss")
    loss.backward()
    for name in WEIGHTS:
        gradient = model.get_parameter(_our_name(name)).grad
        assert gradient is not None
        _close(gradient.norm(), f"model.gradnorm.{name}")
