"""What keeps experts in use: the load-balance loss, the z-loss, and numbers about load.

    balance = E · Σ_e f_e P_e,   f_e = (assignments to e) / (N·k), without gradient,   P_e = mean over tokens of softmax(z)_e
    z-loss  = mean over tokens of (logsumexp_e z_e)²

The balance loss is 1 for uniform load and grows to E as one expert takes all (Shazeer et al., arXiv 1701.06538; Fedus et al.,
arXiv 2101.03961, there with k = 1); the z-loss keeps logits small, where softmax in low precision is exact (Zoph et al., arXiv
2202.08906). JetMoE (arXiv 2404.07413) adds both for every router.

Shapes: n tokens · k slots · e experts.

Pitfalls: padding takes no part. Statistics are those of one forward pass (a micro-batch of one rank), as in the authors' code;
they are not gathered over ranks. Assignments are counted from indices, never from `gate > 0`, which a gate of 0 would miss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.nn.experts.choice import Routing


@dataclass(frozen=True, eq=False)
class Statistics:
    """Detached numbers of one routing; tensors, so that taking them waits for no GPU.

    Attributes:
        load_e: assignments to each expert over all assignments, times the number of experts: 1 where load is uniform.
        entropy: mean over tokens of the entropy in nats of the softmax over all experts.
    """

    load_e: Tensor
    entropy: Tensor

    def numbers(self) -> dict[str, float]:
        """Numbers worth logging; dead experts got no token in this pass."""
        dead = (self.load_e == 0).sum()
        found = torch.stack([self.entropy, self.load_e.max(), self.load_e.min(), dead.to(self.entropy.dtype)])
        return dict(zip(("router_entropy", "load_max", "load_min", "dead_experts"), found.tolist(), strict=True))


def balance_loss(routing: Routing, valid_n: Tensor | None) -> Tensor:
    """See the module's docstring; 0 where every token is padding."""
    return (load(routing, valid_n) * masked_mean(routing.probabilities_ne, valid_n)).sum()


def z_loss(routing: Routing, valid_n: Tensor | None) -> Tensor:
    """See the module's docstring; 0 where every token is padding."""
    return masked_mean(routing.logits_ne.logsumexp(-1).square(), valid_n)


@torch.no_grad()
def load(routing: Routing, valid_n: Tensor | None) -> Tensor:
    """E · f_e [e]: the share of the assignments of each expert, relative to uniform load."""
    chosen_ne = torch.zeros_like(routing.logits_ne).scatter_(1, routing.experts_nk, 1.0)
    return masked_mean(chosen_ne, valid_n) * (chosen_ne.shape[1] / routing.experts_nk.shape[1])


@torch.no_grad()
def statistics(routing: Routing, valid_n: Tensor | None) -> Statistics:
    """Load and entropy of one routing."""
    entropy_n = torch.special.entr(routing.probabilities_ne).sum(-1)
    return Statistics(load(routing, valid_n), masked_mean(entropy_n, valid_n))


def masked_mean(values_n: Tensor, valid_n: Tensor | None) -> Tensor:
    """Mean over the first dimension of what is valid; 0 if nothing is."""
    if valid_n is None:
        return values_n.mean(0) if values_n.shape[0] else values_n.sum(0)
    weight_n = valid_n.to(values_n.dtype)
    total = (values_n * weight_n.view(-1, *[1] * (values_n.dim() - 1))).sum(0)
    return total / weight_n.sum().clamp_min(1.0)
