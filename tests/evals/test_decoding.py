"""What is measured is what decoding does: contexts of the right length, real caches, honest times and bytes."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import count
from typing import Any

import pytest
import torch
from families import tiny_model
from subjects import byte_subject
from torch.utils.flop_counter import FlopCounterMode

from torchstone.diagnose.adapters import open_subject
from torchstone.errors import ConfigError
from torchstone.evals.decoding import (
    CachedHuggingFace,
    DecodingCost,
    cached,
    decoding_costs,
    decoding_flops,
    tensor_bytes,
)
from torchstone.evals.decoding_finding import decoding_finding
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.attention.observe import observe

QUICK: dict[str, Any] = {"steps": 6, "warm": 2, "prefill": 16}


def build(**model: Any) -> Decoder:
    config = {"width": 32, "depth": 2, "head_dim": 8, **model}
    return DecoderConfig.model_validate(config).build(40, 16, 0).eval()


class Watched:
    """A model that notes how many tokens each pass reads and how many its state then holds."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.passes = model, list[tuple[int, int]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, tokens_bt: torch.Tensor, **options: Any) -> Any:
        output = self.model(tokens_bt, **options)
        self.passes.append((tokens_bt.shape[1], output.state.length))
        return output


def test_a_measurement_ends_at_its_length() -> None:
    watched, ticks = Watched(build()), count()
    costs = decoding_costs(watched, (40, 24), clock=lambda: float(next(ticks)), **QUICK)
    single = [(1, end) for end in range(17, 25)]
    assert watched.passes == [(16, 16), *single, (8, 32), *[(1, end) for end in range(33, 41)]]
    assert [(cost.length, cost.rows, len(cost.seconds_n)) for cost in costs] == [(24, 1, 6), (40, 1, 6)]
    assert all(cost.seconds_n.tolist() == [1.0] * 6 for cost in costs)
    assert (costs[0].milliseconds, costs[0].tokens_per_second) == (1000.0, 1.0)


def test_rounds_rows_and_single_passes() -> None:
    watched = Watched(build())
    costs = decoding_costs(watched, (20, 40), rows=3, rounds=2, steps=6, warm=2, prefill=None)
    assert [len(cost.seconds_n) for cost in costs] == [12, 12]
    assert [length for length, _ in watched.passes if length > 1] == [12, 32, 12, 32]
    assert [cost.state_bytes for cost in costs] == [watched.model.new_state(3, n).nbytes() for n in (20, 40)]


@pytest.mark.parametrize(
    "model",
    [
        {"block": {"mixer": {"kind": "attention", "window": 8}}},
        {"block": {"mixer": "rglru"}},
        {"block": {"mixer": "hgrn2"}},
        {"depth": 3, "pattern": ["rglru", "rglru", {"kind": "local-attention", "window": 8}]},
    ],
    ids=str,
)
def test_bounded_states_have_the_same_bytes_at_every_length(model: dict[str, Any]) -> None:
    short, long = decoding_costs(build(**model), (32, 256), **QUICK)
    assert short.state_bytes == long.state_bytes == build(**model).new_state(1, 64).nbytes()


def test_attention_has_bytes_for_every_token() -> None:
    short, long = decoding_costs(build(), (32, 256), **QUICK)
    assert (short.state_bytes, long.state_bytes) == (2 * 4 * 2 * 32 * 32, 2 * 4 * 2 * 32 * 256)


@pytest.mark.parametrize(("family", "per_token"), [("Llama", 2 * 2 * 2 * 8 * 4), ("GPTNeoX", 2 * 2 * 4 * 8 * 4)])
def test_bytes_of_a_cache_of_transformers(family: str, per_token: int) -> None:
    costs = decoding_costs(tiny_model(family), (24, 48), **QUICK)
    assert [cost.state_bytes for cost in costs] == [24 * per_token, 48 * per_token]


def test_a_sliding_cache_of_transformers_is_flat() -> None:
    short, long = decoding_costs(tiny_model("Mistral"), (24, 48), **QUICK)
    assert short.state_bytes == long.state_bytes
    assert 0 <= short.state_bytes - 2 * 2 * 2 * 8 * 5 * 4 < 64  # keys and values of 5 old tokens, and its own counters


def test_a_model_of_transformers_decodes_what_it_would_read() -> None:
    model, tokens_bt = tiny_model("Llama"), torch.arange(20)[None] % 48
    engine = cached(model)
    assert isinstance(engine, CachedHuggingFace)
    engine.begin(1)
    with torch.no_grad():
        engine.read(tokens_bt[:, :12], 20)
        for place in range(12, 20):
            logits_bv = engine.read(tokens_bt[:, place : place + 1], 20)
        torch.testing.assert_close(logits_bv, model(tokens_bt).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_states_on_modules_are_counted() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RecurrentGemmaConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, lru_width=32,
        intermediate_size=64, attention_window_size=8,
    )  # fmt: skip
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    short, long = decoding_costs(model, (24, 48), steps=6, warm=2, prefill=None)
    assert short.state_bytes == long.state_bytes
    recurrent, attention = 2 * (32 + 3 * 32) * 4, 2 * 7 * 8 * 4  # two layers of states; one of keys and values
    assert 0 <= short.state_bytes - recurrent - attention < 64


def test_tensors_are_counted_once_wherever_they_are() -> None:
    class Holder:
        def __init__(self) -> None:
            self.own = torch.zeros(3)
            self.more = {"twice": self.own, "list": [torch.zeros(2, dtype=torch.int64), (torch.zeros(5),)]}
            self.me, self.words, self.nothing = self, "text", None

    assert tensor_bytes(Holder()) == 4 * 3 + 8 * 2 + 4 * 5
    assert tensor_bytes([torch.nn.Linear(4, 4), None]) == 0


@pytest.mark.parametrize("window", [None, 8])
def test_flops_of_a_step_are_those_that_torch_counts(window: int | None) -> None:
    model = build(block={"mixer": {"kind": "attention", "window": window}})
    state, tokens_bt = model.new_state(1, 25), torch.zeros(1, 24, dtype=torch.long)
    with torch.no_grad():
        model(tokens_bt, state=state)
        with ExitStack() as stack:  # torch counts no attention in its fused CPU kernels
            for block in model.blocks:
                stack.enter_context(observe(block.mixer))
            counter = stack.enter_context(FlopCounterMode(display=False))
            model.logits(model(tokens_bt[:, :1], state=state).hidden_btd)
    assert decoding_flops(model, 25) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize(
    ("lengths", "change", "message"),
    [
        ((), {}, "lie too close"),
        ((8,), {}, "start above 8"),
        ((24, 30), {}, "lie too close"),
        ((64,), {"steps": 0}, "steps is 0"),
        ((64,), {"rows": 0}, "rows is 0"),
        ((64,), {"rounds": 0}, "rounds is 0"),
        ((64,), {"warm": -1}, "warm is -1"),
        ((64,), {"prefill": 0}, "prefill is 0"),
    ],
)
def test_refusals(lengths: tuple[int, ...], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decoding_costs(build(), lengths, **{**QUICK, **change})


def test_what_cannot_decode_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear cannot decode step by step"):
        cached(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="cannot read 128 tokens"):
        decoding_costs(tiny_model("GPT2"), (128,), **QUICK)


def test_the_finding_of_a_decoder() -> None:
    subject = byte_subject(pattern=[{"kind": "attention", "window": 8}, {"kind": "attention"}])
    finding = decoding_finding(subject, lengths=(64, 128), steps=8)
    table, sizes_in_bytes = finding.tables
    assert [row[0] for row in table.rows] == [17, 64, 128]
    per_token, ring = 2 * 4 * 16, 8 * 2 * 4 * 16
    assert [row[1] for row in sizes_in_bytes.rows] == [length * per_token + ring for length in (17, 64, 128)]
    assert [row[1:3] for row in table.rows] == [
        ("3.12 KiB", "188 B"), ("9 KiB", "144 B"), ("17 KiB", "136 B")
    ]  # fmt: skip
    for row in table.rows:
        assert row[4] <= row[3] <= row[5] and row[6] == pytest.approx(1000 / row[3])
    assert "1.89 times the bytes (grows)" in finding.answer
    assert "17 tokens" in finding.control
    sizes, speeds = finding.figures
    assert sizes.lines[0].y == tuple(row[2] for row in sizes_in_bytes.rows)
    assert all(
        low <= y <= high
        for low, y, high in zip(speeds.lines[0].low, speeds.lines[0].y, speeds.lines[0].high, strict=True)
    )


def test_the_finding_of_a_model_of_transformers() -> None:
    finding = decoding_finding(open_subject(tiny_model("Mistral")), lengths=(48, 96), steps=8, rows=2)
    assert "1.00 times the bytes (flat within 10 %)" in finding.answer
    assert "2 sequences at a time" in finding.notes[0]


def test_the_finding_knows_the_limits_of_positions() -> None:
    subject = open_subject(tiny_model("GPT2"))
    with pytest.raises(ConfigError, match="learned table of 64 positions and cannot read 100"):
        decoding_finding(subject, lengths=(32, 100), steps=4)
    with pytest.raises(ConfigError, match="start below 26"):
        decoding_finding(subject, lengths=(20,), steps=4)
    with pytest.raises(ConfigError, match="start below 26"):
        decoding_finding(subject, steps=4)


def test_a_cost_in_numbers() -> None:
    import numpy as np

    cost = DecodingCost(64, 2, 100, np.array([0.004, 0.001, 0.002, 0.003, 0.009]))
    assert cost.quartiles == pytest.approx((2.0, 3.0, 4.0))
    assert cost.tokens_per_second == pytest.approx(2 / 0.003)
