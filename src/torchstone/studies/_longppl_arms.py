"""Settings and arms of the LongPPL study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchstone.lab.study import Arm, Scale

LONG, PLAIN, LONGCE, CE, MATCHED, TRAINED = "longppl", "ppl", "longce", "ce", "ce-flops", "trained"
READERS = {"models": 16, "documents": 16, "length": 512, "trunc_len": 96, "stride": 32, "alpha": 2.0, "beta": -2.0}
SWEEP = {"trunc_len": [48, 96, 192, 256, 384], "alpha": [0.5, 1.0, 2.0, 3.0], "beta": [-0.5, -1.0, -2.0, -4.0]}
TAGS = {"tags": 8, "fillers": 8, "every": 24, "row": 96, "short": 12, "step_of_windows": 12, "width": 32, "depth": 2,
        "head_dim": 16, "batch": 16, "learning_rate": 3e-3}  # fmt: skip
CODE = {"vocabulary": 4096, "row": 2048, "short": 256, "step_of_windows": 256, "width": 384, "depth": 8, "head_dim": 64,
        "batch": 32, "learning_rate": 6e-4, "base_steps": 1500, "evaluator_steps": 1500, "steps": 300,
        "evaluate": 64}  # fmt: skip
WINDOWS = {"local": 64, "classes": 6, "members": 4, "nearest": 8, "furthest": 320, "length": 384, "widths": [24, 48],
           "windows": [32, 64, 128, 256], "head_dim": 24, "batch": 6, "learning_rate": 1e-2, "steps": 300, "rows": 64,
           "trunc_len": 24, "stride": 8, "alpha": 1.0, "beta": -2.0}  # fmt: skip


def choice(name: str, role: str, note: str, rule: str, **evaluator: Any) -> Arm:
    """A way to choose the tokens that count."""
    return Arm(name, role, note, {"part": "readers", "rule": rule, "evaluator": evaluator})  # type: ignore[arg-type]


def weighted(name: str, role: str, note: str, weights: str, **changes: Any) -> Arm:
    """A way to weigh the loss."""
    plain = {"weights": weights, "gamma": 5.0, "normalize": False, "equal_flops": False}
    return Arm(name, role, note, {"part": "training", **plain, **changes})  # type: ignore[arg-type]


def arms(scale: Scale) -> Sequence[Arm]:
    """Choices of tokens, then losses; the sweeps of γ and of normalisation at gpu scale alone."""
    found = [
        choice(PLAIN, "baseline", "all tokens", "all"),
        choice(LONG, "arm", "key tokens of an evaluator that sees everything", "key"),
        choice("random", "control", "as many tokens at random", "random"),
        choice("by-loss", "control", "as many tokens of the evaluator's highest loss", "loss"),
        choice("short-evaluator", "control", "key tokens of an evaluator that sees 192 tokens", "key", window=192),
        choice("poor-evaluator", "control", "key tokens of an evaluator with a distorted table", "key", sharpness=0.3),
        Arm(TRAINED, "arm", "key tokens, eight trained models", {"part": "windows"}),
        weighted(CE, "control", "cross-entropy, as many steps as LongCE", "none"),
        weighted(MATCHED, "control", "cross-entropy, as many FLOPs as LongCE", "none", equal_flops=True),
        weighted(LONGCE, "arm", "weights min(exp(LSD), 5)", "longce"),
        weighted("shuffled", "control", "LongCE's weights at other tokens", "shuffled"),
        weighted("weights-by-loss", "control", "weights min(exp(loss − mean), 5)", "loss"),
    ]
    if "tags" in scale.settings:
        return found
    bounds = {"gamma-2": 2.0, "gamma-10": 10.0, "gamma-none": None}
    more = [weighted(name, "control", f"LongCE, γ = {gamma}", "longce", gamma=gamma) for name, gamma in bounds.items()]
    return [*found, *more, weighted("normalised", "control", "LongCE, weights of mean 1", "longce", normalize=True)]
