"""Beam search towards a goal: greedy roll-outs, and the most promising deviations from them (Hu et al., arXiv 2410.23506).

    1  roll out greedily from the prefix
    2  every place of a roll-out where another token was likely is a deviation: the text so far and that token, which wait in a
       queue, the one with the greatest mean log-probability first
    3  roll out greedily from the first in the queue, and so on until `rollouts` texts are there

The score of a text is the mean log-probability of its tokens, of the end token that closes it too. Texts are whole from the
beginning, so the search may stop at any time.

Shapes: t tokens · v vocabulary.

Pitfall: a mean favours long texts with easy tokens; it is what the paper uses.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.models.belief_generate import infill, suffix_vectors
from torchstone.models.belief_state import BeliefState


@dataclass(frozen=True)
class Beam:
    """One text between prefix and goal.

    Attributes:
        tokens: without the end token.
        score: mean ln p of the tokens and, if it is finished, of the end token.
        finished: it ended by itself, before `max_new` tokens.
    """

    tokens: list[int]
    score: float
    finished: bool


def beam_search(
    model: BeliefState, prefix: Sequence[int], goal: Sequence[int], *, max_new: int, rollouts: int = 16, width: int = 3
) -> list[Beam]:
    """Likely texts between a prefix and a goal, the best first.

    Args:
        model: a belief-state model.
        prefix: token ids, at least one.
        goal: token ids, an end token last; that token alone for no goal.
        max_new: most tokens of a text.
        rollouts: texts to try; 1 is greedy decoding.
        width: other tokens at each place that may start a deviation.

    Raises:
        ConfigError: rollouts or width below 1, or what `infill` raises.
    """
    if rollouts < 1 or width < 1:
        raise ConfigError(f"rollouts is {rollouts} and width {width}; both must be 1 or more.")
    queue: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    known: set[tuple[int, ...]] = {()}
    found: list[Beam] = []
    while queue and len(found) < rollouts:
        _, start = heapq.heappop(queue)
        tokens, finished = _rolled_out(model, prefix, start, goal, max_new)
        said = [*tokens, model.end_token] if finished else tokens
        log_p_tv = _log_p(model, prefix, goal, said)
        chosen_t = log_p_tv.gather(1, torch.tensor(said, device=log_p_tv.device)[:, None]).squeeze(1)
        found.append(Beam(tokens, float(chosen_t.mean()), finished))
        for place in range(len(start), len(said)):
            before = chosen_t[:place].sum()
            others_v = log_p_tv[place].index_fill(0, torch.tensor(said[place], device=log_p_tv.device), -torch.inf)
            best = others_v.topk(min(width, len(others_v) - 1))
            for value, token in zip(best.values, best.indices.tolist(), strict=True):
                deviation = (*said[:place], token)
                if deviation not in known:
                    known.add(deviation)
                    heapq.heappush(queue, (-float((before + value) / (place + 1)), deviation))
    return sorted(found, key=lambda beam: -beam.score)


def _rolled_out(
    model: BeliefState, prefix: Sequence[int], start: tuple[int, ...], goal: Sequence[int], max_new: int
) -> tuple[list[int], bool]:
    """The greedy text that begins with `start`, and whether it ended by itself."""
    if start and start[-1] == model.end_token:
        return list(start[:-1]), True
    if len(start) == max_new:
        return list(start), False
    completion = infill(model, [[*prefix, *start]], [goal], max_new=max_new - len(start), greedy=True)[0]
    return [*start, *completion.tokens], completion.finish_reason == "stop"


@torch.no_grad()
def _log_p(model: BeliefState, prefix: Sequence[int], goal: Sequence[int], said: list[int]) -> Tensor:
    """ln p [t, v] at each token of what was said."""
    tokens_1t = torch.tensor([[*prefix, *said[:-1]]], device=model.embed.weight.device)
    hidden_td = model(tokens_1t).hidden_btd[0, len(prefix) - 1 :]
    return model.head.pair_logits(hidden_td, suffix_vectors(model, [goal])[0])[0].float().log_softmax(-1)
