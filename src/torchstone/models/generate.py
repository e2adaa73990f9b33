"""Generation: continue prompts token by token with a decoding state.

Prompts of different lengths share a batch through left padding: every prompt ends at the same index, padding is
invisible and positions count from each prompt's own first token. A prompt therefore receives the same continuation
alone and in any batch (with its own seed), up to float error.

Shapes: b rows · t tokens · v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder
from torchstone.models.sampling import Sampling
from torchstone.nn.initialisation import generator_for
from torchstone.nn.span import Span

PADDING = 0  # any valid id; padding is invisible


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
    """One prompt in progress."""

    stop: Sequence[Sequence[int]]
    max_new: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def add(self, token: int, logprob: float) -> None:
        """Take a token and notice a stop sequence, however many steps it took, or the length limit."""
        if self.finish_reason is not None:
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        for sequence in self.stop:
            if self.tokens[-len(sequence) :] == list(sequence):
                self.finish_reason = "stop"
                del self.tokens[-len(sequence) :], self.logprobs[-len(sequence) :]
                return
        if len(self.tokens) == self.max_new:
            self.finish_reason = "length"


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    stop: Sequence[Sequence[int]] = (),
    seed: int | Sequence[int] = 0,
) -> list[Completion]:
    """Continue every prompt by up to `max_new` tokens.

    Args:
        model: on any device; it is in evaluation mode during the call.
        prompts: token ids, at least one per prompt; lengths may differ.
        max_new: tokens to generate per prompt.
        temperature, top_k, top_p, greedy: see `Sampling`.
        stop: token sequences that end a completion. They must lie within the generated part and are removed.
        seed: one for all (row i then draws from stream i of that seed), or one per prompt, which makes a prompt's
            result independent of its place in the batch.

    Returns:
        one Completion per prompt, in order.

    Raises:
        ConfigError: empty or out-of-range prompts, an empty stop sequence, or sampling values out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, greedy)
    _check(model, prompts, max_new, stop)
    if not prompts:
        return []
    generators = _generators(seed, len(prompts))
    rows = [_Row(stop, max_new) for _ in prompts]
    device = model.embed.weight.device
    tokens_bt, span = _pad(prompts, device)
    length_b1 = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    state = model.new_state(len(prompts), tokens_bt.shape[1] + max_new)
    with _evaluating(model):
        for step in range(max_new):
            hidden_btd = model(tokens_bt, span, state).hidden_btd
            logits_bv = model.logits(hidden_btd[:, -1]).float()
            token_b = sampling.choose(logits_bv, generators)
            logprob_b = logits_bv.log_softmax(-1).cpu().gather(-1, token_b[:, None]).squeeze(-1)
            for row, token, logprob in zip(rows, token_b.tolist(), logprob_b.tolist(), strict=True):
                row.add(token, logprob)
            if all(row.finish_reason for row in rows):
                break
            tokens_bt = token_b[:, None].to(device)
            span = Span(positions_bt=length_b1 + step)
    return [Completion(row.tokens, None, row.finish_reason or "length", row.logprobs) for row in rows]


def _check(model: Decoder, prompts: Sequence[Sequence[int]], max_new: int, stop: Sequence[Sequence[int]]) -> None:
    if max_new < 1:
        raise ConfigError(f"max_new is {max_new}; ask for at least one token.")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(
                f"prompt {number} is empty; give at least one token (a start-of-text token, for example)."
            )
        wrong = [token for token in prompt if not 0 <= token < model.vocab_size]
        if wrong:
            raise ConfigError(
                f"prompt {number} holds token {wrong[0]}; this model knows 0 to {model.vocab_size - 1}. "
                "Encode the prompt with the model's own tokenizer."
            )
    if any(len(sequence) == 0 for sequence in stop):
        raise ConfigError("a stop sequence is empty; every one needs at least one token.")


def _generators(seed: int | Sequence[int], rows: int) -> list[torch.Generator]:
    if isinstance(seed, int):
        return [generator_for(seed, f"generate row {row}") for row in range(rows)]
    if len(seed) != rows:
        raise ConfigError(f"{len(seed)} seeds were given for {rows} prompts; give one seed, or one per prompt.")
    return [generator_for(own, "generate prompt") for own in seed]


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
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
