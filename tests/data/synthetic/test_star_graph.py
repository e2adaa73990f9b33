"""Star graphs against a reading of their rules token by token."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstone.data.batch import IGNORE
from torchstone.data.source import DataSource
from torchstone.data.synthetic.star_graph import StarGraphConfig, star_line
from torchstone.recipe.registry import parse_part
from torchstone.storage.hashing import bytes_hash


def read(tokens: list[int], nodes: int) -> tuple[list[tuple[int, int]], int, int, list[int]]:
    """Edges, source, goal and path of a sequence; fails where a token is out of place."""
    bar, equals, slash, end = nodes, nodes + 1, nodes + 2, nodes + 4
    assert tokens.count(slash) == tokens.count(equals) == tokens.count(end) == 1 and tokens[-1] == end
    graph, rest = tokens[: tokens.index(slash)], tokens[tokens.index(slash) + 1 :]
    assert all(token == bar for token in graph[2::3]) and len(graph) % 3 == 2
    source, goal, mark, *path = rest[:-1]
    assert mark == equals
    return list(zip(graph[0::3], graph[1::3], strict=True)), source, goal, path


@given(arms=st.integers(2, 5), length=st.integers(2, 5), more=st.integers(0, 9), seed=st.integers(0, 9))
def test_rows_follow_the_rules(arms: int, length: int, more: int, seed: int) -> None:
    nodes = 1 + arms * (length - 1) + more
    config = StarGraphConfig(arms=arms, path_length=length, nodes=nodes)
    source = config.build(None)
    batch = source.batch(seed, 3, 6)
    assert batch.tokens_bt.shape == (6, config.sequence_length()) == (6, source.length)
    assert config.vocabulary() == source.vocab_size == nodes + 5 and config.end_token() == nodes + 4
    star = star_line(random.Random(seed), arms, length, nodes)
    lines = [*batch.tokens_bt.tolist(), star.tokens(nodes)]
    for tokens in lines:
        edges, first, goal, path = read(tokens, nodes)
        assert tokens[config.equals_index()] == nodes + 1
        follow = dict(edges[::-1])
        assert len(edges) == arms * (length - 1) == len(set(edges))
        assert sum(one == first for one, _ in edges) == arms
        used = {node for edge in edges for node in edge}
        assert len(used) == 1 + arms * (length - 1) and max(used) < nodes
        assert path[0] == first and path[-1] == goal and len(path) == length
        assert set(zip(path, path[1:], strict=False)) <= set(edges)
        assert goal not in follow
    for tokens, targets in zip(batch.tokens_bt.tolist(), batch.targets_bt.tolist(), strict=True):
        start = config.equals_index()
        assert targets == [IGNORE] * start + tokens[start + 1 :] + [IGNORE]


def test_rows_depend_on_seed_step_and_row_alone() -> None:
    source = StarGraphConfig().build(None)
    whole = source.batch(5, 7, 16)
    parts = [source.batch(5, 7, 16, start, start + 4) for start in (12, 0, 8, 4)]
    parts.sort(key=lambda part: part.rows)
    assert torch.equal(torch.cat([part.tokens_bt for part in parts]), whole.tokens_bt)
    for other in (source.batch(5, 8, 16), source.batch(6, 7, 16), next(source.evaluation(16, 16))):
        assert not torch.equal(other.tokens_bt, whole.tokens_bt)


def test_labels_orders_and_goals_are_even() -> None:
    config = StarGraphConfig(arms=2, path_length=2, nodes=4)
    tokens_bt = config.build(None).batch(0, 0, 6000).tokens_bt
    sources = torch.bincount(tokens_bt[:, 6], minlength=4).double() / 6000
    assert torch.allclose(sources, torch.full((4,), 0.25, dtype=torch.double), atol=0.03)
    first_edge_leads_to_the_goal = (tokens_bt[:, 1] == tokens_bt[:, 7]).double().mean()
    assert float(first_edge_leads_to_the_goal) == pytest.approx(0.5, abs=0.03)


def test_published_lines_are_drawn_from_pythons_generator() -> None:
    """Recorded from the published generator: seed 1, two arms of three nodes, ten labels."""
    star = star_line(random.Random(1), 2, 3, 10)
    assert star.text() == "2,0|0,3|2,1|1,4/2,4=2,1,4"
    assert star.tokens(10) == [2, 0, 10, 0, 3, 10, 2, 1, 10, 1, 4, 12, 2, 4, 11, 2, 1, 4, 14]


def test_the_part_is_found_by_its_kind_and_is_a_source() -> None:
    config = parse_part("data", {"kind": "star-graph", "nodes": 9})
    assert isinstance(config.build(None), DataSource)  # type: ignore[attr-defined]


def test_too_few_labels_are_refused() -> None:
    with pytest.raises(
        ValueError, match="2 arms of 5 nodes that share their source have 9 different nodes, and nodes is 8"
    ):
        StarGraphConfig(arms=2, path_length=5, nodes=8)


def test_the_rows_are_the_same_on_every_machine() -> None:
    """Recorded once. If the task changes on purpose, raise `StarGraph.version` and record again."""
    source = StarGraphConfig().build(None)
    batch = source.batch(1, 2, 3)
    assert source.fingerprint == "21b9766a781499541dedefe94f6dca92"
    assert bytes_hash(batch.tokens_bt.numpy().astype("<i8").tobytes()) == "bb9773aadfb45f43e905d964053e8c54"
