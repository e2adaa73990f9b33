"""Star graph: find the way from the centre of a star to a goal at the end of one of its arms. Needs a plan at the first step.

Bachmann and Nagarajan (arXiv 2403.06963) made the task, Hu et al. (arXiv 2410.23506) the form used here. The source is the
first node of every arm; an arm has `path_length` nodes, the source included. All edges come in random order, then source and
goal, then the path:

    text     2,0|0,3|2,1|1,4/2,4=2,1,4
    tokens   2 0 | 0 3 | 2 1 | 1 4 / 2 4 = 2 1 4 END

After the source any arm looks alike: only one that follows the goal back through its edges knows where to turn. A model that
is given the earlier tokens of the path can copy the rest of it edge by edge and never learns that. Guessing the arm is right
with probability 1/arms, the line to beat.

Token ids: nodes 0 … N-1, "|" N, "=" N+1, "/" N+2, "$" N+3 (unused), the end N+4. Commas give no token. Targets are the
next tokens from "=" on; the graph before it is random and not scored, and nothing follows the end.

Shapes: b sequences · t tokens · e edges.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from torchstone.data.batch import IGNORE
from torchstone.data.keyed import Keys, mix, uniform
from torchstone.data.synthetic.task import Rows, Task
from torchstone.recipe.part import Part

BAR, EQUALS, SLASH, END = 0, 1, 2, 4  # offsets of the ids behind the nodes


class Star(NamedTuple):
    """One graph: edges in their order, and the path from source to goal."""

    edges: list[tuple[int, int]]
    path: list[int]

    def text(self) -> str:
        """The line `edges/source,goal=path`."""
        edges = "|".join(f"{one},{other}" for one, other in self.edges)
        return f"{edges}/{self.path[0]},{self.path[-1]}={','.join(map(str, self.path))}"

    def tokens(self, nodes: int) -> list[int]:
        """Token ids, the end included, in a vocabulary of so many nodes."""
        graph = [token for edge in self.edges for token in (*edge, nodes + BAR)][:-1]
        return [*graph, nodes + SLASH, self.path[0], self.path[-1], nodes + EQUALS, *self.path, nodes + END]


def star_line(rng: random.Random, arms: int, path_length: int, nodes: int) -> Star:
    """A graph drawn as the published generator draws it from a freshly seeded `random.Random`.

    Labels are shuffled, taken from the end, the source first and then arm by arm; the first arm is the path.
    """
    labels = list(range(nodes))
    rng.shuffle(labels)
    source = labels.pop()
    ways = [[source, *(labels.pop() for _ in range(path_length - 1))] for _ in range(arms)]
    edges = [edge for way in ways for edge in zip(way, way[1:], strict=False)]
    rng.shuffle(edges)
    return Star(edges, ways[0])


class StarGraphConfig(Part):
    """Paths in star graphs."""

    family: ClassVar[str] = "data"
    kind: Literal["star-graph"] = "star-graph"
    arms: int = Field(default=2, gt=1, description="arms of the star, one of which leads to the goal")
    path_length: int = Field(default=4, gt=1, description="nodes of an arm, the source included")
    nodes: int = Field(default=8, gt=0, description="different node labels")

    @model_validator(mode="after")
    def _enough_nodes(self) -> StarGraphConfig:
        needed = 1 + self.arms * (self.path_length - 1)
        if self.nodes < needed:
            raise ValueError(
                f"{self.arms} arms of {self.path_length} nodes that share their source have {needed} different nodes, and "
                f"nodes is {self.nodes}; give at least {needed}, or fewer or shorter arms"
            )
        return self

    @property
    def edges(self) -> int:
        """Edges of a graph."""
        return self.arms * (self.path_length - 1)

    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.nodes + END + 1

    def end_token(self) -> int:
        """The id that ends a sequence: what `model.end_token` of a belief-state model must be."""
        return self.nodes + END

    def equals_index(self) -> int:
        """Place of "=" in every sequence: every prefix up to there holds the whole graph."""
        return 3 * self.edges + 2

    def sequence_length(self) -> int:
        """Tokens of a sequence, the end included."""
        return self.equals_index() + self.path_length + 2

    def build(self, cache: Path | None = None) -> StarGraph:
        """The task; nothing is cached."""
        return StarGraph(self)


class StarGraph(Task[StarGraphConfig]):
    """DataSource of star graphs."""

    def rows(self, keys_b: Keys) -> Rows:
        """Labels without repetition, edges in random order, the path along the first arm."""
        task, nodes = self.settings, self.settings.nodes
        steps = task.path_length - 1
        draws = [mix(keys_b ^ np.uint64(stream)) for stream in (1, 2)]
        labels_bn = uniform(draws[0], nodes).argsort(axis=1)
        places = np.arange(1, 1 + task.edges).reshape(task.arms, steps)
        ways = np.concatenate([np.zeros((task.arms, 1), dtype=np.int64), places], axis=1)
        starts, stops = ways[:, :-1].ravel(), ways[:, 1:].ravel()
        order_be = uniform(draws[1], task.edges).argsort(axis=1)
        tokens_bt = np.full((len(keys_b), self.length), nodes + BAR, dtype=np.int64)
        equals = task.equals_index()
        tokens_bt[:, 0 : equals - 3 : 3] = np.take_along_axis(labels_bn, starts[order_be], axis=1)
        tokens_bt[:, 1 : equals - 3 : 3] = np.take_along_axis(labels_bn, stops[order_be], axis=1)
        tokens_bt[:, equals - 3] = nodes + SLASH
        tokens_bt[:, equals - 2 : equals] = labels_bn[:, [0, steps]]
        tokens_bt[:, equals] = nodes + EQUALS
        tokens_bt[:, equals + 1 : -1] = labels_bn[:, : task.path_length]
        tokens_bt[:, -1] = nodes + END
        targets_bt = np.full_like(tokens_bt, IGNORE)
        targets_bt[:, equals:-1] = tokens_bt[:, equals + 1 :]
        return tokens_bt, targets_bt
