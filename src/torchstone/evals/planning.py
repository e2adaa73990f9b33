"""Planning: is the whole path of a star graph right when it is decoded greedily from "="?

A model that is shown the earlier tokens of the path answers most of them without a plan, so the loss on the path says little.
Here nothing of it is shown: the prompt ends with "=", every token is the most likely one after what the model said itself, and
only a path that is right from source to goal counts. `first_step` is the share whose first node behind the source is right, the
one step that needs the plan; guessing an arm gives 1/arms for both.

Shapes: b graphs · t tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchstone.data.synthetic.star_graph import StarGraph
from torchstone.models.generate import generate


@dataclass(frozen=True)
class Planning:
    """Answers to held-out graphs.

    Attributes:
        exact_b: for each graph 1.0 if its whole path is right, else 0.0.
        first_b: the same for the first node behind the source.
        guess: share that guessing the arm gets right, 1/arms.
    """

    exact_b: list[float]
    first_b: list[float]
    guess: float

    @property
    def accuracy(self) -> float:
        """Share of whole paths."""
        return sum(self.exact_b) / len(self.exact_b)

    @property
    def first_step(self) -> float:
        """Share of first steps."""
        return sum(self.first_b) / len(self.first_b)


def planning(model: Any, data: StarGraph, graphs: int, batch: int = 256) -> Planning:
    """Greedy paths of held-out graphs.

    Args:
        model: a decoder, or a belief-state model, which decodes towards the empty suffix.
        data: the task; its held-out graphs 0 … graphs-1 are asked.
        graphs, batch: how many, and how many at once.
    """
    task = data.settings
    prompt, nodes = task.equals_index() + 1, task.path_length
    exact: list[float] = []
    first: list[float] = []
    for piece in data.evaluation(batch, graphs):
        rows = piece.tokens_bt.tolist()
        found = generate(model, [row[:prompt] for row in rows], max_new=nodes, greedy=True)
        for row, completion in zip(rows, found, strict=True):
            path = row[prompt : prompt + nodes]
            exact.append(float(completion.tokens == path))
            first.append(float(completion.tokens[:2] == path[:2]))
    return Planning(exact, first, 1 / task.arms)
