"""The recurrent unit, the convolution, local attention and a whole RecurrentGemma equal their authors' code.

Sizes, windows, block patterns and weights are read from the vector file; nothing here knows them. Outputs agree within 2e-5 plus
1e-4 of the value, gradients within 1e-3 of the largest entry of their tensor.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.attention.local import LocalAttentionConfig
from torchstone.nn.context import BuildContext
from torchstone.nn.recurrence.boundaries import Boundaries
from torchstone.nn.recurrence.convolution import TemporalConvolution
from torchstone.nn.recurrence.rglru import RGLRU
from torchstone.nn.span import Span

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "recurrentgemma.npz"
ABSOLUTE, RELATIVE, GRADIENT = 2e-5, 1e-4, 1e-3

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, Any] = json.loads(str(VECTORS["config"])) if VECTORS else {}


def _tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name]))


def _under(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): _tensor(name) for name in VECTORS if name.startswith(prefix)}


def _close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=ABSOLUTE, rtol=RELATIVE)


def _close_gradient(ours: Tensor | None, theirs: Tensor, what: str) -> None:
    assert ours is not None and ours.shape == theirs.shape, what
    worst, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert worst <= GRADIENT * largest, f"{what}: {worst:.3g} of {largest:.3g}"


def _documents(positions_bt: Tensor) -> Tensor:
    return (positions_bt == 0).cumsum(dim=1)


def _limits(positions_bt: Tensor) -> Boundaries:
    everywhere = torch.ones_like(positions_bt, dtype=torch.bool)
    return Boundaries(positions_bt == 0, everywhere, False, _documents(positions_bt)[:, -1])


# The recurrent unit -------------------------------------------------------------------------------

UNIT_NAMES = {
    "a_param": "alpha",
    "input_gate.w": "input_gate.weight",
    "input_gate.b": "input_gate.bias",
    "a_gate.w": "recurrence_gate.weight",
    "a_gate.b": "recurrence_gate.bias",
}


def _load(module: nn.Module, named: dict[str, Tensor], names: dict[str, str]) -> None:
    """Put tensors of the file into the module; every parameter must be given."""
    module.load_state_dict({names[theirs]: value for theirs, value in named.items()})


def _unit() -> RGLRU:
    weights = _under("lru.param.")
    unit = RGLRU(weights["a_param"].numel(), weights["a_gate.w"].shape[0])
    _load(unit, weights, UNIT_NAMES)
    return unit


def test_recurrent_unit_and_its_gradients() -> None:
    unit, x_btr = _unit(), _tensor("lru.x").requires_grad_()
    h_btr, last_br = unit(x_btr, _limits(_tensor("lru.segment_pos")))
    _close(h_btr, _tensor("lru.y"))
    _close(last_br, _tensor("lru.h_last"))
    (h_btr * _tensor("lru.loss_weight")).sum().backward()
    ours = dict(unit.named_parameters())
    gradients = _under("lru.grad.")
    _close_gradient(x_btr.grad, gradients.pop("x"), "x")
    assert {UNIT_NAMES[name] for name in gradients} == set(ours)
    for name, theirs in gradients.items():
        _close_gradient(ours[UNIT_NAMES[name]].grad, theirs, name)


@torch.no_grad()
def test_recurrent_unit_continues() -> None:
    h_btr, last_br = _unit()(_tensor("lru.x"), _limits(_tensor("lru.segment_pos_cont")), _tensor("lru.h0"))
    _close(h_btr, _tensor("lru.y_cont"))
    _close(last_br, _tensor("lru.h_last_cont"))


# The convolution ----------------------------------------------------------------------------------


@torch.no_grad()
def test_convolution_and_what_it_keeps() -> None:
    positions_bt, x_btd, weight_wd = _tensor("conv.segment_pos"), _tensor("conv.x"), _tensor("conv.w")
    taps, width = weight_wd.shape
    conv = TemporalConvolution(width, taps)
    conv.load_state_dict({"weight": weight_wd, "bias": _tensor("conv.b")})
    span = Span(documents_bt=_documents(positions_bt))
    out_btd, tail_bwd = conv(x_btd, span, _limits(positions_bt), x_btd.new_zeros(len(x_btd), taps - 1, width))
    _close(out_btd, _tensor("conv.y"))
    # inputs of an earlier document are kept there and zero here, where no tap may read them
    back_w = torch.arange(taps - 2, -1, -1)
    readable_bw1 = (back_w <= positions_bt[:, -1:])[:, :, None]
    _close(tail_bwd, _tensor("conv.cache") * readable_bw1)


# Local attention ----------------------------------------------------------------------------------


def _local() -> dict[str, Any]:
    window = CONFIG["attention_window_size"]
    return {
        "kind": "local-attention",
        "heads": CONFIG["num_heads"],
        "window": window,
        "window_convention": "plus-one",
    }


def test_local_attention_and_its_gradient() -> None:
    x_btd, positions_bt = _tensor("attn.x").requires_grad_(), _tensor("attn.segment_pos")
    width = x_btd.shape[-1]
    context = BuildContext(width, width // CONFIG["num_heads"], 1, 0, 1, x_btd.shape[1])
    mixer = LocalAttentionConfig.model_validate(_local()).build(context)
    names = {"w_q.weight": "proj_q", "w_k.weight": "proj_k", "w_v.weight": "proj_v", "w_o.weight": "proj_final"}
    weights = {ours: _tensor(f"attn.param.{theirs}.weight") for ours, theirs in names.items()}
    mixer.load_state_dict({**weights, "w_o.bias": _tensor("attn.param.proj_final.bias")})
    y_btd, _ = mixer(x_btd, Span(positions_bt, _documents(positions_bt)))
    _close(y_btd, _tensor("attn.y"))
    (y_btd * _tensor("attn.loss_weight")).sum().backward()
    _close_gradient(x_btd.grad, _tensor("attn.grad.x"), "x")


# The whole model ----------------------------------------------------------------------------------

WIDE_NAMES = {
    "temporal_pre_norm.scale": "mixer_norm.gain",
    "channel_pre_norm.scale": "feedforward_norm.gain",
    "recurrent_block.linear_y": "mixer.w_y",
    "recurrent_block.linear_x": "mixer.w_x",
    "recurrent_block.linear_out": "mixer.w_o",
    "recurrent_block.conv_1d.w": "mixer.conv.weight",
    "recurrent_block.conv_1d.b": "mixer.conv.bias",
    **{f"recurrent_block.rg_lru.{theirs}": f"mixer.rg_lru.{ours}" for theirs, ours in UNIT_NAMES.items()},
    "attention_block.proj_q": "mixer.w_q",
    "attention_block.proj_k": "mixer.w_k",
    "attention_block.proj_v": "mixer.w_v",
    "attention_block.proj_final": "mixer.w_o",
    "mlp_block.ffw_down": "feedforward.w_down",
}


def _ours(theirs: str) -> tuple[str, ...]:
    """Our parameters that one of theirs is; the two branches of the feed-forward are one tensor there."""
    if theirs == "embedder.input_embedding":
        return ("embed.weight",)
    if theirs == "final_norm.scale":
        return ("norm.gain",)
    _, layer, local = theirs.split(".", 2)
    if local.startswith("mlp_block.ffw_up."):
        kind = "weight" if local.endswith("w") else "bias"
        return tuple(f"blocks.{layer}.feedforward.{name}.{kind}" for name in ("w_gate", "w_up"))
    whole, _, kind = local.rpartition(".")
    name = WIDE_NAMES.get(local) or f"{WIDE_NAMES[whole]}.{kind}"
    return (f"blocks.{layer}.{name}",)


def _values(theirs: str, value: Tensor) -> list[Tensor]:
    """Their tensor as ours: gains are one plus their scale, branches of the feed-forward apart and transposed."""
    if theirs.endswith(".scale"):
        return [1 + value]
    if ".ffw_up." in theirs:
        return [branch.T if theirs.endswith("w") else branch.flatten() for branch in value]
    return [value]


def _model() -> Decoder:
    recurrent = {"kind": "rglru", "lru_width": CONFIG["lru_width"], "num_blocks": CONFIG["num_heads"]}
    mixers = {"R": {**recurrent, "conv_width": CONFIG["conv1d_temporal_width"]}, "A": _local()}
    cap = CONFIG["logits_soft_cap"]
    config = DecoderConfig.model_validate(
        {
            "width": CONFIG["width"],
            "depth": len(CONFIG["block_types"]),
            "pattern": [mixers[letter] for letter in CONFIG["block_types"]],
            "block": {"feedforward": {"kind": "geglu", "hidden": CONFIG["mlp_expanded_width"], "bias": True}},
            "embedding_scale": "sqrt-width-bf16" if CONFIG["embeddings_scale_by_sqrt_dim"] else None,
            "head": {"kind": "linear", "soft_cap": cap or None},
        }
    )
    model = config.build(CONFIG["vocab_size"], _tensor("model.tokens").shape[1], 0)
    weights = {
        name: value
        for theirs, tensor in _under("model.param.").items()
        for name, value in zip(_ours(theirs), _values(theirs, tensor), strict=True)
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and {name for name, _ in model.named_parameters()} == set(weights)
    assert all(name.startswith("head.") for name in missing)
    return model


def test_model_logits_loss_and_gradient_norms() -> None:
    model, tokens_bt = _model(), _tensor("model.tokens")
    logits_btv = model.logits(model(tokens_bt).hidden_btd)
    _close(logits_btv, _tensor("model.logits"))
    loss = F.cross_entropy(logits_btv[:, :-1].flatten(0, 1), tokens_bt[:, 1:].flatten())
    _close(loss, _tensor("model.loss"))
    loss.backward()
    ours = dict(model.named_parameters())
    norms = _under("model.gradnorm.")
    assert {name for theirs in norms for name in _ours(theirs)} == set(ours)
    for theirs, norm in norms.items():
        gradients = [ours[name].grad for name in _ours(theirs)]
        assert all(gradient is not None for gradient in gradients), theirs
        found = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm()
        torch.testing.assert_close(
            found, norm, atol=1e-7, rtol=GRADIENT, msg=lambda text, name=theirs: f"{name}: {text}"
        )


@torch.no_grad()
def test_model_decodes_step_by_step() -> None:
    model, tokens_bt, theirs_bnv = _model(), _tensor("model.tokens"), _tensor("model.decode_logits")
    prompt = CONFIG["prompt_len"]
    pieces = [tokens_bt[:, :prompt], *tokens_bt[:, prompt:].split(1, dim=1)]
    state = model.new_state(*tokens_bt.shape)
    last = [model(piece_bt, state=state).hidden_btd[:, -1] for piece_bt in pieces]
    ours_bnv = model.logits(torch.stack(last, dim=1))
    _close(ours_bnv[:, : theirs_bnv.shape[1]], theirs_bnv)
