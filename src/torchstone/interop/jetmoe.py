"""JetMoE (Shen et al., arXiv 2404.07413) as transformers stores it, made into torchstone's parts.

    attention      mixer moa           kv_proj holds keys, then values; experts pair a query and an output projection
    feed-forward   feedforward smoe    [a; c] in one matrix per expert
    outside        norm rmsnorm, tied linear head

Pitfalls: transformers' loss of this model is not its authors': it has no z-loss, normalises the load by tokens instead of
assignments and pools routers. Logits agree; training losses do not. `aux_loss_coef` becomes the coefficient of the authors'
balance loss, and a tenth of it that of the z-loss. The norms of the layers have eps 1e-6 whatever `rms_norm_eps` says.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.interop.settings import (
    MOST_DEPTH,
    MOST_EXPERTS,
    MOST_HEADS,
    MOST_HIDDEN,
    MOST_WIDTH,
    Settings,
    rotary_of,
)
from torchstone.interop.tensors import Source
from torchstone.models.decoder import Decoder

EPS = 1e-6
Z_SHARE = 0.1  # of the balance coefficient
MOST_COEFFICIENT = 1e6
OUTSIDE = {"embed.weight": "model.embed_tokens.weight", "norm.gain": "model.norm.weight"}
OUTSIDE |= {"head.project.weight": "lm_head.weight"}
INSIDE = {
    "mixer_norm.gain": "input_layernorm.weight",
    "feedforward_norm.gain": "post_attention_layernorm.weight",
    "mixer.router.weight": "self_attention.experts.router.layer.weight",
    "mixer.query_experts": "self_attention.experts.input_linear.weight",
    "mixer.output_experts": "self_attention.experts.output_linear.weight",
    "mixer.bias": "self_attention.experts.bias",
    "feedforward.router.weight": "mlp.router.layer.weight",
    "feedforward.w_in": "mlp.input_linear.weight",
    "feedforward.w_out": "mlp.output_linear.weight",
    "feedforward.bias": "mlp.bias",
}
HALVES = {"mixer.w_k.weight": 0, "mixer.w_v.weight": 1}  # of kv_proj


def model_of(settings: Settings) -> dict[str, Any]:
    """Plain data of the decoder; raises ConfigError."""
    eps = settings.take_float("rms_norm_eps", 0, 1, EPS)
    if eps != EPS:
        raise ConfigError(
            f"{settings.where} has rms_norm_eps={eps:g}, which holds for the last norm alone (the others have {EPS:g}); "
            "torchstone has one eps for all."
        )
    settings.only("activation_function", "silu")
    settings.only("attention_dropout", 0.0)
    settings.take("output_router_logits", False)
    of_values, of_heads = (settings.find_int(name, 1, MOST_HEADS) for name in ("kv_channels", "head_dim"))
    head_dim = of_values or of_heads or 128
    balance = settings.take_float("aux_loss_coef", 0, MOST_COEFFICIENT, 0.01)
    top_k = settings.take_int("num_experts_per_tok", 1, MOST_EXPERTS, 2)
    kv_heads = settings.take_int("num_key_value_heads", 1, MOST_HEADS)
    if settings.take("num_attention_heads", kv_heads * top_k) != kv_heads * top_k:
        raise ConfigError(
            f"{settings.where} has num_attention_heads other than num_key_value_heads × num_experts_per_tok."
        )
    routed = {
        "num_experts": settings.take_int("num_local_experts", 1, MOST_EXPERTS, 8),
        "top_k": top_k,
        "balance_coef": balance,
        "z_coef": Z_SHARE * balance,
    }
    return {
        "kind": "decoder",
        "width": settings.take_int("hidden_size", 1, MOST_WIDTH),
        "depth": settings.take_int("num_hidden_layers", 1, MOST_DEPTH),
        "head_dim": head_dim,
        "block": {
            "mixer": {
                "kind": "moa",
                **routed,
                "kv_heads": kv_heads,
                "head_dim": head_dim,
                "position": rotary_of(settings),
            },
            "feedforward": {"kind": "smoe", **routed, "hidden": settings.take_int("intermediate_size", 1, MOST_HIDDEN)},
            "norm": {"kind": "rmsnorm", "eps": EPS},
        },
        "head": {"kind": "linear", "tied": settings.take_flag("tie_word_embeddings", True)},
    }


def sources_of(model: Decoder) -> dict[str, Source]:
    """Which tensors of the checkpoint each tensor of the decoder is made of."""
    return {name: _source(name) for name in model.state_dict()}


def _source(name: str) -> Source:
    if name in OUTSIDE:
        return Source((OUTSIDE[name],))
    _, layer, inner = name.split(".", 2)
    place = f"model.layers.{layer}."
    if inner in HALVES:
        return Source((f"{place}self_attention.kv_proj.weight",), partial(_half, HALVES[inner]))
    return Source((place + INSIDE[inner],))


def _half(number: int, weight: Tensor) -> Tensor:
    """The first or the second half of the rows."""
    return weight.chunk(2)[number]
