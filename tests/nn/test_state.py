"""The state of attention: rows come and go without changing what any other row sees."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.span import NOWHERE, Span
from torchstone.nn.state import DecoderState, KVCache, require_rows

VOCABULARY, CAPACITY = 31, 24
CASES: dict[str, Any] = {
    "attention": {"block": {"mixer": {"kind": "attention", "kv_heads": 2}}},
    "window": {"block": {"mixer": {"kind": "attention", "window": 4}}},
    "window of 1": {"block": {"mixer": {"kind": "attention", "window": 1}}},
    "differential window": {"block": {"mixer": {"kind": "differential", "window": 5}}},
    "differential v2": {"block": {"mixer": {"kind": "differential", "version": "v2"}}},
    "alibi gqa": {"block": {"mixer": {"kind": "attention", "kv_heads": 2, "position": "alibi"}}},
    "kerple window": {"block": {"mixer": {"kind": "attention", "position": "kerple", "window": 6}}},
    "fire": {"block": {"mixer": {"kind": "attention", "position": "fire"}}},
    "dape fire": {"block": {"mixer": {"kind": "attention", "position": "fire", "score_processor": "dape"}}},
    "dape window": {
        "block": {"mixer": {"kind": "attention", "window": 5, "position": "kerple", "score_processor": "dape"}}
    },
    "window and full": {"pattern": [{"kind": "attention", "window": 4}, {"kind": "attention"}]},
    "moa": {"block": {"mixer": "moa"}},
    "rglru": {"block": {"mixer": "rglru"}},
    "hgrn2": {"block": {"mixer": "hgrn2"}},
    "RRA": {"depth": 3, "pattern": ["rglru", "rglru", {"kind": "local-attention", "window": 4}]},
    "GH": {"pattern": "GH"},
}
every_case = pytest.mark.parametrize("name", CASES)


def build(name: str, seed: int = 0) -> Decoder:
    config = {"width": 32, "depth": 2, "head_dim": 8, "initialisation": {"kind": "normal", "std": 0.3}, **CASES[name]}
    return DecoderConfig.model_validate(config).build(VOCABULARY, 16, seed).double().eval()


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def prompted(model: Decoder, length: int, seed: int) -> DecoderState:
    """The state of one row after a prompt."""
    state = model.new_state(1, CAPACITY)
    model(tokens(length, seed), state=state)
    return state


@torch.no_grad()
def continued(model: Decoder, state: DecoderState, lengths: list[int], steps: int = 6) -> Tensor:
    """Hidden states of further tokens of rows that have `lengths` tokens; the tokens depend on the length alone."""
    more_bt = torch.cat([tokens(steps, 100 + length) for length in lengths])
    hidden = []
    for step in range(steps):
        span = Span(positions_bt=torch.tensor(lengths)[:, None] + step)
        hidden.append(model(more_bt[:, step : step + 1], span, state).hidden_btd)
    return torch.cat(hidden, dim=1)


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-10, rtol=1e-10)


@every_case
def test_joined_rows_go_on_as_they_would_alone(name: str) -> None:
    model, lengths = build(name), [3, 11, 1, 7]
    states = [prompted(model, length, seed=length) for length in lengths]
    alone = [continued(model, copy.deepcopy(state), [n]) for state, n in zip(states, lengths, strict=True)]
    first, second = states[0].join(states[1]), states[2].join(states[3])
    both = first.join(second)
    assert (both.batch, both.length, both.capacity) == (4, 11, CAPACITY)
    close(continued(model, both, lengths), torch.cat(alone))


@every_case
def test_select_after_join_gives_the_originals(name: str) -> None:
    model, lengths = build(name), [9, 2, 5]
    states = [prompted(model, length, seed=length) for length in lengths]
    both = states[0].join(states[1]).join(states[2])
    for row, (state, length) in enumerate(zip(states, lengths, strict=True)):
        back = both.select(torch.tensor([row]))
        back.trim(back.length - length)
        assert (back.batch, back.length, back.nbytes()) == (1, length, state.nbytes())
        for mine, theirs in zip(back.layers, state.layers, strict=True):
            if isinstance(mine, KVCache):
                assert mine.segments_bs is None
                held, wanted = mine._held(), theirs._held()
                assert torch.equal(held.k_bgcd, wanted.k_bgcd) and torch.equal(held.v_bgce, wanted.v_bgce)
            else:
                assert all(torch.equal(mine.tensors[key], theirs.tensors[key]) for key in theirs.tensors)
        close(continued(model, back, [length]), continued(model, state, [length]))


@every_case
def test_a_selection_is_a_copy_in_the_order_asked_for(name: str) -> None:
    model, lengths = build(name), [4, 8]
    both = prompted(model, 4, 1).join(prompted(model, 8, 2))
    swapped = both.select(torch.tensor([1, 0, 1]))
    expected = continued(model, copy.deepcopy(both), lengths)
    close(continued(model, swapped, [8, 4, 8]), expected[[1, 0, 1]])
    assert both.length == 8
    close(continued(model, both, lengths), expected)


@every_case
def test_columns_that_nobody_uses_can_go(name: str) -> None:
    model = build(name)
    both = prompted(model, 12, 1).join(prompted(model, 3, 2))
    continued(model, both, [12, 3], steps=4)
    short = both.select(torch.tensor([1]))
    untouched = copy.deepcopy(short)
    short.trim(16 - 7, capacity=13)
    assert (short.length, short.capacity) == (7, 13)
    assert short.nbytes() <= untouched.nbytes()
    close(continued(model, short, [7]), continued(model, untouched, [7]))
    with pytest.raises(ConfigError, match="holds 13 of 13 tokens"):
        continued(model, short, [13], steps=1)


@every_case
def test_capacity_grows(name: str) -> None:
    model, more_bt = build(name), tokens(16, 3)
    state, small = model.new_state(1, 16), model.new_state(1, 4)
    with torch.no_grad():
        whole = model(more_bt, state=state).hidden_btd
        parts = []
        for size, part_bt in zip((4, 8, 16), more_bt.split([4, 4, 8], dim=1), strict=True):
            small.grow(size)
            small.grow(1)
            parts.append(model(part_bt, state=small).hidden_btd)
    close(torch.cat(parts, dim=1), whole)
    assert (small.capacity, small.nbytes()) == (16, state.nbytes())


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([name for name in CASES if "dape" not in name]),
    moves=st.lists(st.tuples(st.sampled_from(["join", "step", "leave", "trim"]), st.integers(0, 9)), max_size=12),
)
@torch.no_grad()
def test_any_order_of_joins_and_leaves(name: str, moves: list[tuple[str, int]]) -> None:
    model = build(name)
    state, rows = prompted(model, 5, 0), [tokens(5, 0)[0].tolist()]
    for number, (move, argument) in enumerate(moves):
        if move == "join" and len(rows) < 4:
            state = state.join(prompted(model, argument + 1, number))
            rows.append(tokens(argument + 1, number)[0].tolist())
        elif move == "leave" and len(rows) > 1:
            kept = [row for row in range(len(rows)) if row != argument % len(rows)]
            state, rows = state.select(torch.tensor(kept)), [rows[row] for row in kept]
        elif move == "trim":
            state.trim(state.length - max(map(len, rows)))
        elif move == "step" and state.length < CAPACITY:
            more_b1 = torch.tensor([[(argument + row) % VOCABULARY] for row in range(len(rows))])
            positions_b1 = torch.tensor([[len(row)] for row in rows])
            rows = [[*row, int(more)] for row, more in zip(rows, more_b1, strict=True)]
            hidden_b1d = model(more_b1, Span(positions_bt=positions_b1), state).hidden_btd
            for row, hidden_1d in zip(rows, hidden_b1d, strict=True):
                close(hidden_1d[-1], model(torch.tensor([row])).hidden_btd[0, -1])


@every_case
@torch.no_grad()
def test_bytes_of_a_state(name: str) -> None:
    model = build(name)
    sizes = {length: model.new_state(2, length, dtype=torch.float32).nbytes() for length in (64, 128)}
    per_token = 0
    for block in model._blocks():
        if getattr(block.mixer, "window", 0) is None:
            per_token += 2 * 4 * (block.mixer.key_shape[0] * block.mixer.key_shape[1])
            per_token += 2 * 4 * (block.mixer.value_shape[0] * block.mixer.value_shape[1])
    assert sizes[128] - sizes[64] == 64 * per_token
    half = model.new_state(1, 64, dtype=torch.float32)
    assert 2 * half.nbytes() == sizes[64]


def test_padding_belongs_nowhere() -> None:
    short, long = (KVCache(1, 8, (1, 2), (1, 2), None, "cpu", torch.float32) for _ in range(2))
    short.extend(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), None)
    long.extend(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2), torch.tensor([[0, 0, 7, 7, 7]]))
    both = short.join(long)
    assert both.segments_bs is not None
    assert both.segments_bs[:, :5].tolist() == [[NOWHERE] * 3 + [0, 0], [0, 0, 7, 7, 7]]


def test_full_rings_join_without_a_mask() -> None:
    caches = [KVCache(1, 20, (1, 2), (1, 2), 3, "cpu", torch.float32) for _ in range(2)]
    for cache, count in zip(caches, (4, 9), strict=True):
        for value in range(count):
            cache.extend(torch.full((1, 1, 1, 2), float(value)), torch.zeros(1, 1, 1, 2), None)
    both = caches[0].join(caches[1])
    assert both.segments_bs is None and both.length == 9
    assert both._held().k_bgcd[:, 0, :, 0].tolist() == [[1, 2, 3], [6, 7, 8]]


def test_refusals() -> None:
    model, other = build("attention"), build("window and full")
    state = prompted(model, 5, 0)
    with pytest.raises(ConfigError, match="holds 5 tokens: it cannot forget 6 and keep room for 24"):
        state.trim(6)
    with pytest.raises(ConfigError, match="cannot forget 1 and keep room for 3"):
        state.trim(1, capacity=3)
    three = DecoderState([*other.new_state(1, 4).layers, *other.new_state(1, 4).layers])
    with pytest.raises(ConfigError, match="different models"):
        state.join(three)
    with pytest.raises(ConfigError, match="holds 1 rows and 2 rows of tokens"):
        require_rows(state, 2)
    with pytest.raises(ConfigError, match="holds 1 rows and 3 rows of tokens"):
        model(torch.zeros(3, 1, dtype=torch.long), state=state)
