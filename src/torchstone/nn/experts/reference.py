"""Routers and layers of experts as plain loops over tokens, in the order of the papers' equations.

For tests and for reading: slow, without masks other than causal, and with weights passed in. Shapes: x [t, width]; weights as in
`smoe` and `moa`; `turn` rotates a [t, c] head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def route(z_e: Tensor, top_k: int, order: str = "topk-softmax") -> list[tuple[int, Tensor]]:
    """Experts of one token with their gates, best first; among equal logits the lower index."""
    logits = z_e.tolist()
    kept = sorted(range(len(logits)), key=lambda expert: (-logits[expert], expert))[:top_k]
    gates = z_e[kept].softmax(0) if order == "topk-softmax" else z_e.softmax(0)[kept]
    return list(zip(kept, gates, strict=True))


def auxiliary_losses(z_te: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Balance loss and z-loss of one router."""
    tokens, experts = z_te.shape
    counts = torch.zeros(experts, dtype=z_te.dtype)
    for z_e in z_te:
        for expert, _ in route(z_e, top_k):
            counts[expert] += 1
    balance = experts * (counts / (tokens * top_k) * z_te.softmax(1).mean(0)).sum()
    return balance, torch.stack([z_e.logsumexp(0) ** 2 for z_e in z_te]).mean()


def smoe(x: Tensor, weights: Sequence[Tensor], top_k: int) -> Tensor:
    """The feed-forward layer; weights of the router, into and out of the experts, and the bias."""
    w_router, w_in, w_out, bias = weights
    rows = []
    for x_d in x:
        y_d = bias
        for expert, gate in route(w_router @ x_d, top_k):
            a, c = (w_in[expert] @ x_d).chunk(2)
            y_d = y_d + gate * (w_out[expert] @ (F.silu(a) * c))
        rows.append(y_d)
    return torch.stack(rows)


def moa(
    x: Tensor, weights: Mapping[str, Tensor], kv_heads: int, top_k: int, turn: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The mixer, and its maps [h, t, t] slot by slot; `weights` by the names of `MixtureOfAttentionHeads`."""
    chosen = [route(weights["router.weight"] @ x_d, top_k) for x_d in x]
    keys = [turn(k) for k in (x @ weights["w_k.weight"].T).chunk(kv_heads, dim=1)]
    values = (x @ weights["w_v.weight"].T).chunk(kv_heads, dim=1)
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    y, maps = weights["bias"].expand_as(x), []
    for slot in range(top_k):
        experts = [found[slot][0] for found in chosen]
        gates = torch.stack([found[slot][1] for found in chosen])
        queries = torch.stack([weights["query_experts"][e] @ x_d for e, x_d in zip(experts, x, strict=True)])
        read = []
        for q, k, v in zip(queries.chunk(kv_heads, dim=1), keys, values, strict=True):
            scores = (turn(q) @ k.T / q.shape[1] ** 0.5).masked_fill(future, -torch.inf)
            maps.append(scores.softmax(dim=1))
            read.append(maps[-1] @ v)
        outputs = zip(experts, torch.cat(read, dim=1), strict=True)
        y = y + gates[:, None] * torch.stack([weights["output_experts"][e] @ o for e, o in outputs])
    return y, torch.stack(maps)
