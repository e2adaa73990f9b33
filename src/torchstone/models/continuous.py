"""Continuous batches: prompts enter a running batch as soon as a row is free, and leave it at once when they are done.

    batcher = Batcher(model, max_rows=8)
    tickets = [batcher.submit(Request(prompt, max_new=64)) for prompt in prompts]
    for ticket, completion in batcher.run(): ...

Every request receives what it would receive alone (with its own sampling and seed), up to float error: rows never see each
other, and each draws from a random stream of its own.

A step gives one token to every row that is in, then reads some tokens of the next prompts, at most `prefill`, so that a long
prompt delays the others by one chunk at a time. Short prompts are read together, padded on the left. The state of finished
rows is dropped at once, and so are columns in front that only they used: a batch never holds more columns than its longest
present request has tokens, however long it runs.

Shapes: b rows · t tokens · v vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder
from torchstone.models.sampling import Sampling, choose_each
from torchstone.nn.initialisation import generator_for
from torchstone.nn.span import Span
from torchstone.nn.state import DecoderState

PADDING = 0  # any valid id; padding is invisible
PREFILL = 512


@dataclass(frozen=True)
class Request:
    """One prompt and what to do with it.

    Attributes:
        prompt: token ids, at least one.
        max_new: tokens to generate at most.
        sampling: how tokens are chosen.
        stop: token sequences that end the completion. They must lie within the generated part and are removed.
        seed, stream: number and name of the random stream that tokens are drawn from.
    """

    prompt: Sequence[int]
    max_new: int
    sampling: Sampling = Sampling()
    stop: Sequence[Sequence[int]] = ()
    seed: int = 0
    stream: str = "generate prompt"


@dataclass(frozen=True)
class Completion:
    """What a prompt received.

    Attributes:
        tokens: generated ids, without a stop sequence that ended them.
        text: for callers that have a tokenizer; None here.
        finish_reason: `stop` or `length`.
        logprobs: ln probability of each token under the model itself (temperature 1, nothing cut off).
    """

    tokens: list[int]
    text: str | None
    finish_reason: Literal["stop", "length"]
    logprobs: list[float]


@dataclass
class _Row:
    """A request in progress; `seen` counts its tokens in the state."""

    ticket: int
    request: Request
    generator: torch.Generator
    seen: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def total(self) -> int:
        """Tokens that it may come to."""
        return len(self.request.prompt) + self.request.max_new

    def add(self, token: int, logprob: float) -> None:
        """Take a token and notice a stop sequence, however many steps it took, or the length limit."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        for sequence in self.request.stop:
            if self.tokens[-len(sequence) :] == list(sequence):
                self.finish_reason = "stop"
                del self.tokens[-len(sequence) :], self.logprobs[-len(sequence) :]
                return
        if len(self.tokens) == self.request.max_new:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        """The finished request's result."""
        return Completion(self.tokens, None, self.finish_reason or "length", self.logprobs)


@dataclass
class _Entering:
    """Prompts that are being read, padded on the left to equal length."""

    rows: list[_Row]
    tokens_bt: Tensor
    span: Span
    state: DecoderState
    done: int = 0

    def chunk(self, columns: int) -> tuple[Tensor, Span]:
        """The next columns, and where they stand."""
        cut = slice(self.done, self.done + columns)
        positions_bt, valid_bt = self.span.positions_bt, self.span.valid_bt
        if positions_bt is None or valid_bt is None:
            return self.tokens_bt[:, cut], Span()
        return self.tokens_bt[:, cut], Span(positions_bt=positions_bt[:, cut], valid_bt=valid_bt[:, cut])


class Batcher:
    """Generates for many requests with one batch.

    Args:
        model: on any device; it is in evaluation mode during each step.
        max_rows: most requests in the batch at a time.
        prefill: most prompt tokens that a step reads; None reads whole prompts, all that fit at once.
        max_tokens: most tokens of a request, prompt and new ones together; None sets no limit.

    Raises:
        ConfigError: a number below 1.
    """

    def __init__(
        self, model: Decoder, max_rows: int, *, prefill: int | None = PREFILL, max_tokens: int | None = None
    ) -> None:
        for name, value in (("max_rows", max_rows), ("prefill", prefill), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(
                    f"{name} is {value}; it must be 1 or more{'' if name == 'max_rows' else ', or None'}."
                )
        self.model, self.max_rows, self.prefill, self.max_tokens = model, max_rows, prefill, max_tokens
        self.generated = 0
        self._waiting: deque[_Row] = deque()
        self._entering: _Entering | None = None
        self._rows: list[_Row] = []
        self._state: DecoderState | None = None
        self._submitted = 0

    @property
    def waiting(self) -> int:
        """Requests that no row has taken up yet."""
        return len(self._waiting)

    @property
    def present(self) -> int:
        """Requests in the batch, those whose prompt is being read among them."""
        return len(self._rows) + (len(self._entering.rows) if self._entering else 0)

    def nbytes(self) -> int:
        """Bytes of all decoding states."""
        states = [self._state, self._entering.state if self._entering else None]
        return sum(state.nbytes() for state in states if state is not None)

    def submit(self, request: Request) -> int:
        """Queue a request and return its ticket: 0, 1, … in the order of submission.

        Raises:
            ConfigError: an empty, out-of-range or too long prompt, no new tokens, or an empty stop sequence.
        """
        check(self.model, self._submitted, request)
        total = len(request.prompt) + request.max_new
        if self.max_tokens is not None and total > self.max_tokens:
            raise ConfigError(
                f"prompt {self._submitted} has {len(request.prompt)} tokens and asks for {request.max_new} more: {total} are "
                f"above max_tokens, {self.max_tokens}. Shorten the prompt, lower max_new, or raise max_tokens."
            )
        generator = generator_for(request.seed, request.stream)
        self._waiting.append(_Row(self._submitted, request, generator, len(request.prompt)))
        self._submitted += 1
        return self._submitted - 1

    @torch.no_grad()
    def step(self) -> list[tuple[int, Completion]]:
        """One token for every row, and at most `prefill` prompt tokens; returns what finished, with its tickets."""
        with _evaluating(self.model):
            return self._decode() + self._read()

    def run(self) -> Iterator[tuple[int, Completion]]:
        """Step until nothing is left, and give every completion with its ticket as soon as it is there."""
        while self._waiting or self.present:
            yield from self.step()

    def _decode(self) -> list[tuple[int, Completion]]:
        """One token for every row of the batch."""
        if self._state is None:
            return []
        device = self.model.embed.weight.device
        tokens_b1 = torch.tensor([[row.tokens[-1]] for row in self._rows], device=device)
        positions_b1 = torch.tensor([[row.seen] for row in self._rows], device=device)
        hidden_btd = self.model(tokens_b1, Span(positions_bt=positions_b1), self._state).hidden_btd
        for row in self._rows:
            row.seen += 1
        self._choose(self._rows, hidden_btd)
        return self._leave()

    def _choose(self, rows: Sequence[_Row], hidden_btd: Tensor) -> None:
        """The next token of every row."""
        logits_bv = self.model.logits(hidden_btd[:, -1]).float()
        token_b = choose_each(logits_bv, [row.request.sampling for row in rows], [row.generator for row in rows])
        chosen_b1 = token_b[:, None].to(logits_bv.device)
        logprob_b = logits_bv.log_softmax(-1).gather(-1, chosen_b1).squeeze(-1)
        for row, token, logprob in zip(rows, token_b.tolist(), logprob_b.tolist(), strict=True):
            row.add(token, logprob)
        self.generated += len(rows)

    def _leave(self) -> list[tuple[int, Completion]]:
        """Take finished rows out of the batch, and with them the columns that only they used."""
        finished = [(row.ticket, row.completion()) for row in self._rows if row.finish_reason]
        if finished:
            assert self._state is not None
            stay = [index for index, row in enumerate(self._rows) if not row.finish_reason]
            self._rows = [self._rows[index] for index in stay]
            if not stay:
                self._state = None
                return finished
            self._state = self._state.select(torch.tensor(stay, device=self.model.embed.weight.device))
            unused = self._state.length - max(row.seen for row in self._rows)
            if unused:
                self._state.trim(unused, max(row.total for row in self._rows))
        return finished

    def _read(self) -> list[tuple[int, Completion]]:
        """Some tokens of the next prompts; those that are read to their end receive their first token and join the batch."""
        if self._entering is None:
            self._entering = self._admit()
        entering = self._entering
        if entering is None:
            return []
        columns = entering.tokens_bt.shape[1]
        if self.prefill is not None:
            columns = max(1, self.prefill // len(entering.rows))
        tokens_bt, span = entering.chunk(columns)
        hidden_btd = self.model(tokens_bt, span, entering.state).hidden_btd
        entering.done += tokens_bt.shape[1]
        if entering.done < entering.tokens_bt.shape[1]:
            return []
        self._entering = None
        self._choose(entering.rows, hidden_btd)
        self._rows = self._rows + entering.rows
        self._state = entering.state if self._state is None else self._state.join(entering.state)
        return self._leave()

    def _admit(self) -> _Entering | None:
        """The next prompts that free rows can take: as many as one step reads, or one that takes several steps."""
        rows: list[_Row] = []
        longest = 0
        while self._waiting and self.present + len(rows) < self.max_rows:
            longest = max(longest, self._waiting[0].seen)
            if rows and self.prefill is not None and (len(rows) + 1) * longest > self.prefill:
                break
            rows.append(self._waiting.popleft())
        if not rows:
            return None
        tokens_bt, span = _pad([row.request.prompt for row in rows], self.model.embed.weight.device)
        room = max(row.total for row in [*rows, *self._rows])
        return _Entering(rows, tokens_bt, span, self.model.new_state(len(rows), room))


def check(model: Decoder, number: int, request: Request) -> None:
    """Raise ConfigError if the model cannot continue this request, prompt `number` of several."""
    if request.max_new < 1:
        raise ConfigError(f"max_new is {request.max_new}; ask for at least one token.")
    if len(request.prompt) == 0:
        raise ConfigError(f"prompt {number} is empty; give at least one token (a start-of-text token, for example).")
    wrong = [token for token in request.prompt if not 0 <= token < model.vocab_size]
    if wrong:
        raise ConfigError(
            f"prompt {number} holds token {wrong[0]}; this model knows 0 to {model.vocab_size - 1}. "
            "Encode the prompt with the model's own tokenizer."
        )
    if any(len(sequence) == 0 for sequence in request.stop):
        raise ConfigError("a stop sequence is empty; every one needs at least one token.")


def _pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Span]:
    """Tokens [b, t] padded on the left, and the span that hides the padding; a plain span for equal lengths."""
    longest = max(map(len, prompts))
    rows = [[PADDING] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens_bt = torch.tensor(rows, dtype=torch.long, device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return tokens_bt, Span()
    index_t = torch.arange(longest, device=device)
    padding_b1 = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)
    positions_bt = (index_t - padding_b1).clamp_min(0)
    return tokens_bt, Span(positions_bt=positions_bt, valid_bt=index_t >= padding_b1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to what it was."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
