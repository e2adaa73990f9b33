"""Attention and differential attention as plain loops, in the order of the papers' equations.

For tests and for reading: slow, without masks other than causal, and with weights passed in. Shapes: x [t, width], a
weight [out, in], t tokens; `turn` rotates a [t, d] sub-head; `bias` [h, t, t] is added to the scores of each head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Turn = Callable[[Tensor], Tensor]


def causal_map(q_td: Tensor, k_sd: Tensor, bias_ts: Tensor) -> Tensor:
    """softmax(q kᵀ/√d + bias) over keys that are not later."""
    scores_ts = q_td @ k_sd.T / q_td.shape[1] ** 0.5 + bias_ts
    future = torch.ones_like(scores_ts, dtype=torch.bool).triu(1)
    return scores_ts.masked_fill(future, -torch.inf).softmax(dim=1)


def attention(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, heads: tuple[int, int], turn: Turn, bias: Tensor
) -> Tensor:
    """Grouped-query attention; `heads` are query heads and KV heads."""
    query, kv = heads
    q, k, v = ((x @ w.T).chunk(n, dim=1) for w, n in ((w_q, query), (w_k, kv), (w_v, kv)))
    outputs = []
    for i in range(query):
        j = i // (query // kv)
        outputs.append(causal_map(turn(q[i]), turn(k[j]), bias[i]) @ v[j])
    return torch.cat(outputs, dim=1) @ w_o.T


def differential_v1(
    x: Tensor,
    weights: dict[str, Tensor],
    heads: tuple[int, int],
    lambda_init: float,
    turn: Turn,
    bias: Tensor,
    pairing: str = "flash",
) -> Tensor:
    """Version 1; `weights` by the names of `DifferentialV1`."""
    query, kv = heads
    repeat = query // kv
    sizes = ((weights["w_q.weight"], 2 * query), (weights["w_k.weight"], 2 * kv), (weights["w_v.weight"], kv))
    q, k, v = ((x @ w.T).chunk(n, dim=1) for w, n in sizes)
    positive = (weights["lambda_q1"] * weights["lambda_k1"]).sum().exp()
    negative = (weights["lambda_q2"] * weights["lambda_k2"]).sum().exp()
    lam = positive - negative + lambda_init
    outputs = []
    for i in range(query):
        keys = [2 * (i // repeat) + m if pairing == "flash" else (2 * i + m) // repeat for m in (0, 1)]
        first, second = (causal_map(turn(q[2 * i + m]), turn(k[keys[m]]), bias[i]) for m in (0, 1))
        out = (first - lam * second) @ v[i // repeat]
        out = out / (out.pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt() * weights["norm.gain"]
        outputs.append((1 - lambda_init) * out)
    return torch.cat(outputs, dim=1) @ weights["w_o.weight"].T


def differential_v2(x: Tensor, weights: dict[str, Tensor], heads: tuple[int, int], turn: Turn, bias: Tensor) -> Tensor:
    """Version 2; `weights` by the names of `DifferentialV2`."""
    query, kv = heads
    sizes = ((weights["w_q.weight"], 2 * query), (weights["w_k.weight"], kv), (weights["w_v.weight"], kv))
    q, k, v = ((x @ w.T).chunk(n, dim=1) for w, n in sizes)
    lam = (x @ weights["w_lambda.weight"].T).sigmoid()
    outputs = []
    for i in range(query):
        j = i // (query // kv)
        first, second = (causal_map(turn(q[2 * i + m]), turn(k[j]), bias[i]) @ v[j] for m in (0, 1))
        outputs.append(first - lam[:, i : i + 1] * second)
    return torch.cat(outputs, dim=1) @ weights["w_o.weight"].T
