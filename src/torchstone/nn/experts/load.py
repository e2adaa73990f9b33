"""Expert load of a model: where tokens of which class go, router by router.

    found = expert_load(model, batches, classes=5)       # batches of (tokens [b, t], class of each token [b, t])
    found[0].load()                                      # [e], 1 where load is uniform

Routers are watched from outside, through forward hooks; nothing in the model changes.

Shapes: b batch · t tokens · n = b·t · e experts · k slots · c classes of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.nn.experts.choice import Routing
from torchstone.nn.experts.router import Router


@dataclass
class RouterLoad:
    """What went through one router.

    Attributes:
        name: module path of the router's layer, such as `blocks.3.feedforward`.
        counts_ce: fp64 on the CPU, assignments of tokens of each class to each expert.
        gates_e: fp64, sum of the gates that each expert was given.
        top_k: experts per token.
        entropy: sum over tokens of the entropy in nats of the softmax over all experts.
        tokens: number of tokens.
    """

    name: str
    counts_ce: Tensor
    gates_e: Tensor
    top_k: int
    entropy: float = 0.0
    tokens: int = 0

    def add(self, routing: Routing, classes_n: Tensor) -> None:
        """Count one forward pass."""
        classes, experts = self.counts_ce.shape
        pair_nk = classes_n.unsqueeze(1) * experts + routing.experts_nk
        counts = torch.bincount(pair_nk.flatten(), minlength=classes * experts)
        self.counts_ce += counts.view(classes, experts).double().cpu()
        gates_m = routing.gates_nk.flatten().double()
        self.gates_e += torch.bincount(routing.experts_nk.flatten(), gates_m, minlength=experts).cpu()
        self.entropy += float(torch.special.entr(routing.probabilities_ne).sum())
        self.tokens += len(classes_n)

    def load(self, of_class: int | None = None) -> Tensor:
        """Load [e] relative to uniform (1) of all tokens, or of those of one class; nan for a class without tokens."""
        counts_e = self.counts_ce.sum(0) if of_class is None else self.counts_ce[of_class]
        return counts_e / counts_e.sum() * len(counts_e)

    def mean_entropy(self) -> float:
        """Entropy of the router in nats, mean over tokens."""
        return self.entropy / self.tokens

    def mean_gates(self) -> Tensor:
        """Mean gate [e] over the tokens of each expert; 0 for an expert without tokens."""
        return self.gates_e / self.counts_ce.sum(0).clamp_min(1)

    def dead(self) -> list[int]:
        """Experts that no token went to."""
        found: list[int] = (self.counts_ce.sum(0) == 0).nonzero().flatten().tolist()
        return found


def routers_of(model: nn.Module) -> dict[str, Router]:
    """Module path of each layer with experts → its router, in the model's order.

    Raises:
        ConfigError: the model has no experts.
    """
    found = {
        name.removesuffix(".router"): module for name, module in model.named_modules() if isinstance(module, Router)
    }
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no experts to look at; give a model with `feedforward: smoe` or `mixer: moa`."
        )
    return found


@torch.no_grad()
def expert_load(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> list[RouterLoad]:
    """The load of every router over batches of whole sequences.

    Args:
        model: takes tokens [b, t]; runs in the mode that it is in.
        batches: int64 tokens [b, t] and the class [b, t] of each, from 0 to `classes` - 1.
        classes: number of classes of tokens.

    Raises:
        ConfigError: the model has no experts.
    """
    routers = routers_of(model)
    found = {
        name: RouterLoad(
            name,
            torch.zeros(classes, router.weight.shape[0], dtype=torch.float64),
            torch.zeros(router.weight.shape[0], dtype=torch.float64),
            router.top_k,
        )
        for name, router in routers.items()
    }
    for tokens_bt, classes_bt in batches:
        classes_n = classes_bt.flatten().to(tokens_bt.device)
        with ExitStack() as stack:
            for name, router in routers.items():
                stack.callback(router.register_forward_hook(_counter(found[name], classes_n)).remove)
            model(tokens_bt)
    return list(found.values())


def _counter(load: RouterLoad, classes_n: Tensor) -> Any:
    return lambda module, inputs, routing: load.add(routing, classes_n)
