"""What all pairs cost: the pair head of the belief-state objective against the double loop, and against its encoders.

    python benchmarks/belief_state.py [--threads N] [--rounds 5] [--quick] [--cpu] [--json PATH]

A step is forward and backward of a belief-state model (width 64, two layers a side) with its loss, in fp32, without
torch.compile. Candidates take turns within every round; ratios are medians of the ratios within rounds.

  batched    the objective: encoders once, head over chunks of pairs with the halves of its hidden layer made once per token
  products   the same chunks, but the head's hidden layer is computed from every pair anew, through autograd
  naive      encoders once, then the head for one pair at a time in a double loop, as the formula stands

Shapes: star graphs (26 tokens, 10 pairs a row, batch 16) and text (64 tokens, 2016 pairs a row, 1 row).
Goal: `batched` at least 20 times as fast as `naive` on text, with a loss equal to 1e-5.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from alternating import parser_of, started
from torch import Tensor

from torchstone.data.batch import Batch
from torchstone.data.synthetic.star_graph import StarGraphConfig
from torchstone.models.belief_state import BeliefState, BeliefStateConfig
from torchstone.objectives.belief_pairs import PairRule, pairs_of
from torchstone.objectives.belief_reference import naive_loss
from torchstone.objectives.belief_state import BeliefStateObjective

GOAL, EQUAL, CHUNK = 20.0, 1e-5, 1024
TEXT_VOCAB, TEXT_END, TEXT_LENGTH = 257, 256, 64
Case = tuple[BeliefState, Tensor, PairRule]


def model_of(vocab_size: int, end_token: int, length: int) -> BeliefState:
    """Two layers a side, 64 wide."""
    values = {
        "width": 64,
        "depth": 2,
        "head_dim": 16,
        "end_token": end_token,
        "initialisation": {"kind": "normal", "std": 0.1},
    }
    return BeliefStateConfig.model_validate(values).build(vocab_size, length, 0)


def cases() -> dict[str, Case]:
    """Model, tokens and rule of each shape."""
    task = StarGraphConfig()
    stars_bt = task.build(None).batch(0, 0, 16).tokens_bt
    text_bt = torch.randint(0, TEXT_END, (1, TEXT_LENGTH), generator=torch.Generator().manual_seed(0))
    star_rule = PairRule(gap_min=2, context_length=task.equals_index())
    return {
        "star graphs": (model_of(task.vocabulary(), task.end_token(), 26), stars_bt, star_rule),
        "text": (model_of(TEXT_VOCAB, TEXT_END, TEXT_LENGTH), text_bt, PairRule()),
    }


def loss_through_products(model: BeliefState, tokens_bt: Tensor, rule: PairRule) -> Tensor:
    """The loss with the head's whole product for every pair, in chunks that autograd keeps."""
    pairs = pairs_of(tokens_bt, model.end_token, rule)
    prefix_btd, suffix_btd = model(tokens_bt).hidden_btd, model.suffixes(tokens_bt).hidden_btd
    weight_n, total = pairs.weight_n(len(tokens_bt)), torch.zeros(())
    for start in range(0, len(pairs), CHUNK):
        part = slice(start, start + CHUNK)
        ends = prefix_btd[pairs.row_n[part], pairs.prefix_n[part]], suffix_btd[pairs.row_n[part], pairs.suffix_n[part]]
        for side, logits_cv in enumerate(model.head.pair_logits(*ends)):
            losses_c = F.cross_entropy(logits_cv, pairs.targets_n2[part, side], reduction="none")
            total = total + (losses_c * weight_n[part]).sum() / 2
    return total / len(tokens_bt)


def candidates(case: Case) -> dict[str, Callable[[], Tensor]]:
    """The loss of each candidate."""
    model, tokens_bt, rule = case
    objective, batch = BeliefStateObjective(rule), Batch(tokens_bt, tokens_bt)
    return {
        "batched": lambda: objective(model, batch).loss,
        "products": lambda: loss_through_products(model, tokens_bt, rule),
        "naive": lambda: naive_loss(model, tokens_bt, rule),
    }


def measure(case: Case, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of a step of every candidate in every round, after one to warm up."""
    model, found = case[0], dict[str, list[float]]()
    runs = candidates(case)
    for number in range(-1, rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            model.zero_grad(set_to_none=True)
            begun = clock()
            runs[name]().backward()
            if number >= 0:
                found.setdefault(name, []).append(clock() - begun)
    return found


def main() -> int:
    """Measure and print; exit code 1 if a goal is missed."""
    given, clock = started(parser_of(__doc__, rounds=5, quick=2))
    rounds, missed, ratios = given.rounds, 0, {}
    print(f"torch {torch.__version__}, {given.threads} threads, {rounds} rounds")
    for title, case in cases().items():
        with torch.no_grad():
            values = {name: float(loss()) for name, loss in candidates(case).items()}
        spread = max(values.values()) - min(values.values())
        times = measure(case, rounds, clock)
        over = {
            name: statistics.median(one / other for one, other in zip(times[name], times["batched"], strict=True))
            for name in ("products", "naive")
        }
        ratios[title] = over
        shown = "  ".join(f"{name} {statistics.median(seconds) * 1e3:,.1f}" for name, seconds in times.items())
        said = "  ".join(f"{name} / batched {value:.2f}" for name, value in over.items())
        print(f"{title} (ms): {shown}\n    {said}  largest difference of the losses {spread:.1e}", flush=True)
        missed += spread > EQUAL
    missed += ratios["text"]["naive"] < GOAL
    print(f"goal: naive / batched at least {GOAL:g} on text, losses equal to {EQUAL:g}")
    if given.json is not None:
        given.json.write_text(json.dumps({"ratios": ratios}, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
