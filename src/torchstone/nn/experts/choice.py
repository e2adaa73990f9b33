"""Which experts a token goes to, and with which gates.

    z = W_r x                                         logits, one per expert
    topk-softmax   kept = the k largest z; gates = softmax over the kept (JetMoE, arXiv 2404.07413; Mixtral)
    softmax-topk   p = softmax over all z; kept = the k largest; gates = p of the kept, divided by their sum with `renormalise`

The first order gives gates that sum to 1 and know nothing of the experts that were not kept; so does the second with
`renormalise`, which is the same function. Without it gates shrink where the router is unsure.

Shapes: n tokens · e experts · k slots. Slots are ordered by logit, largest first; among equal logits the expert of lower index
comes first, on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Order = Literal["topk-softmax", "softmax-topk"]


@dataclass(frozen=True, eq=False)
class Routing:
    """Where tokens go.

    Attributes:
        experts_nk: int64, the experts of each token.
        gates_nk: fp32 or finer, what their outputs are multiplied by.
        logits_ne: fp32 or finer.
        probabilities_ne: their softmax over all experts, whatever the order.
    """

    experts_nk: Tensor
    gates_nk: Tensor
    logits_ne: Tensor
    probabilities_ne: Tensor


def choose(logits_ne: Tensor, top_k: int, order: Order, renormalise: bool = False) -> Routing:
    """The k experts of every token and their gates; see the module's docstring."""
    # a stable sort, because topk leaves open which of two equal logits it takes
    sorted_ne, experts_ne = logits_ne.sort(dim=-1, descending=True, stable=True)
    experts_nk, probabilities_ne = experts_ne[:, :top_k], logits_ne.softmax(-1)
    if order == "topk-softmax":
        gates_nk = sorted_ne[:, :top_k].softmax(-1)
    else:
        gates_nk = probabilities_ne.gather(1, experts_nk)
        if renormalise:
            gates_nk = gates_nk / gates_nk.sum(-1, keepdim=True)
    return Routing(experts_nk, gates_nk, logits_ne, probabilities_ne)
