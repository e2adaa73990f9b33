"""What a belief-state model writes: a middle towards a goal, text before a goal, and how likely a goal is after a text.

    infill         b = B(goal) once, then x_{t+1} from the next head of (f_t, b), until an end token ("the goal begins here")
    prepend        f = F(prefix) once, then x_{j−1} from the previous head of (f, b_j), right to left
    score_goal     mean ln p of the goal's tokens x_t under the pairs (f_{t−1}, b_{t+1})

Either direction keeps a decoding state, so that a new token costs one token of one encoder and one pair of the head, and all
prompts run as one batch. A goal is the tokens that come after the gap, with the end token behind them; the empty goal is an end
token alone, and `torchstone.models.generate` continues prompts towards that one.

Shapes: b rows · t tokens · d width · v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.models.belief_state import BeliefState, ReadingState
from torchstone.models.continuous import Completion
from torchstone.models.decoder import DecoderOutput
from torchstone.models.generate import generate
from torchstone.nn.span import Span
from torchstone.nn.state import DecoderState

Tokens = Sequence[int]
PADDING = 0  # any valid id; padding stands where it is not read


@dataclass
class PairedState(ReadingState):
    """Decoding state of one direction with the fixed vector [b, d] of the other."""

    fixed_bd: Tensor

    def select(self, rows_n: Tensor) -> PairedState:
        """A copy that holds only these rows, in this order."""
        return _paired(super().select(rows_n), self.fixed_bd[rows_n])

    def join(self, other: DecoderState) -> PairedState:
        """A copy that holds the rows of both."""
        assert isinstance(other, PairedState)
        return _paired(super().join(other), torch.cat([self.fixed_bd, other.fixed_bd]))


def _paired(state: ReadingState, fixed_bd: Tensor) -> PairedState:
    return PairedState(state.layers, state.position_b, state.document_b, fixed_bd)


class _Towards(nn.Module):
    """A belief-state model as `generate` wants it, with the other end of every pair fixed.

    Args:
        model: the model.
        fixed_bd: suffix vectors of the prompts in their order, or prefix vectors where it writes backwards.
        backward: tokens come from the last to the first.
    """

    def __init__(self, model: BeliefState, fixed_bd: Tensor, backward: bool) -> None:
        super().__init__()
        self.model, self.fixed_bd, self.backward = model, fixed_bd, backward
        self.embed, self.vocab_size = model.embed, model.vocab_size
        self.train(model.training)
        self._admitted = 0

    def new_state(self, batch: int, capacity: int) -> PairedState:
        """State of the next prompts; `generate` takes them up in their order."""
        rows = slice(self._admitted, self._admitted + batch)
        self._admitted += batch
        return _paired(self.model.new_state(batch, capacity, backward=self.backward), self.fixed_bd[rows])

    def forward(self, tokens_bt: Tensor, span: Span, state: PairedState) -> DecoderOutput:
        """Features of the pair of the last token and the fixed end, [b, 1, d]."""
        read = self.model.backwards if self.backward else self.model
        last_b1d = read(tokens_bt, span, state).hidden_btd[:, -1:]
        fixed_b1d = state.fixed_bd[:, None].to(last_b1d.dtype)
        pair = (fixed_b1d, last_b1d) if self.backward else (last_b1d, fixed_b1d)
        return DecoderOutput(self.model.head.pair(*pair)[int(self.backward)], state)

    def logits(self, features: Tensor) -> Tensor:
        """Logits […, v]."""
        return self.model.head.project(features)


def infill(
    model: BeliefState,
    prefixes: Sequence[Tokens],
    goals: Sequence[Tokens] | None = None,
    *,
    max_new: int,
    **sampling: Any,
) -> list[Completion]:
    """What comes between each prefix and its goal.

    Args:
        model: a belief-state model.
        prefixes: token ids, at least one each; start with an end token where the text starts a document.
        goals: token ids that come after the gap, an end token last; None: the empty goal for all.
        max_new: most tokens of a gap.
        sampling: `temperature`, `top_k`, `top_p`, `greedy`, `seed` of `generate`.

    Returns:
        one completion per prefix; the end token that says "the goal begins here" is not in it.

    Raises:
        ConfigError: another kind of model, an empty prefix, or a goal that is no end of one document.
    """
    require_belief_state(model)
    goals = [[model.end_token]] * len(prefixes) if goals is None else goals
    _require_equally_many(prefixes, goals)
    if not prefixes:
        return []
    fixed_bd = suffix_vectors(model, goals)
    towards: Any = _Towards(model, fixed_bd, backward=False)
    return generate(towards, prefixes, max_new=max_new, stop=[[model.end_token]], **sampling)


def prepend(
    model: BeliefState, prefixes: Sequence[Tokens], goals: Sequence[Tokens], *, max_new: int, **sampling: Any
) -> list[Completion]:
    """The same gap written from its end: what stands before each goal, after a prefix that is read once.

    Arguments, errors and result as for `infill`; tokens and log-probabilities are in the order of the text.
    """
    require_belief_state(model)
    _require_equally_many(prefixes, goals)
    if not prefixes:
        return []
    for goal in goals:
        require_goal(model, goal)
    fixed_bd = prefix_vectors(model, prefixes)
    towards: Any = _Towards(model, fixed_bd, backward=True)
    turned = [list(goal)[::-1] for goal in goals]
    found = generate(towards, turned, max_new=max_new, stop=[[model.end_token]], **sampling)
    return [replace(one, tokens=one.tokens[::-1], logprobs=one.logprobs[::-1]) for one in found]


@torch.no_grad()
def score_goal(
    model: BeliefState, texts: Sequence[Tokens], goal: Tokens, side: Literal["next", "prev"] = "next"
) -> Tensor:
    """How likely a goal is after each text: mean ln p of its tokens, each between what is before and behind it, fp32 [b].

    Args:
        model: a belief-state model.
        texts: candidates, at least one token each; lengths may differ.
        goal: tokens that come right after a candidate, an end token last.
        side: which of the head's two answers is asked: the next token of x_<t, or the previous one of x_>t.

    Raises:
        ConfigError: another kind of model, an empty candidate, or a goal without tokens or without its end token.
    """
    require_belief_state(model)
    require_goal(model, goal)
    if len(goal) < 2:
        raise ConfigError(
            "the goal holds an end token alone, so there is nothing to score; give the goal's tokens before it."
        )
    rows = [[*text, *goal] for text in texts]
    if not rows:
        return torch.empty(0)
    _require_tokens(texts, "candidate")
    longest, device = max(map(len, rows)), model.embed.weight.device
    tokens_bt = torch.tensor([[*row, *[PADDING] * (longest - len(row))] for row in rows], device=device)
    starts_b1 = torch.tensor([[len(text)] for text in texts], device=device)
    length_b1 = starts_b1 + len(goal)
    span = Span(valid_bt=torch.arange(longest, device=device) < length_b1)
    scored_bg = starts_b1 + torch.arange(len(goal) - 1, device=device)
    row_b1 = torch.arange(len(rows), device=device)[:, None]
    prefix_bgd = model(tokens_bt, span).hidden_btd[row_b1, scored_bg - 1]
    suffix_bgd = model.suffixes(tokens_bt, span).hidden_btd[row_b1, scored_bg + 1]
    logits_bgv = model.head.pair_logits(prefix_bgd, suffix_bgd)[side == "prev"].float()
    wanted_bg1 = tokens_bt[row_b1, scored_bg].unsqueeze(-1)
    return logits_bgv.log_softmax(-1).gather(-1, wanted_bg1).squeeze(-1).mean(1)


@torch.no_grad()
def suffix_vectors(model: BeliefState, goals: Sequence[Tokens]) -> Tensor:
    """b of every goal, [b, d]; raises ConfigError for a goal that is no end of one document."""
    for goal in goals:
        require_goal(model, goal)
    tokens_bt, last_b = _left_aligned([list(goal)[::-1] for goal in goals], model)
    return model.backwards(tokens_bt).hidden_btd[torch.arange(len(goals), device=last_b.device), last_b]


@torch.no_grad()
def prefix_vectors(model: BeliefState, prefixes: Sequence[Tokens]) -> Tensor:
    """f of every prefix, [b, d]; raises ConfigError for an empty one."""
    _require_tokens(prefixes, "prefix")
    tokens_bt, last_b = _left_aligned(prefixes, model)
    return model(tokens_bt).hidden_btd[torch.arange(len(prefixes), device=last_b.device), last_b]


def _left_aligned(rows: Sequence[Tokens], model: BeliefState) -> tuple[Tensor, Tensor]:
    """Tokens [b, t] with padding behind, which causal encoders do not see, and the index of each last token."""
    longest, device = max(map(len, rows)), model.embed.weight.device
    tokens_bt = torch.tensor([[*row, *[PADDING] * (longest - len(row))] for row in rows], device=device)
    return tokens_bt, torch.tensor([len(row) - 1 for row in rows], device=device)


def require_belief_state(model: Any) -> None:
    """Raise ConfigError for a model without a backward encoder."""
    if not isinstance(model, BeliefState):
        raise ConfigError(
            f"a goal needs a model with a backward encoder, and {type(model).__name__} has none; train a recipe whose model is "
            "belief-state, or continue without a goal (`torchstone generate`)."
        )


def require_goal(model: BeliefState, goal: Tokens) -> None:
    """Raise ConfigError unless the goal is tokens of one document with its end token last, or that token alone."""
    end = model.end_token
    wrong = [token for token in goal if not 0 <= token < model.vocab_size]
    if wrong:
        raise ConfigError(f"the goal holds token {wrong[0]}; this model knows 0 to {model.vocab_size - 1}.")
    if not goal or goal[-1] != end:
        raise ConfigError(
            f"a goal ends with the end token, {end}, and this one {f'ends with {goal[-1]}' if goal else 'is empty'}; append it. "
            "For no goal at all give the end token alone."
        )
    if end in goal[:-1]:
        raise ConfigError(
            f"the goal holds the end token {end} before its last place, and what is behind it would not be read; give one "
            "document."
        )


def _require_tokens(rows: Sequence[Tokens], what: str) -> None:
    for number, row in enumerate(rows):
        if not row:
            raise ConfigError(f"{what} {number} is empty; give at least one token (the end token starts a document).")


def _require_equally_many(prefixes: Sequence[Tokens], goals: Sequence[Tokens]) -> None:
    if len(prefixes) != len(goals):
        raise ConfigError(f"{len(goals)} goals were given for {len(prefixes)} prefixes; give one goal for each.")
