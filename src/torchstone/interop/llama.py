"""The Llama family: decoders of rotary attention, SwiGLU and RMSNorm, on both sides.

    transformers   Llama, Mistral (sliding window), Qwen2 (biases of q, k, v), Qwen3 (norms of q and k)
    torchstone     mixer attention, position rotary, feedforward swiglu, norm rmsnorm, head linear

The two agree tensor by tensor. transformers pairs channel i of a head with channel i + d/2 for rotation; weights of the
interleaved layout (i and i + 1) are put in that order on the way out, which changes no product of queries and keys.

Where several families can hold a model, the first of these is taken:
    norms of q and k          qwen3
    biases of q, k, v alone   qwen2, where its tokenizer class does not change the run's tokenizer, else llama
    other biases              llama (`attention_bias`; missing biases are written as zeros)
    sliding window            mistral
    nothing of these          llama

Pitfalls: transformers gives every checkpoint of type qwen2 Qwen2's own text normalisation (NFC) and pre-tokenizer, whatever
its tokenizer files say. Qwen2 and Qwen3 have one `rms_norm_eps` for all norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
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
from torchstone.nn.attention.multihead import MultiHeadAttention
from torchstone.nn.position.rotary import Rotary
from torchstone.recipe.part import Part

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
FAMILIES |= {"qwen3": "Qwen3ForCausalLM"}
QK_EPS = 1e-6  # of torchstone's norms of q and k
OUTSIDE = {"embed.weight": "model.embed_tokens.weight", "norm.gain": "model.norm.weight"}
OUTSIDE |= {"head.project.weight": "lm_head.weight"}
INSIDE = {
    "mixer_norm.gain": "input_layernorm.weight",
    "feedforward_norm.gain": "post_attention_layernorm.weight",
    "mixer.q_norm.gain": "self_attn.q_norm.weight",
    "mixer.k_norm.gain": "self_attn.k_norm.weight",
    "feedforward.w_gate.weight": "mlp.gate_proj.weight",
    "feedforward.w_up.weight": "mlp.up_proj.weight",
    "feedforward.w_down.weight": "mlp.down_proj.weight",
}
INSIDE |= {
    f"mixer.w_{letter}.{form}": f"self_attn.{letter}_proj.{form}" for letter in "qkvo" for form in ("weight", "bias")
}


def their_name(name: str) -> str:
    """What transformers calls a tensor of a decoder."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, layer, inner = name.split(".", 2)
    return f"model.layers.{layer}.{INSIDE[inner]}"


# Import ------------------------------------------------------------------------------------------------


def model_of(family: str, settings: Settings) -> dict[str, Any]:
    """Plain data of the decoder that a config.json of this family describes; raises ConfigError."""
    width, heads = (
        settings.take_int("hidden_size", 1, MOST_WIDTH),
        settings.take_int("num_attention_heads", 1, MOST_HEADS),
    )
    default = 128 if family == "qwen3" else width // heads
    head_dim = settings.find_int("head_dim", 1, MOST_HEADS) or default
    eps = settings.take_float("rms_norm_eps", 0, 1, 1e-6)
    qk_norm = family == "qwen3"
    if qk_norm and eps != QK_EPS:
        raise ConfigError(f"{settings.where} has rms_norm_eps={eps:g}; torchstone's norms of q and k have {QK_EPS:g}.")
    full_bias = family not in ("mistral", "qwen2") and settings.take_flag("attention_bias", False)
    mixer: dict[str, Any] = {
        "kind": "attention",
        "heads": heads,
        "kv_heads": _kv_heads(family, settings, heads),
        "head_dim": head_dim,
        "qk_norm": qk_norm,
        "dropout": settings.take_float("attention_dropout", 0, 1, 0.0),
        "qkv_bias": full_bias or family == "qwen2",
        "output_bias": full_bias,
        "position": rotary_of(settings),
    }
    settings.only("hidden_act", "silu", "swish")
    settings.only("mlp_bias", False)
    depth = settings.take_int("num_hidden_layers", 1, MOST_DEPTH)
    windows = _windows(family, settings, depth)
    model: dict[str, Any] = {
        "kind": "decoder",
        "width": width,
        "depth": depth,
        "head_dim": head_dim,
        "block": {
            "mixer": {**mixer, "window": windows[0]},
            "feedforward": {"kind": "swiglu", "hidden": settings.take_int("intermediate_size", 1, MOST_HIDDEN)},
            "norm": {"kind": "rmsnorm", "eps": eps},
        },
        "head": {"kind": "linear", "tied": settings.take_flag("tie_word_embeddings", False)},
    }
    if len(set(windows)) > 1:
        model["pattern"] = [{**mixer, "window": window} for window in windows]
    return model


def _kv_heads(family: str, settings: Settings, heads: int) -> int:
    """Key-value heads; only Llama's may be left out, for as many as query heads."""
    if family == "llama":
        return settings.find_int("num_key_value_heads", 1, MOST_HEADS) or heads
    return settings.take_int("num_key_value_heads", 1, MOST_HEADS)


def _windows(family: str, settings: Settings, depth: int) -> list[int | None]:
    """The sliding window of every layer; keys in it, the current one included, as torchstone counts."""
    if family == "llama":
        return [None] * depth
    window = settings.find_int("sliding_window", 1, MOST_TOKENS) if settings.has("sliding_window") else 4096
    kinds = settings.find_names("layer_types")
    if family == "mistral":
        kinds = None
        first = 0
    else:
        first = settings.take_int("max_window_layers", 0, MOST_TOKENS, 28)
        if not settings.take_flag("use_sliding_window", False):
            window = None
    if kinds is None:
        return [window if layer >= first else None for layer in range(depth)]
    known = {"full_attention": None, "sliding_attention": window}
    if len(kinds) != depth or not set(kinds) <= set(known):
        raise ConfigError(
            f"{settings.where} has layer_types that torchstone does not know; it can import "
            f"{' and '.join(known)}, one for each of the {depth} layers."
        )
    return [known[kind] for kind in kinds]


def sources_of(model: Decoder) -> dict[str, Source]:
    """Which tensors of the checkpoint each tensor of the decoder is made of."""
    return {name: Source((their_name(name),)) for name in model.state_dict()}


# Export ------------------------------------------------------------------------------------------------


def family_of(model: Decoder, nfc: bool) -> tuple[str, str]:
    """The family of transformers that holds this decoder, and an empty text; or no family, and why there is none.

    Args:
        model: a decoder.
        nfc: whether Qwen2's tokenizer class leaves the run's tokenizer as it is (it normalises text to NFC).
    """
    config = model.config
    mixers = [block.mixer for block in model._blocks()]
    parts = config.pattern or (config.block.mixer,)
    if reason := _foreign(model, parts):
        return "", reason
    settings: Any = parts[0]
    if len({(part.kind, _shape(part)) for part in parts}) > 1:
        return "", "its layers have different mixers"
    if settings.qk_norm:
        if config.block.norm.eps != QK_EPS:
            return "", f"its norms have another eps than those of queries and keys ({QK_EPS:g})"
        return "qwen3", ""
    windowed = mixers[0].window is not None
    if settings.qkv_bias and not settings.output_bias and nfc:
        return "qwen2", ""
    if settings.qkv_bias or settings.output_bias:
        reason = "it has biases and a sliding window, which no family has together with this tokenizer"
        return ("", reason) if windowed else ("llama", "")
    return ("mistral", "") if windowed or config.width % settings_heads(model) else ("llama", "")


def settings_heads(model: Decoder) -> int:
    """Query heads of the (equal) layers."""
    return int(model._blocks()[0].mixer.heads)


def _shape(part: Part) -> str:
    return part.model_dump_json()


KNOWN = {
    "decoder": "width depth head_dim block pattern head initialisation",
    "attention": "heads kv_heads head_dim window window_convention qk_norm dropout qkv_bias output_bias position",
    "rotary": "variant p layout base scale",
    "swiglu": "hidden multiple_of",
    "rmsnorm": "eps",
    "linear": "tied",
}


def _foreign(model: Decoder, mixers: tuple[Any, ...]) -> str:
    """Why transformers has no such model; empty if it has."""
    config = model.config
    wanted = [("mixer", "attention", part) for part in mixers]
    wanted += [("position", "rotary", part.position) for part in mixers if part.kind == "attention"]
    wanted += [("feedforward", "swiglu", config.block.feedforward), ("norm", "rmsnorm", config.block.norm)]
    wanted += [("projection", "linear", config.block.projection), ("head", "linear", config.head)]
    for family, kind, part in wanted:
        if part.kind != kind:
            return f"its {family} is {part.kind}"
    for _, kind, part in [("model", "decoder", config), *wanted]:
        if changed := _changed(part, KNOWN[kind].split()):
            return f"its {part.kind} has {changed}={getattr(part, changed)!r}"
    position: Any = mixers[0].position
    return "" if position.variant == "full" else f"its rotary position is of variant {position.variant}"


def _changed(part: Part, known: list[str]) -> str:
    """A setting outside `known` that does not have its default; empty if there is none."""
    fields = type(part).model_fields
    odd = [name for name in fields if name not in known and getattr(part, name) != fields[name].get_default()]
    return next((name for name in odd if name != "kind"), "")


def config_of(model: Decoder, family: str) -> dict[str, Any]:
    """What config.json says of the function; token ids and types are added by the exporter."""
    config, mixer = model.config, model._blocks()[0].mixer
    settings: Any = (config.pattern or (config.block.mixer,))[0]
    position: Any = settings.position
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": position.base}
    if position.scale != 1:
        rope = {"rope_type": "linear", "factor": position.scale, "rope_theta": position.base}
    found: dict[str, Any] = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.block.feedforward.width_of(config.width),
        "num_hidden_layers": config.depth,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.key_shape[0],
        "head_dim": mixer.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.length,
        "rms_norm_eps": config.block.norm.eps,
        "rope_theta": position.base,
        "rope_parameters": rope,
        "tie_word_embeddings": bool(model.head.tied),
        "attention_dropout": settings.dropout,
        "use_cache": True,
    }
    if position.scale != 1:
        found["rope_scaling"] = {"rope_type": "linear", "factor": position.scale}
    if family in ("llama", "qwen3"):
        found["attention_bias"] = settings.qkv_bias or settings.output_bias
    if family == "llama":
        found["mlp_bias"] = False
    if family != "llama":
        found["sliding_window"] = mixer.window
    if family in ("qwen2", "qwen3"):
        found |= {"use_sliding_window": mixer.window is not None, "max_window_layers": 0}
    return found


def tensors_of(model: Decoder, family: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the checkpoint."""
    for name, tensor in model.state_dict().items():
        if ".mixer.w_q." in name or ".mixer.w_k." in name or ".q_norm." in name or ".k_norm." in name:
            layer = int(name.split(".")[1])
            position: Rotary = model._blocks()[layer].mixer.position
            tensor = position.arrange(tensor)
        yield their_name(name), tensor
    if not config_of(model, family).get("attention_bias"):
        return
    for layer, block in enumerate(model._blocks()):
        mixer: MultiHeadAttention = block.mixer
        for letter in "qkvo":
            linear = getattr(mixer, f"w_{letter}")
            if linear.bias is None:
                zeros = torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
                yield their_name(f"blocks.{layer}.mixer.w_{letter}.bias"), zeros
