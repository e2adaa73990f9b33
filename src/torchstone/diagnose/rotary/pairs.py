"""What each rotary pair adds to an attention logit, and which pair is how slow.

Rotary attention adds up d/2 two-dimensional products, one for each frequency. With queries and keys in half order

    g[i, j, m] = q_i[m] k_j[m] + q_i[m + M] k_j[m + M],   Σ_m g = √d · logit,   M = d/2, m = 0 the fastest pair

(section 3 of arXiv 2410.08703; the sum over sampled pairs follows EliteKV, which cites it). Channels that do not rotate
are pairs of frequency 0 and count as the slowest.

Shapes: b sequences · h query heads · t queries · s keys · d channels · m frequency pairs · n pairs of tokens.

Pitfalls: the parts are large and of both signs, so that they cancel; sum them in 32 bits at least. Models with an
interleaved layout must be permuted first, and grouped keys repeated to one per query head (a `Subject` does both).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchstone.errors import ConfigError

CHUNK = 1 << 22  # numbers of one temporary tensor


def pair_products(q: Tensor, k: Tensor) -> Tensor:
    """Products of every rotary pair: channels [..., d] of rotated queries and keys → parts [..., m]."""
    half = q.shape[-1] // 2
    return q[..., :half] * k[..., :half] + q[..., half:] * k[..., half:]


def logit_parts(q_bhtd: Tensor, k_bhsd: Tensor) -> Tensor:
    """All parts g [b, h, t, s, m] at once: for short inputs, since it holds b·h·t·s·m numbers."""
    return pair_products(q_bhtd[:, :, :, None, :], k_bhsd[:, :, None, :, :])


def relative_index(pairs: int) -> Tensor:
    """x_m = m / (M - 1), fp64 in 0 … 1: 0 for the fastest pair, 1 for the slowest.

    Raises:
        ConfigError: a single pair, which is neither fast nor slow.
    """
    if pairs < 2:
        raise ConfigError(
            f"distance heads compare fast and slow rotary pairs, but a head has {pairs}; give a model whose heads have at "
            "least 4 channels."
        )
    return torch.arange(pairs, dtype=torch.float64) / (pairs - 1)


def contribution(q_bhtd: Tensor, k_bhsd: Tensor, queries_n: Tensor, keys_n: Tensor) -> Tensor:
    """Σ of g over pairs of tokens, mean over the sequences: [m, h].

    Args:
        q_bhtd, k_bhsd: rotated queries and keys in half order.
        queries_n, keys_n: positions; no key may come after its query.

    Raises:
        ConfigError: a pair looks into the future, where no causal model looks.
    """
    if bool((keys_n > queries_n).any()):
        raise ConfigError("a pair has its key after its query, which a causal model never sees; give keys ≤ queries.")
    batch, heads, _, channels = q_bhtd.shape
    total_bhd = q_bhtd.new_zeros(batch, heads, channels)
    size = max(1, CHUNK // (batch * heads * channels))
    for start in range(0, len(queries_n), size):
        part = slice(start, start + size)
        total_bhd += (q_bhtd[:, :, queries_n[part]] * k_bhsd[:, :, keys_n[part]]).sum(2)
    half = channels // 2
    return (total_bhd[..., :half] + total_bhd[..., half:]).mean(0).T


def random_pairs(length: int, count: int, skip: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` pairs (query, key) of positions with skip ≤ key < query < length, all equally likely.

    The generator is the function's own: a seed gives the same pairs on any machine, for every layer.
    """
    generator = torch.Generator().manual_seed(seed)
    span = length - skip  # positions that may be queries or keys; they form span (span - 1) / 2 pairs
    number_n = torch.randint(span * (span - 1) // 2, (count,), generator=generator)
    queries_n = ((1 + torch.sqrt(1 + 8 * number_n.double())) / 2).long()
    return queries_n + skip, number_n - queries_n * (queries_n - 1) // 2 + skip
