"""Roles: what a weight matrix does in the model, as its own module declares it.

A module says so in `parameter_roles()`: local parameter name → role, or several roles for a fused matrix. Weight decay may then
differ by role (`optimizer.weight_decay`) without guessing from names.

    attention_qk  queries and keys, which act only through the product W_kᵀ W_q
    attention_vo  values and outputs, which act only through the product W_o W_v
    mlp           feed-forward layers
    embeddings    token embeddings and the output matrix
    other         every other matrix

Vectors have no role: they are not decayed. Nor has a matrix that `no_decay_parameters()` exempts.
"""

from __future__ import annotations

from typing import Literal

Role = Literal["attention_qk", "attention_vo", "mlp", "embeddings", "other"]
Roles = dict[str, Role | tuple[Role, ...]]
"""What `parameter_roles()` returns."""
