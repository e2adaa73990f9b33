"""What a token costs to generate after a long context: seconds, bytes of the decoding state, FLOPs.

    costs = decoding_costs(model, (4096, 32768))        # a torchstone model, or a causal language model of transformers
    costs[-1].milliseconds / costs[0].milliseconds      # 1.0 where context is free

The context is made of random tokens, because time and memory do not depend on what is read. It is read in chunks, then tokens
are decoded one by one, and each step is timed: its forward pass and the logits of the next token. A measurement at length L
ends with exactly L tokens in the state.

Shapes: b rows · t tokens · v vocabulary.

Pitfalls: seconds are of this machine and whatever else runs on it; compare medians of one run, and look at the quartiles.
Bytes of a torchstone state are those of a state with room for L tokens; of transformers' caches, those of all tensors that
the cache holds, and of tensors that the model's modules have taken on while reading (RecurrentGemma keeps its states there).
"""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.models.continuous import PREFILL

WARM, STEPS = 8, 64


@dataclass(frozen=True, eq=False)
class DecodingCost:
    """Cost of generation at one context length.

    Attributes:
        length: tokens in the state of each row at the end of the measurement.
        rows: sequences that are decoded together.
        state_bytes: of the state of all rows.
        seconds_n: fp64, each timed step.
    """

    length: int
    rows: int
    state_bytes: int
    seconds_n: NDArray[np.float64]

    @property
    def milliseconds(self) -> float:
        """Median time of a step, which gives every row a token."""
        return self.quartiles[1]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Quartiles of a step's milliseconds."""
        low, middle, high = np.quantile(1000 * self.seconds_n, (0.25, 0.5, 0.75)).tolist()
        return low, middle, high

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows per second, at the median."""
        return 1000 * self.rows / self.milliseconds


class Cached(ABC):
    """A model with the state of some rows that it is decoding."""

    vocab_size: int
    device: torch.device

    @abstractmethod
    def begin(self, rows: int) -> None:
        """Forget everything; the next tokens are the first."""

    @abstractmethod
    def read(self, tokens_bt: Tensor, room: int) -> Tensor:
        """Logits [b, v] after more tokens; `room` is how many the state will have to hold before the next measurement."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the state."""


class CachedDecoder(Cached):
    """A torchstone model with its decoding state."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocab_size, self.device = model.vocab_size, model.embed.weight.device

    def begin(self, rows: int) -> None:
        """See `Cached`."""
        self.rows, self.state = rows, self.model.new_state(rows, 1)

    def read(self, tokens_bt: Tensor, room: int) -> Tensor:
        """See `Cached`."""
        self.state.grow(room)
        hidden_btd = self.model(tokens_bt, state=self.state).hidden_btd
        logits_bv: Tensor = self.model.logits(hidden_btd[:, -1])
        return logits_bv

    def nbytes(self) -> int:
        """See `Cached`."""
        return self.state.nbytes()


class CachedHuggingFace(Cached):
    """A causal language model of transformers with its cache."""

    def __init__(self, model: Any) -> None:
        self.model, self.vocab_size = model, model.config.get_text_config().vocab_size
        self.device = next(model.parameters()).device
        settings = inspect.signature(model.forward).parameters
        self.name = "cache_params" if "cache_params" in settings else "past_key_values"
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in settings else {}

    def begin(self, rows: int) -> None:
        """See `Cached`."""
        self.cache: Any = None
        self.kept = {id(tensor) for tensor in _tensors_of_modules(self.model)}

    def read(self, tokens_bt: Tensor, room: int) -> Tensor:
        """See `Cached`; transformers' caches find room as they need it."""
        first = self.cache is None
        output = self._pass(tokens_bt)
        self.cache = getattr(output, self.name, None) or self.cache
        if first and self.cache is None:  # some models fill a cache that they are given, and return none
            from transformers import DynamicCache

            self.cache = DynamicCache(config=self.model.config.get_text_config())
            output = self._pass(tokens_bt)
        logits_bv: Tensor = output.logits[:, -1]
        return logits_bv

    def _pass(self, tokens_bt: Tensor) -> Any:
        return self.model(input_ids=tokens_bt, use_cache=True, **{self.name: self.cache}, **self.options)

    def nbytes(self) -> int:
        """See `Cached`."""
        taken_on = [tensor for tensor in _tensors_of_modules(self.model) if id(tensor) not in self.kept]
        return tensor_bytes([self.cache, taken_on])


def _tensors_of_modules(model: nn.Module) -> list[Tensor]:
    """Tensors that modules hold as plain attributes, neither parameters nor buffers."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]


def tensor_bytes(holder: Any) -> int:
    """Bytes of all different tensors that an object holds, however deep in lists, mappings and attributes."""
    tensors = {id(tensor): tensor for tensor in _tensors_in(holder, set())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors_in(holder: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(holder, Tensor):
        yield holder
        return
    if id(holder) in seen or isinstance(holder, str | bytes | int | float | type | nn.Module | None):
        return
    seen.add(id(holder))
    if isinstance(holder, dict):
        inside: list[Any] = list(holder.values())
    elif isinstance(holder, list | tuple | set):
        inside = list(holder)
    else:
        inside = list(getattr(holder, "__dict__", {}).values())
    for value in inside:
        yield from _tensors_in(value, seen)


def cached(model: Any) -> Cached:
    """The model with a state to decode in.

    Raises:
        ConfigError: neither a torchstone model nor a causal language model of transformers.
    """
    if hasattr(model, "new_state") and hasattr(model, "logits"):
        return CachedDecoder(model)
    if hasattr(model, "config") and "use_cache" in inspect.signature(model.forward).parameters:
        return CachedHuggingFace(model)
    raise ConfigError(
        f"{type(model).__name__} cannot decode step by step: it is neither a torchstone model nor a causal language model "
        "of transformers that takes use_cache; give one of those."
    )


@torch.no_grad()
def decoding_costs(
    model: Any,
    lengths: Sequence[int],
    *,
    rows: int = 1,
    steps: int = STEPS,
    warm: int = WARM,
    rounds: int = 1,
    prefill: int | None = PREFILL,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[DecodingCost]:
    """Costs at several context lengths, in ascending order.

    Args:
        model: a torchstone model, or a causal language model of transformers, in evaluation mode.
        lengths: tokens in the state at the end of each measurement.
        rows: sequences that are decoded together.
        steps, warm: tokens whose time is taken at each length, and tokens before them whose time is not.
        rounds: how often all lengths are measured, in turns; their steps are put together.
        prefill: tokens that are read at once; None reads each context anew in a single pass, for models that cannot go on
            from a state with several tokens.
        seed: of the random tokens.
        clock: seconds that go on.

    Raises:
        ConfigError: lengths that are too close to each other, too long for the model, or another number below 1.
    """
    wanted = tuple(sorted(set(lengths)))
    _check(wanted, rows, steps, warm, rounds, prefill)
    engine = cached(model)
    generator = torch.Generator().manual_seed(seed)
    tokens_bt = torch.randint(0, engine.vocab_size, (rows, wanted[-1]), generator=generator).to(engine.device)
    seconds: dict[int, list[float]] = {length: [] for length in wanted}
    state_bytes: dict[int, int] = {}
    for _ in range(rounds):
        engine.begin(rows)
        done = 0
        for length in wanted:
            if prefill is None:
                engine.begin(rows)
                done = 0
            _read(engine, tokens_bt[:, done : length - steps - warm], prefill, length)
            for place in range(length - steps - warm, length):
                taken = _timed_step(engine, tokens_bt[:, place : place + 1], length, clock)
                if place >= length - steps:
                    seconds[length].append(taken)
            done, state_bytes[length] = length, engine.nbytes()
    return [DecodingCost(length, rows, state_bytes[length], np.array(seconds[length])) for length in wanted]


def _check(wanted: tuple[int, ...], rows: int, steps: int, warm: int, rounds: int, prefill: int | None) -> None:
    for name, value, least in (("rows", rows, 1), ("steps", steps, 1), ("warm", warm, 0), ("rounds", rounds, 1)):
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be {least} or more.")
    if prefill is not None and prefill < 1:
        raise ConfigError(f"prefill is {prefill}; it must be 1 or more, or None to read each context in a single pass.")
    gaps = [after - before for before, after in zip((0, *wanted), wanted, strict=False)]
    if not gaps or min(gaps) <= steps + warm:
        raise ConfigError(
            f"context lengths {list(wanted)} lie too close: each measurement decodes {steps + warm} tokens and reads others "
            f"before them, so lengths start above {steps + warm} and are further apart than that; give other lengths or "
            "fewer steps."
        )


def _read(engine: Cached, tokens_bt: Tensor, prefill: int | None, room: int) -> None:
    for part_bt in tokens_bt.split(prefill or tokens_bt.shape[1], dim=1):
        try:
            engine.read(part_bt, room)
        except IndexError as error:
            raise ConfigError(
                f"the model cannot read {room} tokens: it has a learned table of positions, or another fixed limit. Give "
                "lengths within its longest context."
            ) from error


def _timed_step(engine: Cached, tokens_b1: Tensor, room: int, clock: Callable[[], float]) -> float:
    """Seconds of one step of every row, until its next token is known."""
    begun = clock()
    engine.read(tokens_b1, room).argmax(dim=-1).tolist()  # the list waits for the device
    return clock() - begun


def decoding_flops(model: Any, length: int) -> float:
    """FLOPs of a torchstone model for one more token with `length` tokens in the state; windows see no more than they hold."""
    blocks = sum(block.flops(min(length, getattr(block.mixer, "window", None) or length)) for block in model.blocks)
    return float(blocks + model.head.flops())
