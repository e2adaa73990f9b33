"""The plateau/decay split of a model's own text: which tokens its decay helped, by the entropy of another model.

Every evaluated token has its loss just before the decay, its loss after it, and the entropy of a reference model's next-token
distribution at its place (`torchstone.diagnose.landscape.split`).

Shapes: n rows · t tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchstone.diagnose.landscape.split import EntropySplit, entropy_split
from torchstone.diagnose.landscape.states import State, holding
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError

ROWS_AT_ONCE = 8


def decay_split(subject: Subject, before: State, tokens_nt: Tensor, reference: Subject) -> EntropySplit:
    """Mean change of the loss from the weights `before` to the subject's own, by entropy decile of the reference model.

    Raises:
        ConfigError: the reference has another vocabulary or another tokenizer, so that token ids mean other things to it, or it
            is the subject itself.
    """
    require_reference(subject, reference, tokens_nt)
    after_n = token_losses(subject, tokens_nt)
    with holding(subject.model, before):
        before_n = token_losses(subject, tokens_nt)
    return entropy_split(before_n, after_n, token_entropies(reference, tokens_nt))


def require_reference(subject: Subject, reference: Subject, tokens_nt: Tensor) -> None:
    """Raise ConfigError unless the reference is another model that reads the same tokens as the subject.

    A tokenizer is known by what it makes of the texts: rows of tokens, as text, must come out as the same tokens from both.
    """
    if reference.vocab_size != subject.vocab_size:
        raise ConfigError(
            f"{reference.name} has {reference.vocab_size} token ids and {subject.name} {subject.vocab_size}; a reference model "
            "reads the same tokens: give one of the same tokenizer."
        )
    for row in tokens_nt.tolist():
        text = subject.decode(row)
        if reference.encode(text) != subject.encode(text) or reference.decode(row) != text:
            raise ConfigError(
                f"{reference.name} and {subject.name} make other tokens of the same text ({text[:40]!r} …); a reference model "
                "reads the same tokens: give one of the same tokenizer."
            )
    own, other = subject.model.state_dict(), reference.model.state_dict()
    if own.keys() == other.keys() and all(_equal(value, other[name]) for name, value in own.items()):
        raise ConfigError(
            f"the reference {reference.name} has the very weights of {subject.name}; a model's own entropy is low where its own "
            "loss is low: give another model, a larger one or one of another seed."
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b.to(a)))


def token_losses(subject: Subject, tokens_nt: Tensor) -> Tensor:
    """The loss of every token but the first of each row, fp32 [n·(t−1)], on the CPU."""
    return torch.cat([subject.losses(tokens_bt).flatten().cpu() for tokens_bt in tokens_nt.split(ROWS_AT_ONCE)])


@torch.no_grad()
def token_entropies(subject: Subject, tokens_nt: Tensor) -> Tensor:
    """Entropy in nats of the model's distribution of the same tokens, fp32 [n·(t−1)], on the CPU."""
    found = []
    for tokens_bt in tokens_nt.to(subject.device).split(ROWS_AT_ONCE):
        log_p_btv = subject.logits(tokens_bt[:, :-1])[..., : subject.vocab_size].float().log_softmax(-1)
        found.append(-(log_p_btv.exp() * log_p_btv).sum(-1).flatten().cpu())
    return torch.cat(found)
