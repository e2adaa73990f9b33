"""The other half of the WSD-S study: a small decoder on text, stepped by torchstone's own trainer at given rates.

Nothing is written to disk on the way: a state is the model's and the optimizer's, copied in memory, so that runs can part, and
the moments are carried through every jump of the rate.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.train.budget import counts_of, steps_of
from torchstone.train.distributed import World
from torchstone.train.loop import Trainer
from torchstone.train.precision import Compute, default_device


def base(s: Mapping[str, Any]) -> Recipe:
    """The recipe that all text arms share; arms set the peak rate and give their own schedule step by step."""
    return load_recipe({
        "model": {"kind": "decoder", "width": s["width"], "depth": s["depth"], "head_dim": s["head_dim"],
                  "block": {"feedforward": {"kind": "swiglu", "hidden": s["hidden"]}}},
        "data": {"kind": "text", "tokenizer": s["tokenizer"], "length": s["length"]},
        "optimizer": {"kind": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1, "clip": 1.0},
        "schedule": "constant", "budget": {"steps": s["ends"][-1]},
        "batch": {"sequences": s["batch"], "micro": s["micro"]},
        "evaluation": {"sequences": s["evaluate"]},
        "precision": s["precision"], "compile": False,
    })  # fmt: skip


class _Given:
    """A schedule that says what it was told."""

    value = 1.0

    def factor(self, step: int) -> float:
        return self.value


class TextLearner:
    """One model of a recipe with a seed and a peak rate."""

    def __init__(self, recipe: Mapping[str, Any], seed: int, peak: float) -> None:
        self.recipe = load_recipe(recipe, [f"seed={seed}", f"optimizer.learning_rate={peak!r}"])
        self.data = self.recipe.data.build(None)
        self.device = default_device()
        self.model = self.recipe.model.build(self.data.vocab_size, self.data.length, seed).to(self.device)
        compute = Compute(self.recipe.precision, False)
        world = World(0, 1, self.device)
        self.trainer = Trainer(
            self.recipe, self.model, self.data, compute, world, steps_of(self.recipe), counts_of(self.recipe)
        )
        self.trainer.schedule = self._rate = _Given()

    def state(self) -> dict[str, Any]:
        """Weights and optimizer state, copied."""
        return {"model": self.weights(), "optimizer": copy.deepcopy(self.trainer.optimizer.state_dict())}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put a state back."""
        self.model.load_state_dict(state["model"])
        self.trainer.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def weights(self) -> dict[str, Tensor]:
        """The weights, copied."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def advance(self, step: int, factor: float) -> None:
        """One update with batch `step` of the seed."""
        self._rate.value = factor
        self.trainer.position.step = step
        self.model.train()
        self.trainer.step()

    @torch.no_grad()
    def losses(self, *, tuning: bool = False) -> Tensor:
        """Loss of every held-out target in nats, [n]; the same targets in the same order for every model.

        Args:
            tuning: of as many windows that lie between those, on which rates are chosen and nothing is judged.
        """
        return torch.cat(self._held_out(entropy=False, tuning=tuning))

    @torch.no_grad()
    def entropies(self) -> Tensor:
        """Entropy of the model's next-token distribution at every held-out target, [n]."""
        return torch.cat(self._held_out(entropy=True, tuning=False))

    def _held_out(self, *, entropy: bool, tuning: bool) -> list[Tensor]:
        """If `tuning`, the second of each pair among twice as many windows; the first is one that judges cells."""
        self.model.eval()
        found = []
        rows = slice(1, None, 2) if tuning else slice(None)
        compute, world = self.trainer.compute, self.trainer.world
        for batch in self.data.evaluation(32, self.recipe.evaluation.sequences * (2 if tuning else 1)):
            batch = world.place(batch)
            valid_bt = batch.targets_bt >= 0
            with compute.autocast(self.device):
                if entropy:
                    logits_btv = self.model.logits(self.model(batch.tokens_bt).hidden_btd)
                    log_p_btv = logits_btv.float().log_softmax(-1)
                    values_bt = -(log_p_btv.exp() * log_p_btv).sum(-1)
                else:
                    values_bt = self.trainer.objective(self.model, batch).per_token_bt
            found.append(values_bt[rows][valid_bt[rows]].cpu())
        return found
