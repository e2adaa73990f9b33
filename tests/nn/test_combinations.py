"""Every kind of attention with every position and every score processor: builds, trains a step, decodes as it trains.

Kinds are read from the index of kinds. A new kind takes part with its defaults; where its settings are other functions,
they are listed here. What is refused stands in REFUSED with its reason, and nothing else may be refused.
"""

from __future__ import annotations

import itertools
import warnings
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from torchstone.data.batch import Batch
from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.attention.observe import observe
from torchstone.recipe.registry import kinds, parse_part, part_class

WIDTH, HEAD_DIM, LENGTH, VOCABULARY, CLOSE = 16, 4, 7, 11, 1e-5
HALF = {"kind": "rotary", "p": 0.5}

# Settings that are other functions; a kind that is not here takes part with its defaults.
MIXERS: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        "mha": {},
        "gqa": {"heads": 4, "kv_heads": 2},
        "mqa": {"heads": 4, "kv_heads": 1},
        "window": {"window": 3},
        "qk norm": {"qk_norm": True},
        "output norm": {"output_norm": True},
        "dropout": {"dropout": 0.2},
        "odd heads": {"heads": 2, "head_dim": 3},
        "pairs": {"heads": 2, "head_dim": 2},
    },
    "differential": {
        "v1 flash": {"heads": 2, "kv_heads": 1},
        "v1 naive": {"heads": 2, "kv_heads": 1, "kv_pairing": "naive"},
        "v2": {"version": "v2", "heads": 4, "kv_heads": 2},
        "v2 window": {"version": "v2", "window": 3},
        "v2 straddling": {"version": "v2", "heads": 3, "kv_heads": 2, "head_dim": 4},
        "dropout": {"dropout": 0.1},
    },
}
POSITIONS: dict[str, dict[str, dict[str, Any]]] = {
    "rotary": {
        "full": {},
        "p": {"variant": "p", "p": 0.5},
        "partial": {"variant": "partial", "p": 0.5, "layout": "half"},
        "reversed": {"variant": "reversed", "p": 0.5},
        "full share": {"p": 0.5},
    },
    "fire": {"": {"width": 4}},
}
PROCESSORS: dict[str, dict[str, dict[str, Any]]] = {
    "dape": {
        "v1": {"version": "v1", "width": 4},
        "v2": {"version": "v2", "width": 4},
        "v2 as published": {"version": "v2", "width": 4, "mask_hidden": False},
    },
}
# (mixer, position, processor) as patterns → what the refusal says
REFUSED: dict[tuple[str, str, str], str] = {
    ("attention odd heads", "rotary*", "*"): "head_dim is 3, which is odd",
    ("attention pairs", "rotary partial", "*"): "2r = 0 lanes to turn",
    ("*", "rotary full share", "*"): "full turns every pair",
    ("differential v2 straddling", "*", "*"): "pairs would straddle KV groups",
    ("differential dropout", "*", "*"): "only dropout 0 is allowed",
}


def _parts(family: str, settings: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Name → plain data of every kind of a family in every form."""
    found = {}
    for kind in kinds(family):
        for form, values in settings.get(kind, {"": {}}).items():
            found[f"{kind} {form}".strip()] = {"kind": kind, **values}
    return found


ALL_MIXERS = _parts("mixer", MIXERS)
ALL_POSITIONS = _parts("position", POSITIONS)
ALL_PROCESSORS: dict[str, Any] = {"none": None, **_parts("score_processor", PROCESSORS)}


def _takes(mixer: dict[str, Any], field: str) -> bool:
    return field in part_class("mixer", mixer["kind"]).model_fields


COMBINATIONS = [
    (mixer, position, processor)
    for mixer, position, processor in itertools.product(ALL_MIXERS, ALL_POSITIONS, ALL_PROCESSORS)
    if _takes(ALL_MIXERS[mixer], "position") and _takes(ALL_MIXERS[mixer], "score_processor")
]


def _reasons(combination: tuple[str, str, str]) -> list[str]:
    return [
        reason
        for pattern, reason in REFUSED.items()
        if all(fnmatch(name, part) for name, part in zip(combination, pattern, strict=True))
    ]


WORKING = [combination for combination in COMBINATIONS if not _reasons(combination)]


def build(combination: tuple[str, str, str], depth: int) -> Decoder:
    mixer, position, processor = combination
    part = {**ALL_MIXERS[mixer], "position": ALL_POSITIONS[position], "score_processor": ALL_PROCESSORS[processor]}
    config = DecoderConfig.model_validate(
        {
            "width": WIDTH,
            "depth": depth,
            "head_dim": HEAD_DIM,
            "block": {"mixer": part, "feedforward": {"kind": "swiglu", "hidden": 8}},
            "initialisation": {"kind": "normal", "std": 0.3, "scale_residual": False},
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half of one pair is none, which a rotary part says
        return config.build(VOCABULARY, LENGTH, 0)


def tokens(seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def test_every_kind_takes_part() -> None:
    named = {family: {ALL["kind"] for ALL in parts.values() if ALL} for family, parts in _families().items()}
    assert all(named[family] == set(kinds(family)) for family in named)
    for family, settings in (("mixer", MIXERS), ("position", POSITIONS), ("score_processor", PROCESSORS)):
        assert set(settings) <= set(kinds(family))


def _families() -> dict[str, dict[str, Any]]:
    return {"mixer": ALL_MIXERS, "position": ALL_POSITIONS, "score_processor": ALL_PROCESSORS}


@pytest.mark.parametrize("pattern", REFUSED, ids=" + ".join)
def test_what_is_refused_says_why(pattern: tuple[str, str, str]) -> None:
    matching = [c for c in COMBINATIONS if REFUSED[pattern] in _reasons(c)]
    assert matching
    for combination in matching:
        with pytest.raises((ConfigError, ValidationError)) as caught:  # a recipe's loader makes one of the other
            build(combination, depth=1)
        assert any(reason in str(caught.value) for reason in _reasons(combination)), combination


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_trains_and_decodes(mixer: str) -> None:
    """All positions and processors of one mixer: a step through the real optimizer, then step by step = at once."""
    mine = [combination for combination in WORKING if combination[0] == mixer]
    assert mine or all(_reasons(c) for c in COMBINATIONS if c[0] == mixer)
    for combination in mine:
        model = build(combination, depth=2)
        _train(model, combination)
        model.eval()
        if any(getattr(block.mixer.score_processor, "reads_ahead", False) for block in model.blocks):
            _scores_differ_at_edges_only(build(combination, depth=1).eval(), combination)
        else:
            _decodes(model, combination)


def _train(model: Decoder, combination: tuple[str, str, str]) -> None:
    optimizer = parse_part("optimizer", "adamw").build(model)  # type: ignore[attr-defined]
    objective = parse_part("objective", "next-token").build()  # type: ignore[attr-defined]
    batch = Batch(tokens(1), tokens(2))
    before = objective(model, batch).loss
    before.backward()
    missing = [
        name for name, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()
    ]
    assert missing == [], combination
    optimizer.step()
    if model.blocks[0].mixer.dropout == 0:
        with torch.no_grad():
            after = objective(model, batch).loss
        assert after < before, combination


@torch.no_grad()
def _decodes(model: Decoder, combination: tuple[str, str, str]) -> None:
    whole = model(tokens()).hidden_btd
    for pieces in ([1] * LENGTH, [4, 1, 2]):
        state = model.new_state(2, LENGTH)
        steps = torch.cat([model(part, state=state).hidden_btd for part in tokens().split(pieces, dim=1)], dim=1)
        worst = float((steps - whole).abs().max())
        assert worst <= CLOSE * max(1.0, float(whole.abs().max())), (combination, pieces, worst)


@torch.no_grad()
def _scores_differ_at_edges_only(model: Decoder, combination: tuple[str, str, str]) -> None:
    """A processor whose hidden layer is not cut sees beyond the edges of what a query sees; elsewhere nothing differs."""
    mixer: Any = model.blocks[0].mixer
    reach, window = mixer.score_processor.reach, mixer.window or LENGTH
    with observe(model) as record:
        model(tokens())
        whole = record["blocks.0.mixer"].scores
        state, worst, at_edges = model.new_state(2, LENGTH), 0.0, 0.0
        for t in range(LENGTH):
            model(tokens()[:, t : t + 1], state=state)
            step = record["blocks.0.mixer"].scores
            assert whole is not None and step is not None
            first = max(0, t + 1 - window)
            off = (step[:, :, 0, -(t + 1 - first) :] - whole[:, :, t, first : t + 1]).abs().amax(dim=(0, 1))
            edge = torch.zeros(t + 1 - first, dtype=torch.bool)
            edge[len(edge) - reach :] = t < LENGTH - 1  # the last row has no key after it in either form
            edge[:reach] |= first > 0
            worst = max(worst, float(off.masked_fill(edge, 0.0).max()))
            at_edges = max(at_edges, float(off[edge].max()) if edge.any() else 0.0)
    assert worst <= CLOSE * max(1.0, float(whole.abs().max())), (combination, worst)
    assert at_edges > 1e-4, combination  # or the processor would not read ahead, and say so
