"""Continuous batches: every request receives what it would receive alone, whoever comes and goes around it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchstone.errors import ConfigError
from torchstone.models.continuous import Batcher, Completion, Request
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.models.generate import generate
from torchstone.models.sampling import Sampling
from torchstone.recipe.registry import parse_part

MODELS: dict[str, Any] = {
    "attention": {"block": {"mixer": "attention"}},
    "gqa window": {"block": {"mixer": {"kind": "attention", "kv_heads": 2, "window": 3}}},
    "differential": {"block": {"mixer": "differential"}},
    "differential v2 window": {"block": {"mixer": {"kind": "differential", "version": "v2", "window": 4}}},
    "kerple": {"block": {"mixer": {"kind": "attention", "position": "kerple"}}},
    "fire dape": {"block": {"mixer": {"kind": "attention", "position": "fire", "score_processor": "dape"}}},
    "moa": {"block": {"mixer": "moa"}},
    "rglru": {"block": {"mixer": "rglru"}},
    "hgrn2": {"block": {"mixer": "hgrn2"}},
    "RRA": {"depth": 3, "pattern": ["rglru", "rglru", {"kind": "local-attention", "window": 4}]},
    "HD": {"pattern": "HD"},
    "belief state": {"kind": "belief-state", "end_token": 3},
}
every_model = pytest.mark.parametrize("name", MODELS)
CHANCE = Sampling(temperature=1.2, top_k=20)


@cache
def build(name: str) -> Decoder:
    config = {"width": 32, "depth": 2, "head_dim": 8, "initialisation": {"kind": "normal", "std": 0.3}, **MODELS[name]}
    model: Any = parse_part("model", {"kind": "decoder", **config})
    return model.build(50, 16, 0).double().eval()


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: Decoder, request: Request) -> Completion:
    own = request.sampling
    if own.greedy:
        return generate(model, [request.prompt], max_new=request.max_new, greedy=True, stop=request.stop)[0]
    chance: dict[str, Any] = {"temperature": own.temperature, "top_k": own.top_k, "top_p": own.top_p}
    return generate(model, [request.prompt], max_new=request.max_new, stop=request.stop, seed=[request.seed], **chance)[
        0
    ]


def same(found: Completion, wanted: Completion) -> None:
    assert (found.tokens, found.finish_reason) == (wanted.tokens, wanted.finish_reason)
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-6)


def requests(count: int) -> list[Request]:
    """Prompts of 1 to 17 tokens, half of them drawn greedily, of different lengths to go."""
    return [
        Request(
            prompt(1 + 5 * n % 17, n), 1 + 3 * n % 7, Sampling(greedy=True) if n % 2 else CHANCE, ([n % 50],), seed=n
        )
        for n in range(count)
    ]


@every_model
@pytest.mark.parametrize(("max_rows", "prefill"), [(1, None), (3, 4), (8, 1), (3, 512)])
def test_every_request_receives_what_it_would_alone(name: str, max_rows: int, prefill: int | None) -> None:
    model, wanted = build(name), requests(9)
    batcher = Batcher(model, max_rows, prefill=prefill)
    assert [batcher.submit(request) for request in wanted] == list(range(9))
    found = dict(batcher.run())
    assert sorted(found) == list(range(9))
    for ticket, request in enumerate(wanted):
        same(found[ticket], alone(model, request))
    assert (batcher.waiting, batcher.present, batcher.nbytes()) == (0, 0, 0)


@every_model
@settings(max_examples=8, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=8),
    max_rows=st.integers(1, 4),
    prefill=st.sampled_from([1, 3, 8, None]),
)
def test_requests_that_arrive_at_any_time(
    name: str, arrivals: list[tuple[int, int, int]], max_rows: int, prefill: int | None
) -> None:
    model = build(name)
    batcher, given_, found = Batcher(model, max_rows, prefill=prefill), [], {}
    for number, (pause, length, max_new) in enumerate(arrivals):
        given_.append(Request(prompt(length, number), max_new, CHANCE, seed=number))
        batcher.submit(given_[-1])
        for _ in range(pause):
            found |= dict(batcher.step())
            assert batcher.present <= max_rows
    found |= dict(batcher.run())
    for ticket, request in enumerate(given_):
        same(found[ticket], alone(model, request))


def test_a_long_prompt_does_not_stall_the_others() -> None:
    model = build("attention")
    batcher = Batcher(model, 2, prefill=4)
    batcher.submit(Request(prompt(3, 0), 12, Sampling(greedy=True)))
    assert batcher.step() == [] and batcher.generated == 1
    batcher.submit(Request(prompt(40, 1), 2, Sampling(greedy=True)))
    for step in range(9):
        batcher.step()
        assert batcher.generated == 2 + step
    batcher.step()
    assert batcher.generated == 2 + 9 + 1
    assert len(dict(batcher.run())) == 2


def test_short_prompts_are_read_together() -> None:
    batcher = Batcher(build("attention"), 8, prefill=12)
    for number in range(5):
        batcher.submit(Request(prompt(3, number), 4))
    batcher.step()
    assert (batcher.present, batcher.waiting, batcher.generated) == (4, 1, 4)


@pytest.mark.parametrize("name", ["attention", "gqa window", "RRA"])
def test_a_long_lived_batch_does_not_grow(name: str) -> None:
    model = build(name)
    batcher = Batcher(model, 3, prefill=8)
    most = 3 * model.new_state(1, 18).nbytes() + 3 * 18 * 8 * len(model.blocks)  # keys, values, states and segments
    for number in range(60):
        batcher.submit(Request(prompt(1 + 7 * number % 10, number), 1 + 5 * number % 8, CHANCE, seed=number))
    steps = 0
    while batcher.waiting or batcher.present:
        batcher.step()
        steps += 1
        # while prompts are read, they and the rows that are in have a state each
        assert batcher.nbytes() <= most
        if batcher._state is not None:
            assert batcher._state.length == max(row.seen for row in batcher._rows) <= 18
            assert batcher._state.batch == len(batcher._rows) <= 3
    assert steps > 60


def test_rows_leave_at_once() -> None:
    batcher = Batcher(build("attention"), 4)
    for max_new in (1, 2, 5):
        batcher.submit(Request(prompt(4, max_new), max_new, CHANCE))
    counts = []
    finished = []
    while batcher.waiting or batcher.present:
        finished += [ticket for ticket, _ in batcher.step()]
        counts.append(batcher.present)
    assert (counts, finished) == ([2, 1, 1, 1, 0], [0, 1, 2])


def test_training_mode_is_kept() -> None:
    model = DecoderConfig.model_validate({"width": 16, "depth": 1, "head_dim": 8}).build(50, 16, 0).train()
    batcher = Batcher(model, 1)
    batcher.submit(Request([1, 2], 3))
    assert len(list(batcher.run())) == 1 and model.training


@pytest.mark.parametrize(
    ("settings_", "request_", "message"),
    [
        ({"max_rows": 0}, None, "max_rows is 0; it must be 1 or more"),
        ({"prefill": 0}, None, "prefill is 0; it must be 1 or more, or None"),
        ({"max_tokens": -1}, None, "max_tokens is -1"),
        (
            {"max_tokens": 8},
            Request([1] * 5, 4),
            "prompt 0 has 5 tokens and asks for 4 more: 9 are above max_tokens, 8",
        ),
        ({}, Request([], 4), "prompt 0 is empty"),
        ({}, Request([50], 4), "holds token 50"),
        ({}, Request([1], 0), "at least one token"),
        ({}, Request([1], 2, stop=[[]]), "stop sequence is empty"),
    ],
)
def test_refusals(settings_: dict[str, Any], request_: Request | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        batcher = Batcher(build("attention"), **{"max_rows": 2, **settings_})
        if request_ is not None:
            batcher.submit(request_)
