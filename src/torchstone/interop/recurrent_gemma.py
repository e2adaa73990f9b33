"""RecurrentGemma (Botev et al., arXiv 2404.07839) as transformers stores it, made into torchstone's parts.

    recurrent layer   mixer rglru            conv [r, 1, w] → [w, r]; the last tap is the current token on both sides
    attention layer   mixer local-attention  rotary on the first half of each head
    every layer       feedforward geglu with biases, norm rmsnorm: gain = 1 + weight
    outside           embedding × √d rounded to bf16, tied head with a soft cap

Pitfalls: `intermediate_size` counts both branches of the feed-forward layer. A window of W means W keys in transformers and
W + 1 in the authors' code; the two differ for texts longer than W, and a checkpoint's weights were trained with the
authors' (`OFFICIAL`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.interop.settings import (
    MOST_DEPTH,
    MOST_HEADS,
    MOST_HIDDEN,
    MOST_TOKENS,
    MOST_WIDTH,
    Settings,
    rotary_of,
)
from torchstone.interop.tensors import Source
from torchstone.models.decoder import Decoder
from torchstone.nn.attention.multihead import WindowConvention

OFFICIAL: WindowConvention = "plus-one"
BLOCKS = ("recurrent", "recurrent", "attention")
MOST_TAPS, MOST_CAP = 1024, 1e6  # of the convolution; of logits
OUTSIDE = {"embed.weight": "model.embed_tokens.weight", "norm.gain": "model.final_norm.weight"}
INSIDE = {
    "mixer_norm.gain": "temporal_pre_norm.weight",
    "feedforward_norm.gain": "channel_pre_norm.weight",
    "mixer.conv.weight": "temporal_block.conv_1d.weight",
    "mixer.conv.bias": "temporal_block.conv_1d.bias",
    "mixer.rg_lru.alpha": "temporal_block.rg_lru.recurrent_param",
    "mixer.rg_lru.input_gate.weight": "temporal_block.rg_lru.input_gate_weight",
    "mixer.rg_lru.input_gate.bias": "temporal_block.rg_lru.input_gate_bias",
    "mixer.rg_lru.recurrence_gate.weight": "temporal_block.rg_lru.recurrent_gate_weight",
    "mixer.rg_lru.recurrence_gate.bias": "temporal_block.rg_lru.recurrent_gate_bias",
}
LAYERS = {"mixer.w_y": "temporal_block.linear_y", "mixer.w_x": "temporal_block.linear_x"}
LAYERS |= {f"mixer.w_{letter}": f"temporal_block.{letter}_proj" for letter in "qkv"}
LAYERS |= {f"feedforward.w_{name}": f"mlp_block.{name}_proj" for name in ("gate", "up", "down")}
OUTPUTS = {"rglru": "linear_out", "local-attention": "o_proj"}


def model_of(settings: Settings, convention: WindowConvention) -> dict[str, Any]:
    """Plain data of the decoder; raises ConfigError.

    Args:
        settings: config.json.
        convention: what a window of W means.
    """
    width, heads = (
        settings.take_int("hidden_size", 1, MOST_WIDTH),
        settings.take_int("num_attention_heads", 1, MOST_HEADS),
    )
    both = settings.take_int("intermediate_size", 2, MOST_HIDDEN)
    head_dim = width // heads
    if settings.take("head_dim", head_dim) != head_dim or both % 2:
        raise ConfigError(
            f"{settings.where} has head_dim other than hidden_size / num_attention_heads, or an odd intermediate_size; that "
            "is no RecurrentGemma."
        )
    settings.only("hidden_activation", "gelu_pytorch_tanh")
    settings.only("attention_bias", False)
    settings.only("attention_dropout", 0.0)
    settings.only("embeddings_scale_by_sqrt_dim", True)
    for name in ("w_init_variance_scale", "final_w_init_variance_scale"):  # of the initial weights
        settings.take(name, None)
    mixers = _mixers(settings, width, heads, convention)
    blocks = settings.find_names("block_types") or BLOCKS
    depth = settings.take_int("num_hidden_layers", 1, MOST_DEPTH)
    if unknown := sorted(set(blocks) - set(mixers)):
        raise ConfigError(f"{settings.where} has block_types with {unknown[0]!r}; known are {' and '.join(mixers)}.")
    return {
        "kind": "decoder",
        "width": width,
        "depth": depth,
        "head_dim": head_dim,
        "block": {
            "feedforward": {"kind": "geglu", "hidden": both // 2, "approximate": "tanh", "bias": True},
            "norm": {"kind": "rmsnorm", "eps": settings.take_float("rms_norm_eps", 0, 1, 1e-6)},
        },
        "pattern": [mixers[block] for block in list(blocks)[:depth]],
        "embedding_scale": "sqrt-width-bf16",
        "head": {
            "kind": "linear",
            "tied": settings.take_flag("tie_word_embeddings", True),
            "soft_cap": settings.take_float("logits_soft_cap", 0, MOST_CAP, 30.0),
        },
    }


def _mixers(settings: Settings, width: int, heads: int, convention: WindowConvention) -> dict[str, dict[str, Any]]:
    """Plain data of the mixer of each type of block."""
    return {
        "recurrent": {
            "kind": "rglru",
            "lru_width": settings.find_int("lru_width", 1, MOST_WIDTH) or width,
            "num_blocks": heads,
            "conv_width": settings.take_int("conv1d_width", 1, MOST_TAPS, 4),
        },
        "attention": {
            "kind": "local-attention",
            "heads": heads,
            "kv_heads": settings.find_int("num_key_value_heads", 1, MOST_HEADS) or heads,
            "head_dim": width // heads,
            "window": settings.take_int("attention_window_size", 1, MOST_TOKENS, 2048),
            "window_convention": convention,
            "position": rotary_of(settings, share=0.5),
        },
    }


def sources_of(model: Decoder) -> dict[str, Source]:
    """Which tensors of the checkpoint each tensor of the decoder is made of."""
    return {name: _source(model, name) for name in model.state_dict()}


def _source(model: Decoder, name: str) -> Source:
    if name == "head.project.weight":
        return Source(("lm_head.weight",))
    if name in OUTSIDE:
        return Source((OUTSIDE[name],), _gain if name.endswith("gain") else _as_is)
    _, layer, inner = name.split(".", 2)
    place = f"model.layers.{layer}."
    if inner in INSIDE:
        made = {"gain": _gain, "mixer.conv.weight": _taps}
        return Source((place + INSIDE[inner],), made.get(inner) or made.get(inner.rsplit(".")[-1], _as_is))
    owner, _, form = inner.rpartition(".")
    kind = model.config.pattern[int(layer) % len(model.config.pattern)].kind
    theirs = f"temporal_block.{OUTPUTS[kind]}" if owner == "mixer.w_o" else LAYERS[owner]
    return Source((f"{place}{theirs}.{form}",))


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _gain(weight: Tensor) -> Tensor:
    """The gain 1 + weight, added in fp32: near 1 half types keep few digits."""
    return 1.0 + weight.float()


def _taps(weight_r1w: Tensor) -> Tensor:
    """[w, r] of [r, 1, w]."""
    return weight_r1w.squeeze(1).t()
