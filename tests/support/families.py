"""Tiny models of Hugging Face families, randomly initialised, with gains and biases that are not 1 and 0."""

from __future__ import annotations

from typing import Any

import torch

COMMON: dict[str, Any] = dict(
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SLIDING = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])


def rope(**settings: Any) -> dict[str, Any]:
    """Rotary settings as the installed transformers calls them."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) >= 5:
        return {"rope_parameters": settings}
    return {"rope_theta": settings.pop("rope_theta"), "rope_scaling": settings}


LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
SETTINGS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama-3": dict(_family="Llama", head_dim=16, _rope=LLAMA3),
    "Mistral": dict(sliding_window=6),
    "Qwen2": {},
    "Qwen3": dict(head_dim=8),
    "Gemma2": dict(head_dim=16, query_pre_attn_scalar=8, **SLIDING),
    "Gemma3": dict(_config="Gemma3TextConfig", head_dim=16, **SLIDING),
    "Olmo2": {},
    "Phi": {},
    "Phi3": {},
    "GPTNeoX": dict(rotary_pct=0.5),
    "GPT2": dict(_model="GPT2LMHeadModel", n_embd=32, n_head=4, n_layer=2),
    "Cohere": dict(use_qk_norm=True),
    "Glm": dict(head_dim=8),
    "GptOss": dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1, **SLIDING),
    "SmolLM3": dict(no_rope_layers=[1, 0]),
    "OPT": dict(ffn_dim=40, word_embed_proj_dim=32),
    "Granite": dict(logits_scaling=2.0, attention_multiplier=0.5),
}
FAMILIES = tuple(SETTINGS)
TURNING = {"Phi": 2, "GPTNeoX": 2, "Glm": 2}  # pairs of 4 that turn; elsewhere all do
INTERLEAVED = ("Cohere", "Glm")


def half_order_of(family: str, dim: int) -> list[int]:
    """Channels of a family's queries and keys in half order."""
    turning = 2 * TURNING.get(family, dim // 2)
    if family in INTERLEAVED:
        first, second = range(0, dim, 2), range(1, dim, 2)
        return [*first, *second]
    rest = (dim - turning) // 2
    first = [*range(turning // 2), *range(turning, turning + rest)]
    return [*first, *range(turning // 2, turning), *range(turning + rest, dim)]


def tiny_model(family: str, **changes: Any) -> Any:
    """A model of a family; raises AttributeError for one that transformers lacks."""
    import transformers

    settings = {**COMMON, **SETTINGS[family], **changes}
    if "_rope" in settings:
        settings |= rope(**settings.pop("_rope"))
    family = settings.pop("_family", family)
    config = getattr(transformers, settings.pop("_config", f"{family}Config"))
    model_class = getattr(transformers, settings.pop("_model", f"{family}ForCausalLM"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config(**settings))
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = parameter.data + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise
        model.tie_weights()
    return model.eval()
