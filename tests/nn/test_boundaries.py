"""Where documents start for a recurrence, in one call or over several, with padding anywhere; and its state."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstone.errors import ConfigError
from torchstone.nn.recurrence.boundaries import Boundaries, boundaries
from torchstone.nn.recurrence.state import UNSEEN, RecurrentState, require_tensors
from torchstone.nn.span import Span
from torchstone.nn.state import KVCache

CPU = torch.device("cpu")


def new_state(rows: int, capacity: int = 100) -> RecurrentState:
    return RecurrentState({"h": torch.zeros(rows, 3)}, capacity)


def expected_starts(segments: list[int]) -> list[bool]:
    """One row, token by token."""
    last, starts = UNSEEN, []
    for segment in segments:
        starts.append(segment >= 0 and segment != last)
        last = segment if segment >= 0 else last
    return starts


def run(segments: list[list[int]], cuts: list[int]) -> torch.Tensor:
    """Starts of all tokens, given piece by piece."""
    segments_bt = torch.tensor(segments)
    state, found, begin = new_state(len(segments)), [], 0
    for end in [*cuts, segments_bt.shape[1]]:
        piece = segments_bt[:, begin:end]
        span = Span(documents_bt=piece.clamp_min(0), valid_bt=piece >= 0)
        seen = boundaries(span, len(segments), end - begin, state, CPU)
        found.append(seen.starts_bt.expand(len(segments), end - begin))
        state.advance(end - begin, seen.last_b, h=state.tensors["h"])
        begin = end
    return torch.cat(found, dim=1)


@given(
    rows=st.integers(1, 3).flatmap(
        lambda n: st.integers(2, 8).flatmap(
            lambda t: st.lists(st.lists(st.integers(-1, 2), min_size=t, max_size=t), min_size=n, max_size=n)
        )
    ),
    data=st.data(),
)
def test_starts_are_those_of_reading_token_by_token(rows: list[list[int]], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows[0]) - 1))))
    assert run(rows, cuts).tolist() == [expected_starts(row) for row in rows]


def test_without_documents_only_the_first_token_is_a_start() -> None:
    plain = boundaries(Span(), 2, 4, None, CPU)
    assert plain.plain and plain.valid_bt is None and plain.starts_bt.tolist() == [[True, False, False, False]]
    state = new_state(2)
    first = boundaries(Span(), 2, 3, state, CPU)
    assert first.starts_bt.tolist() == [[True, False, False]] * 2
    state.advance(3, first.last_b, h=state.tensors["h"])
    assert not boundaries(Span(), 2, 2, state, CPU).starts_bt.any()


def test_left_padding_then_plain_tokens_is_one_document() -> None:
    state = new_state(2)
    valid_bt = torch.tensor([[False, False, True], [True, True, True]])
    seen = boundaries(Span(valid_bt=valid_bt), 2, 3, state, CPU)
    assert seen.starts_bt.tolist() == [[False, False, True], [True, False, False]]
    state.advance(3, seen.last_b, h=state.tensors["h"])
    assert not boundaries(Span(), 2, 1, state, CPU).starts_bt.any()


def test_positions_that_restart_need_documents() -> None:
    positions_bt = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ConfigError, match="positions restart within a row"):
        boundaries(Span(positions_bt=positions_bt), 1, 5, None, CPU)
    documents_bt = torch.tensor([[0, 0, 0, 1, 1]])
    span = Span(positions_bt=positions_bt, documents_bt=documents_bt)
    assert boundaries(span, 1, 5, None, CPU).starts_bt.tolist() == [[True, False, False, True, False]]
    left_padded = Span(positions_bt=torch.tensor([[0, 0, 0, 1]]), valid_bt=torch.tensor([[False, False, True, True]]))
    assert isinstance(boundaries(left_padded, 1, 4, None, CPU), Boundaries)


ONE, GONE = True, False
PADDED = {  # positions, visible, whether a visible token stands at or below an earlier one
    "right, as a clamped count gives it": ([0, 1, 2, 3, 3, 3], [ONE, ONE, ONE, ONE, GONE, GONE], False),
    "right, zeros": ([0, 1, 2, 3, 0, 0], [ONE, ONE, ONE, ONE, GONE, GONE], False),
    "left": ([0, 0, 0, 1, 2, 3], [GONE, GONE, ONE, ONE, ONE, ONE], False),
    "between": ([0, 1, 1, 0, 2, 3], [ONE, ONE, GONE, GONE, ONE, ONE], False),
    "high between": ([0, 1, 9, 9, 2, 3], [ONE, ONE, GONE, GONE, ONE, ONE], False),
    "a restart behind padding": ([0, 1, 0, 0, 0, 1], [ONE, ONE, GONE, GONE, ONE, ONE], True),
    "a restart that high padding hides": ([0, 1, 2, -1, 1, 2], [ONE, ONE, ONE, GONE, ONE, ONE], True),
    "a restart before padding": ([0, 1, 0, 1, 1, 1], [ONE, ONE, ONE, ONE, GONE, GONE], True),
    "nothing visible": ([0, 0, 0, 0, 0, 0], [GONE] * 6, False),
}


@pytest.mark.parametrize("name", PADDED)
def test_positions_of_padding_do_not_count(name: str) -> None:
    positions, visible, restarts = PADDED[name]
    plain = torch.arange(6)
    span = Span(positions_bt=torch.tensor([positions, plain.tolist()]), valid_bt=torch.tensor([visible, [ONE] * 6]))
    if restarts:
        with pytest.raises(ConfigError, match="positions restart within a row"):
            boundaries(span, 2, 6, None, CPU)
    else:
        assert boundaries(span, 2, 6, None, CPU).valid_bt is not None


def test_one_row_of_padding_or_documents_serves_all_rows() -> None:
    seen = boundaries(Span(valid_bt=torch.tensor([[GONE, ONE, ONE]])), 2, 3, new_state(2), CPU)
    assert seen.starts_bt.tolist() == [[False, True, False]] * 2 and seen.last_b.tolist() == [0, 0]
    seen = boundaries(Span(documents_bt=torch.tensor([[3, 3, 4]])), 2, 3, None, CPU)
    assert seen.starts_bt.tolist() == [[True, False, True]] * 2 and seen.last_b.tolist() == [4, 4]


def test_patterns_of_visibility_are_refused() -> None:
    with pytest.raises(ConfigError, match="reads tokens in order"):
        boundaries(Span(allowed_bts=torch.ones(3, 3, dtype=torch.bool)), 1, 3, None, CPU)


def test_state_counts_its_bytes_and_its_room() -> None:
    state = new_state(2, capacity=4)
    assert state.nbytes() == 2 * 3 * 4 + 2 * 8
    h_bd = torch.randn(2, 3, requires_grad=True)
    state.advance(3, torch.tensor([0, 5]), h=h_bd)
    assert not state.tensors["h"].requires_grad and state.length == 3
    with pytest.raises(ConfigError, match="holds 3 of 4 tokens and 2 more"):
        state.advance(2, torch.tensor([0, 5]), h=h_bd)


def test_a_state_keeps_nothing_but_itself() -> None:
    state, long_btd = new_state(2), torch.randn(2, 4000, 3)
    for value in (long_btd[:, -1], long_btd[:, -1].bfloat16()):
        state.advance(1, torch.tensor([0, 0]), h=value)
        assert torch.equal(state.tensors["h"], value.float())
        assert state.tensors["h"].untyped_storage().nbytes() == 2 * 3 * 4
    own_bd = torch.randn(2, 3)
    state.advance(1, torch.tensor([0, 0]), h=own_bd)
    assert state.tensors["h"].data_ptr() == own_bd.data_ptr()


def test_states_of_another_kind_are_refused() -> None:
    due, places = {"h": (2, 3)}, (torch.device("cpu"), torch.float32)
    require_tensors(new_state(2), "a mixer", due, fine=("h",))
    wrong = {
        r"h \(3, 3\) in float32 was given": new_state(3),
        r"h \(2, 3\) in bfloat16 was given": RecurrentState({"h": torch.zeros(2, 3, dtype=torch.bfloat16)}, 9),
        r"s \(2, 3\) in float32 was given": RecurrentState({"s": torch.zeros(2, 3)}, 9),
        "a KVCache was given": KVCache(2, 9, (1, 4), (1, 4), None, *places),
    }
    for message, state in wrong.items():
        with pytest.raises(ConfigError, match=rf"state of a mixer is h \(2, 3\) in fp32 here, and {message}"):
            require_tensors(state, "a mixer", due, fine=("h",))


def test_rows_are_selected_and_joined() -> None:
    state, other = new_state(3), new_state(1, capacity=200)
    state.advance(5, torch.tensor([0, 1, 2]), h=torch.arange(9.0).view(3, 3))
    other.advance(7, torch.tensor([9]), h=torch.full((1, 3), -1.0))
    before = copy.deepcopy(state)
    both = state.select(torch.tensor([2, 0])).join(other)
    assert (both.batch, both.length, both.capacity) == (3, 7, 200)
    assert both.documents_b.tolist() == [2, 0, 9]
    assert both.tensors["h"][:, 0].tolist() == [6.0, 0.0, -1.0]
    both.tensors["h"].zero_()
    assert torch.equal(state.tensors["h"], before.tensors["h"])
