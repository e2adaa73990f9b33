"""Parts of every family with parts of every other: each pair is built, trained for a step and decoded, or refused by name.

Kinds are read from the index of kinds, so a new kind takes part with its defaults. Combinations are chosen so that every two
kinds of different families meet in at least one (`tests.support.pairwise`); attention with every position and score processor
is in `test_combinations`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.pairwise import Combination, all_pairs, pairs_of
from tests.support.tiny import tiny_recipe
from torch import Tensor

from torchstone.data.batch import Batch
from torchstone.errors import ConfigError
from torchstone.models.generate import generate
from torchstone.models.pattern import LETTERS
from torchstone.objectives.next_token import LossOutput
from torchstone.recipe.load import load_recipe
from torchstone.recipe.registry import kinds, parse_part, part_class
from torchstone.train.budget import counts_of

WIDTH, HEAD_DIM, LENGTH, VOCABULARY, END, CLOSE = 16, 4, 9, 13, 12, 1e-5
HYBRIDS = ("RRA", "HG", "DM", "GRH")
SETTINGS: dict[str, dict[str, Any]] = {
    "local-attention": {"window": 4},
    "moa": {"num_experts": 4, "head_dim": 4},
    "smoe": {"num_experts": 4, "hidden": 8},
    "fire": {"width": 4},
    "mixture-of-softmaxes": {"components": 2},
    "factored": {"rank": 8},
}
FACTORS = {
    "mixer": (*kinds("mixer"), *HYBRIDS),
    "feedforward": kinds("feedforward"),
    "projection": kinds("projection"),
    "norm": kinds("norm"),
    "position": kinds("position"),
    "head": kinds("head"),
    "objective": kinds("objective"),
}
# what does not go together: overrides of a recipe → what the refusal says
REFUSED: dict[str, tuple[list[str], str]] = {
    "pairs without a backward encoder": (["objective=belief-state"], "needs a model with a backward encoder"),
    "a head of its own on a belief-state model": (
        ["model={kind: belief-state, end_token: 12}", "model.head=factored"],
        "unknown key model.head; allowed keys",
    ),
    "a position on a recurrence": (
        ["model.block.mixer={kind: hgrn2, position: alibi}"],
        "unknown key model.block.mixer.position",
    ),
    "a score processor on experts": (
        ["model.block.mixer={kind: moa, score_processor: dape}"],
        "unknown key model.block.mixer.score_processor",
    ),
    "more experts for a token than there are": (
        ["model.block.feedforward={kind: smoe, num_experts: 2, top_k: 3}"],
        "top_k is 3 and there are 2 experts",
    ),
    "a width that heads do not divide": (
        ["model.block.mixer={kind: hgrn2, expand_ratio: 5}"],
        "width 32 is not divisible by expand_ratio 5",
    ),
    "a width that blocks do not divide": (
        ["model.block.mixer={kind: rglru, num_blocks: 5}"],
        "32 is not divisible by 5",
    ),
    "biases that differential attention lacks": (
        ["model.block.mixer={kind: attention, qkv_bias: true}", "model.block.mixer=differential"],
        "has no such setting",
    ),
    "an unknown letter": (["model.pattern=RXA"], "the letter 'X'"),
}


def _has_position(mixer: str) -> bool:
    found = [LETTERS[letter] for letter in mixer] if mixer in HYBRIDS else [mixer]
    return all("position" in part_class("mixer", kind).model_fields for kind in found)


def _possible(combination: Combination) -> bool:
    """Positions vary where the mixer has one; the pair model has a head of its own."""
    if not _has_position(combination["mixer"]) and combination["position"] != "rotary":
        return False
    return combination["objective"] != "belief-state" or combination["head"] == "linear"


COMBINATIONS = all_pairs(FACTORS, _possible)


def part(kind: str) -> dict[str, Any]:
    return {"kind": kind, **SETTINGS.get(kind, {})}


def model_of(combination: Combination) -> Any:
    """The model of a combination, on the CPU."""
    mixer = combination["mixer"]
    letters = [LETTERS[letter] for letter in mixer] if mixer in HYBRIDS else [mixer]
    mixers = [part(kind) for kind in letters]
    for one in mixers:
        if _has_position(one["kind"]):
            one |= {"position": part(combination["position"])} if combination["position"] != "rotary" else {}
    block = {name: part(combination[name]) for name in ("feedforward", "projection", "norm")}
    data: dict[str, Any] = {"width": WIDTH, "depth": max(2, len(mixers)), "head_dim": HEAD_DIM}
    data |= {"block": {"mixer": mixers[0], **block}, "pattern": mixers}
    data |= {"initialisation": {"kind": "normal", "std": 0.3, "scale_residual": False}}
    if combination["objective"] == "belief-state":
        data |= {"kind": "belief-state", "end_token": END}
    else:
        data |= {"kind": "decoder", "head": part(combination["head"])}
    return parse_part("model", data).build(VOCABULARY, LENGTH, 0)  # type: ignore[attr-defined]


def tokens(seed: int) -> Tensor:
    return torch.randint(0, END, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def batch_of(objective: str) -> Batch:
    tokens_bt, targets_bt = tokens(1), tokens(2)
    if objective != "next-token":
        targets_bt = torch.cat([tokens_bt[:, 1:], torch.full((2, 1), END)], dim=1)
    return Batch(tokens_bt, targets_bt, reference_bt=torch.zeros(targets_bt.shape))  # read by selective alone


def objective_of(kind: str) -> Any:
    windows = {"trunc_len": 3, "stride": 2}
    settings = {"fill-in-the-middle": {"fim_token": END - 1, "end_token": END}, "long-context": windows}.get(kind, {})
    return parse_part("objective", {"kind": kind, **settings}).build()  # type: ignore[attr-defined]


def name_of(combination: Combination) -> str:
    return "+".join(combination.values())


def test_every_two_kinds_meet() -> None:
    met = set().union(*map(pairs_of, COMBINATIONS))
    for first, second in (("mixer", "feedforward"), ("mixer", "projection"), ("feedforward", "projection")):
        for one in FACTORS[first]:
            assert {((first, one), (second, other)) for other in FACTORS[second]} <= met
    for mixer in FACTORS["mixer"]:
        assert {(("mixer", mixer), ("objective", kind)) for kind in kinds("objective")} <= met
    with_position = [kind for kind in FACTORS["mixer"] if _has_position(kind)]
    assert {(("mixer", m), ("position", p)) for m in with_position for p in kinds("position")} <= met


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_why_before_anything_is_trained(what: str) -> None:
    overrides, said = REFUSED[what]
    with pytest.raises(ConfigError, match=said) as caught:
        counts_of(load_recipe(tiny_recipe(), overrides))
    assert len(str(caught.value)) > 40


def loss_of(output: LossOutput, first: LossOutput) -> float:
    """What a step lowers: the minimised mean, with the weights that the step had, where an objective weighs targets."""
    if first.weights_bt is None:
        return (output.minimised / output.count).item()
    return (output.per_token_bt * first.weights_bt).sum().item() / float(first.count)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_trains_a_step_and_decodes(combination: Combination) -> None:
    model = model_of(combination)
    objective, batch = objective_of(combination["objective"]), batch_of(combination["objective"])
    optimizer = parse_part("optimizer", {"kind": "adamw", "learning_rate": 1e-4}).build(model)  # type: ignore[attr-defined]
    before = objective(model, batch)
    (before.minimised / before.count).backward()
    wrong = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert (wrong, without) == ([], [])
    optimizer.step()
    assert loss_of(objective(model, batch), before) < loss_of(before, before)
    model.eval()
    _decodes(model, combination)


@torch.no_grad()
def _decodes(model: Any, combination: Combination) -> None:
    whole = model(tokens(3)).hidden_btd
    for pieces in ([1] * LENGTH, [4, 1, 4]):
        state = model.new_state(2, LENGTH)
        steps = torch.cat([model(piece, state=state).hidden_btd for piece in tokens(3).split(pieces, dim=1)], dim=1)
        worst = float((steps - whole).abs().max())
        assert worst <= CLOSE * max(1.0, float(whole.abs().max())), (combination, pieces, worst)
    prompts = tokens(3).tolist()
    together = generate(model, [prompts[0], prompts[1][:3]], max_new=3, greedy=True)
    alone = [generate(model, [prompt], max_new=3, greedy=True)[0] for prompt in (prompts[0], prompts[1][:3])]
    assert [completion.tokens for completion in together] == [completion.tokens for completion in alone]
