"""What a token costs to generate against the length of the context, as a finding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError
from torchstone.evals.decoding import STEPS, WARM, DecodingCost, decoding_costs
from torchstone.models.continuous import PREFILL
from torchstone.report import numbers
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, Table

LENGTHS = (512, 1024, 2048, 4096, 8192)
FLAT = 0.1


def decoding_finding(
    subject: Subject,
    *,
    lengths: tuple[int, ...] | None = None,
    rows: int = 1,
    steps: int = STEPS,
    rounds: int = 1,
    prefill: int = PREFILL,
    seed: int = 0,
) -> Finding:
    """Time per token and bytes of the decoding state at several context lengths.

    Args:
        subject: the model.
        lengths: context lengths in tokens, at least 73 apart (with 64 steps); default: 512 to 8192, as far as the model's
            positions reach.
        rows: sequences that are decoded together.
        steps: tokens whose time is taken at each length.
        rounds: how often all lengths are measured, in turns.
        prefill: tokens that are read at once; 0 reads every context anew in a single pass, for models that cannot go on
            from a state with several tokens.
        seed: of the random tokens that the context is made of.

    Raises:
        ConfigError: lengths that are too close to each other or too long for the model.
    """
    shortest = steps + WARM + 1
    limit = subject.max_length if all(layer.rotation is None for layer in subject.layers) else None
    wanted = _lengths(subject, lengths, limit, shortest)
    costs = decoding_costs(
        subject.model, (shortest, *wanted), rows=rows, steps=steps, rounds=rounds, prefill=prefill or None, seed=seed
    )
    empty, measured = costs[0], costs[1:]
    return Finding(
        analysis="decoding",
        title="What a token costs to generate after a long context",
        question="How do the time per token and the state's memory grow with the context?",
        subject=subject.describe(),
        answer=_answer(empty, measured),
        control=f"The same steps after {empty.length} tokens, where the state is almost empty: {empty.milliseconds:.3g} ms a "
        "step is what the weights alone cost. What a longer context adds to that is the price of its state.",
        tables=(_table(costs), _bytes_table(costs)),
        figures=_figures(costs),
        notes=(
            f"{rows} sequence{'s' * (rows > 1)} at a time, {steps} timed steps after {WARM} others, rounds: {rounds}. "
            f"Times are medians with quartiles on {_device(subject)}, with whatever else runs on the machine.",
            "The context is random tokens: neither time nor memory depends on what is read (experts that tokens choose "
            "excepted).",
            "Bytes of the state: all tensors that the model keeps between steps, in the type that it keeps them in.",
        ),
    )


def _lengths(subject: Subject, lengths: tuple[int, ...] | None, limit: int | None, shortest: int) -> tuple[int, ...]:
    wanted = tuple(sorted(set(lengths if lengths is not None else LENGTHS)))
    if lengths is None and limit is not None:
        wanted = tuple(length for length in wanted if length <= limit)
    if not wanted or wanted[0] < 2 * shortest:
        raise ConfigError(
            f"context lengths {list(wanted)} start below {2 * shortest}, twice the tokens that a measurement decodes; give "
            "longer ones (--lengths), or fewer steps (--steps)."
        )
    if limit is not None and wanted[-1] > limit:
        raise ConfigError(
            f"{subject.name} has a learned table of {limit} positions and cannot read {wanted[-1]} tokens; give lengths of "
            f"at most {limit}."
        )
    return wanted


def _device(subject: Subject) -> str:
    device = subject.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the {device.type} with {torch.get_num_threads()} threads"


def _answer(empty: DecodingCost, measured: list[DecodingCost]) -> str:
    first, last = measured[0], measured[-1]
    added = last.milliseconds - empty.milliseconds
    sentence = (
        f"After {last.length:,} tokens a step takes {last.milliseconds:.3g} ms ({added:+.3g} ms against an almost empty state), "
        f"and the state of a sequence has {_bytes(last)}."
    )
    if first is last:
        return sentence
    times, sizes = last.milliseconds / first.milliseconds, last.state_bytes / first.state_bytes
    (low, _, high), (lower, _, higher) = first.quartiles, last.quartiles
    spread = low <= higher and lower <= high and abs(times - 1) > FLAT
    word = "no more than single steps differ" if spread else _word(times)
    return (
        f"{sentence} Against {first.length:,} tokens of context that is {times:.2f} times the time per token ({word}) "
        f"and {sizes:.2f} times the bytes ({_word(sizes)})."
    )


def _word(ratio: float) -> str:
    return "flat within 10 %" if abs(ratio - 1) <= FLAT else "grows" if ratio > 1 else "falls"


def _bytes(cost: DecodingCost) -> str:
    return numbers.size(cost.state_bytes / cost.rows)


def _table(costs: list[DecodingCost]) -> Table:
    rows = []
    for cost in costs:
        (low, middle, high), size = cost.quartiles, _bytes(cost)
        each = numbers.size(cost.state_bytes / cost.rows / cost.length)
        rows.append((cost.length, size, each, middle, low, high, cost.tokens_per_second))
    return Table(
        title="Cost by context length",
        columns=("context", "state", "per token", "ms/step", "low", "high", "tokens/s"),
        rows=tuple(rows),
        note="Context in tokens; state of one sequence, and its share for each token of context; median and quartiles (low, "
        "high) of the milliseconds of a step.",
    )


def _bytes_table(costs: list[DecodingCost]) -> Table:
    """The state's bytes in full, for who computes with them."""
    rows = tuple((cost.length, cost.state_bytes, cost.state_bytes // cost.rows) for cost in costs)
    return Table(title="State in bytes", columns=("context", "bytes", "bytes per sequence"), rows=rows)


def _figures(costs: list[DecodingCost]) -> tuple[Figure, ...]:
    x = tuple(float(cost.length) for cost in costs)

    def figure(title: str, label: str, value: Callable[[DecodingCost], float], **band: Any) -> Figure:
        line = Line(name=label.partition(" (")[0], x=x, y=tuple(map(value, costs)), **band)
        return Figure(title=title, x_label="context length (tokens)", y_label=label, log_x=True, lines=(line,))

    def speed(quartile: int) -> tuple[float, ...]:
        return tuple(1000 * cost.rows / cost.quartiles[quartile] for cost in costs)

    return (
        figure("State size", "state (bytes per sequence)", lambda cost: cost.state_bytes / cost.rows),
        figure("Decoding speed", "speed (tokens/s)", lambda cost: cost.tokens_per_second, low=speed(2), high=speed(0)),
    )
