"""Logits where they are scored, and nowhere else.

A prompt's tokens have logits too, which no loss reads: with 128 000 words in the vocabulary and 8 examples of 1024 tokens, all of
them would be 4 GB. The model runs as it is, with whatever factors and caps come after its head, while a hook shortens what the
head reads to the hidden states of scored places.

Shapes: b examples · t tokens · n scored tokens of all examples · v vocabulary.

Pitfall: a model whose head takes its input by keyword, or that has no head of its own, makes all logits, and those that are not
scored are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchstone.diagnose.gradients.pairs import Example
from torchstone.diagnose.subject import Subject
from torchstone.models.decoder import Decoder, DecoderOutput

LOGITS = 1 << 27  # of one pass: 512 MB in fp32


@dataclass(frozen=True, eq=False)
class Scored:
    """What a batch's losses are about.

    Attributes:
        rows_n, places_n: example, and place of the token before, of every scored token.
        answers_n: the scored tokens.
        counts_b: scored tokens of each example.
    """

    rows_n: Tensor
    places_n: Tensor
    answers_n: Tensor
    counts_b: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device) -> Scored:
        """The scored tokens of some examples, in order."""
        rows = [row for row, example in enumerate(examples) for _ in example.scored]
        places = [place - 1 for example in examples for place in example.scored]
        answers = [example.tokens[place] for example in examples for place in example.scored]
        counts = [len(example.scored) for example in examples]
        return cls(*(torch.tensor(values, device=device) for values in (rows, places, answers, counts)))

    def losses(self, logits_nv: Tensor) -> Tensor:
        """Mean loss over every example's scored tokens, at least fp32 [b], differentiable."""
        fine = torch.promote_types(logits_nv.dtype, torch.float32)
        losses_n = F.cross_entropy(logits_nv.to(fine), self.answers_n, reduction="none")
        return losses_n.new_zeros(len(self.counts_b)).index_add(0, self.rows_n, losses_n) / self.counts_b


def scored_logits(subject: Subject, tokens_bt: Tensor, scored: Scored) -> Tensor:
    """Logits [n, v] at the scored places, in the model's type; differentiable."""
    shortened: list[bool] = []

    def shorten(hidden_btw: Tensor) -> Tensor:
        shortened.append(True)
        return hidden_btw[scored.rows_n, scored.places_n][None]

    with _shortened(subject.model, tokens_bt.shape, shorten):
        logits = subject.logits(tokens_bt)
    return logits[0] if shortened else logits[scored.rows_n, scored.places_n]


@contextmanager
def _shortened(model: Any, shape: torch.Size, shorten: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass the final hidden states [b, t, w] through `shorten` before the head reads them, where that is possible."""

    def after(module: nn.Module, inputs: Any, output: DecoderOutput) -> DecoderOutput:
        return output._replace(hidden_btd=shorten(output.hidden_btd))

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (shorten(inputs[0]), *inputs[1:]) if inputs and inputs[0].shape[:2] == shape else None

    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    with ExitStack() as stack:
        if isinstance(model, Decoder):
            stack.callback(model.register_forward_hook(after).remove)
        elif isinstance(head, nn.Module):
            stack.callback(head.register_forward_pre_hook(before).remove)
        yield


def batches(order: Sequence[int], examples: Sequence[Example], most: int, vocabulary: int) -> Iterator[list[int]]:
    """Examples in the order given, at most `most` at once, and fewer where their logits would be more than `LOGITS` numbers."""
    batch: list[int] = []
    numbers = 0
    for index in order:
        more = len(examples[index].scored) * vocabulary
        if batch and (len(batch) == most or numbers + more > LOGITS):
            yield batch
            batch, numbers = [], 0
        batch, numbers = [*batch, index], numbers + more
    if batch:
        yield batch
