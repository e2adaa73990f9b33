"""The one place where a Hugging Face model is looked into: transformers' attention interface.

Models of transformers call their attention through a table of functions. Here a function of our own is entered into that
table once, together with a mask function; while a seam is open, the model's configuration names it, and every attention
layer hands over its queries, keys and values, after normalisation and rotation, and takes back the outputs of its heads.

    seam = Seam(model)
    with seam.open(receive):            # receive(call) -> heads_bthe
        model(tokens_bt)

Shapes: b batch · h query heads · g key-value heads · t queries · s keys · d head channels · e value channels.

Pitfalls
- `_attn_implementation` of a configuration is read by the models themselves on every call. Its setter also writes to the
  configurations inside, so all of them are remembered and put back, outer ones first.
- A layer that computes attention by itself never calls; `probe` finds such layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "torchstone"


@dataclass(frozen=True, eq=False)
class Call:
    """What an attention layer hands over.

    Attributes:
        module: the attention module.
        q_bhtd, k_bgsd, v_bgse: in the model's type and channel order.
        mask_bhts: bool or additive, broadcastable; None for `causal` alone.
        scale: factor of the scores.
        causal: used where there is no mask.
        softcap: scores become softcap · tanh(scores / softcap).
        sinks_h: a score per head that takes part in the softmax and has no value.
        window: sliding window in tokens that the layer names; the mask already holds it.
        others: names of further settings that are not None, which the function does not know.
    """

    module: nn.Module
    q_bhtd: Tensor
    k_bgsd: Tensor
    v_bgse: Tensor
    mask_bhts: Tensor | None
    scale: float
    causal: bool
    softcap: float | None
    sinks_h: Tensor | None
    window: int | None
    others: tuple[str, ...]


Receive = Callable[[Call], Tensor]

_owners: WeakKeyDictionary[nn.Module, Seam] = WeakKeyDictionary()


class Seam:
    """Switches one model between its own attention and ours."""

    def __init__(self, model: nn.Module) -> None:
        _register()
        self._model = model
        self._receivers: list[Receive] = []

    @contextmanager
    def open(self, receive: Receive) -> Iterator[None]:
        """Give every attention call inside the block to `receive`; blocks may nest, the innermost receives."""
        before = [(config, config._attn_implementation) for config in self._configs()]
        modules = list(self._model.modules())
        owned = {module: _owners.get(module) for module in modules}
        self._receivers.append(receive)
        try:
            for module in modules:
                _owners[module] = self
            for config, _ in before:
                config._attn_implementation = NAME
            yield
        finally:
            self._receivers.pop()
            for config, implementation in before:
                config._attn_implementation = implementation
            for module, owner in owned.items():
                if owner is None:
                    _owners.pop(module, None)
                else:
                    _owners[module] = owner

    def receive(self, call: Call) -> Tensor:
        """Hand a call to the innermost receiver."""
        return self._receivers[-1](call)

    def _configs(self) -> list[Any]:
        """All configurations of the model and its parts, outer ones first, each once."""
        found: dict[int, Any] = {}
        for module in self._model.modules():
            config = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation"):
                found.setdefault(id(config), config)
        for config in list(found.values()):
            for name in getattr(config, "sub_configs", {}):
                inner = getattr(config, name, None)
                if inner is not None:
                    found.setdefault(id(inner), inner)
        return list(found.values())


def _register() -> None:
    """Enter our functions into the tables of transformers; again does nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


_KNOWN = frozenset({"dropout", "scaling", "softcap", "s_aux", "sliding_window", "is_causal"})
_CARRIED = frozenset(  # what models pass along for other purposes
    {
        "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "past_key_values",
        "position_embeddings", "logits_to_keep", "return_dict", "output_router_logits", "layer_idx", "input_ids",
    }
)  # fmt: skip


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """The function that transformers calls."""
    scale, causal = settings.get("scaling"), settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    others = {name for name, setting in settings.items() if isinstance(setting, Tensor)} - _KNOWN - _CARRIED
    call = Call(
        module,
        query,
        key,
        value,
        None if attention_mask is None else attention_mask[..., : key.shape[-2]],
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        bool(causal) and query.shape[2] > 1,
        settings.get("softcap"),
        settings.get("s_aux"),
        settings.get("sliding_window"),
        tuple(sorted(others)),
    )
    return _owners[module].receive(call), None


def attend(call: Call) -> Tensor:
    """Outputs of all heads [b, t, h, e], by a fused kernel where the family allows it."""
    if call.softcap is not None or call.sinks_h is not None:
        return combine(call, attention_weights(call))
    out_bhte = F.scaled_dot_product_attention(
        call.q_bhtd,
        call.k_bgsd,
        call.v_bgse,
        attn_mask=call.mask_bhts,
        is_causal=call.causal and call.mask_bhts is None,
        scale=call.scale,
        enable_gqa=call.q_bhtd.shape[1] != call.k_bgsd.shape[1],
    )
    return out_bhte.transpose(1, 2)


def attention_weights(call: Call, heads: tuple[int, ...] | None = None, window: int | None = None) -> Tensor:
    """What multiplies the values, fp32 or finer [b, n, t, s], of all heads or of those named.

    Args:
        call: queries, keys and the family's settings.
        heads: which; None for all.
        window: tokens that a query sees at most, besides the layer's own mask.
    """
    count = call.q_bhtd.shape[1]
    chosen = (
        torch.arange(count, device=call.q_bhtd.device)
        if heads is None
        else torch.tensor(heads, device=call.q_bhtd.device)
    )
    groups = chosen // (count // call.k_bgsd.shape[1])
    q_bntd, k_bnsd = call.q_bhtd[:, chosen], call.k_bgsd[:, groups]
    fine = torch.promote_types(q_bntd.dtype, torch.float32)
    scores_bnts = (q_bntd @ k_bnsd.transpose(-2, -1)).to(fine) * call.scale
    if call.softcap is not None:
        scores_bnts = call.softcap * (scores_bnts / call.softcap).tanh()
    scores_bnts = _masked(scores_bnts, call, chosen, window)
    if call.sinks_h is None:
        return scores_bnts.softmax(-1)
    sinks_1n11 = call.sinks_h.to(fine)[chosen].view(1, -1, 1, 1).expand(*scores_bnts.shape[:3], 1)
    return torch.cat([scores_bnts, sinks_1n11], dim=-1).softmax(-1)[..., :-1]


def combine(call: Call, weights_bnts: Tensor, heads: tuple[int, ...] | None = None) -> Tensor:
    """Outputs [b, t, n, e] of weights of all heads, or of those named."""
    v_bhse = repeat_heads(call.v_bgse, call.q_bhtd.shape[1])
    v_bnse = v_bhse if heads is None else v_bhse[:, list(heads)]
    return (weights_bnts.to(v_bnse.dtype) @ v_bnse).transpose(1, 2)


def repeat_heads(x_bgsd: Tensor, heads: int) -> Tensor:
    """One key or value head per query head."""
    repeats = heads // x_bgsd.shape[1]
    return x_bgsd if repeats == 1 else x_bgsd.repeat_interleave(repeats, dim=1)


def _masked(scores_bnts: Tensor, call: Call, chosen: Tensor, window: int | None) -> Tensor:
    mask = call.mask_bhts
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, chosen]
    if mask is not None:
        scores_bnts = scores_bnts.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores_bnts + mask
    queries, keys = scores_bnts.shape[-2:]
    distance_ts = (
        torch.arange(keys - queries, keys, device=scores_bnts.device)[:, None]
        - torch.arange(keys, device=scores_bnts.device)[None, :]
    )
    if mask is None and call.causal:
        scores_bnts = scores_bnts.masked_fill(distance_ts < 0, -torch.inf)
    if window is not None:
        scores_bnts = scores_bnts.masked_fill(distance_ts >= window, -torch.inf)
    return scores_bnts
