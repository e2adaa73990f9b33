"""Heads that are constructed from rotary frequencies, and what the theory says of them (Barbero et al., arXiv 2410.06205).

A head whose queries and keys are the same vector ψ at every token has logits that depend on the offset alone:

    ⟨R^i ψ, R^j k⟩ = Σ_m ‖ψ⁽ᵐ⁾‖² cos((j − i + o) g_m)          where k = R^o ψ                                 (Thm 5.3)

so that o = 0 makes a head that attends to itself and o = 1 one that attends to the token before. One frequency needs a large
norm, because multiples of it nearly return (cos 44 = 0.9998); several frequencies sharpen the head at equal norm. Without
rotation no single head of a first layer can do either: equal tokens get equal weight (Prop. 5.2).

A frequency can also carry meaning, as long as its angle stays small: with cos(distance · g) ≥ 1 − error the logit of a match
is off by at most `error`, which bounds the distance by arccos(1 − error) / g ≈ 0.318 / g for 5 % (`semantic_reach`). A pair
that does not turn has no such bound (Thm 6.1).

Shapes: t queries · s keys · m frequency pairs · d = 2m channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchstone.nn.position.rotary import turn


def rotated(vector_d: Tensor, frequencies_m: Tensor, positions_t: Tensor) -> Tensor:
    """A vector (half layout) turned to each position, fp64 [t, d]."""
    angle_tm = positions_t.double()[:, None] * frequencies_m.double()
    return turn(vector_d.double().expand(len(positions_t), -1), angle_tm.cos(), angle_tm.sin(), "half")


def spread(amplitude: float, pairs: int) -> Tensor:
    """A vector ψ of `pairs` pairs with ‖ψ‖² = amplitude, every pair with the same share; fp64 [d], half layout."""
    first_m = torch.full((pairs,), math.sqrt(amplitude / pairs), dtype=torch.float64)
    return torch.cat([first_m, torch.zeros_like(first_m)])


def constructed_logits(amplitude: float, frequencies: Sequence[float], length: int, back: int = 0) -> Tensor:
    """Logits [t, s] of the head that looks `back` tokens back, without the factor 1/√d."""
    frequencies_m = torch.tensor(frequencies, dtype=torch.float64)
    steps_t = torch.arange(length)
    psi_d = spread(amplitude, len(frequencies))
    return rotated(psi_d, frequencies_m, steps_t) @ rotated(psi_d, frequencies_m, steps_t + back).T


def constructed_attention(amplitude: float, frequencies: Sequence[float], length: int, back: int = 0) -> Tensor:
    """Causal attention [t, s] of the same head."""
    logits_ts = constructed_logits(amplitude, frequencies, length, back)
    future_ts = torch.ones(length, length, dtype=torch.bool).triu(1)
    return logits_ts.masked_fill(future_ts, -torch.inf).softmax(dim=-1)


def semantic_reach(frequency: float, error: float = 0.05) -> float:
    """Tokens up to which a match at this frequency loses at most `error` of its logit; infinite for frequency 0."""
    return math.inf if frequency == 0 else math.acos(1 - error) / frequency


def measured_reach(frequency: float, longest: int, error: float = 0.05) -> int:
    """The same, found by turning a matching query and key apart one token at a time, up to `longest` tokens."""
    frequencies_m = torch.tensor([frequency], dtype=torch.float64)
    unit_d = spread(1.0, 1)
    match_t = rotated(unit_d, frequencies_m, torch.arange(longest + 1)) @ unit_d
    broken_t = (match_t < 1 - error).nonzero()
    return int(broken_t[0, 0]) - 1 if len(broken_t) else longest
