"""DAPE and its bases equal their authors' code: scores, maps, gradients.

Cases, sizes and kinds are read from the vector file; nothing here knows how many there are. A kind is a base (alibi,
kerple, fire, nope, rope), and `_dape1` or `_dape2` behind it where its scores are processed. The file starts from scores,
after any rotation. Planned tolerance: 2e-5 (a share of
the largest entry where that is above 1).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchstone.nn.attention.dape import DAPEConfig
from torchstone.nn.position.base import BiasedPosition, Offsets, PositionContext
from torchstone.nn.position.fire import FIRE
from torchstone.recipe.registry import parse_part

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "dape-v2.npz"
TOLERANCE = 2e-5
UNBIASED = {"nope", "rope"}

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")

# of the base ("position") and of the processor, by the names of the file
OUR_NAMES = {
    "bias_p": "position.p",
    "bias_a": "position.a",
    "c": "position.c",
    "L_multiplier": "position.m",
    "mlp.0.weight": "position.network.hidden_weight",
    "mlp.0.bias": "position.network.hidden_bias",
    "mlp.2.weight": "position.network.out_weight",
    "mlp.2.bias": "position.network.out_bias",
    "mlp2.0.weight": "processor.conv1.weight",
    "mlp2.0.bias": "processor.conv1.bias",
    "mlp2.2.weight": "processor.conv2.weight",
    "mlp2.2.bias": "processor.conv2.bias",
}


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, dict[str, Any]] = json.loads(str(VECTORS["config"])) if VECTORS else {}

every_case = pytest.mark.parametrize("case", sorted(CONFIG))


def _tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name]))


def _named(case: str, prefix: str) -> dict[str, str]:
    """Our name of each parameter of a case → its name in the file, for weights ("w.") or gradients ("g.")."""
    start = f"{case}/{prefix}"
    names = [name for name in VECTORS if name.startswith(start) and not name.endswith("/w.init_L")]
    return {OUR_NAMES[name.removeprefix(start)]: name for name in names}


class _Scores(nn.Module):
    """A base and the processor on it, where a case has one."""

    def __init__(self, case: str) -> None:
        super().__init__()
        config = CONFIG[case]
        base, _, version = config["kind"].partition("_dape")
        self.position = None
        if base not in UNBIASED:
            part: dict[str, Any] = {"kind": base}
            if base == "fire":
                part["width"] = _tensor(f"{case}/w.mlp.0.weight").shape[0]
            context = PositionContext(config["width"], config["heads"], config["train_len"], processed=bool(version))
            self.position = parse_part("position", part).build(context)
        self.processor = None
        if version:
            kernel = {} if version == "1" else {"kernel": config["kernel"], "mask_hidden": config["kernel"] == 1}
            width = _tensor(f"{case}/w.mlp2.0.weight").shape[0]
            self.processor = DAPEConfig.model_validate({"version": f"v{version}", "width": width, **kernel}).build(
                config["heads"], base not in UNBIASED
            )

    def forward(self, scores_bhts: Tensor) -> Tensor:
        """What the softmax reads."""
        tokens = torch.arange(scores_bhts.shape[-1])
        distance_ts = tokens[:, None] - tokens
        bias = None if self.position is None else self.position.bias(Offsets(distance_ts, tokens)).unsqueeze(0)
        if self.processor is not None:
            return self.processor(scores_bhts, bias, (distance_ts >= 0)[None, None])
        assert bias is not None
        return scores_bhts + bias


def _scores(case: str) -> _Scores:
    model = _Scores(case)
    ours = model.state_dict()
    named = _named(case, "w.")
    assert set(ours) == set(named)
    model.load_state_dict({name: _tensor(theirs).reshape(ours[name].shape) for name, theirs in named.items()})
    return model


def _close(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape
    worst = float((ours.detach() - theirs).abs().max())
    allowed = TOLERANCE * max(1.0, float(theirs.abs().max()))
    assert worst <= allowed, f"{what}: largest difference {worst:.3g}, allowed {allowed:.3g}"


def test_every_case_is_compared() -> None:
    assert CONFIG and {name.split("/")[0] for name in VECTORS if "/" in name} == set(CONFIG)


@every_case
def test_outputs_maps_and_gradients(case: str) -> None:
    model = _scores(case)
    scores = _tensor(f"{case}/scores").requires_grad_()
    out = model(scores)
    _close(out.tril(), _tensor(f"{case}/out").tril(), f"{case}/out")
    later = torch.ones(out.shape[-2:], dtype=torch.bool).triu(1)
    _close(out.masked_fill(later, -torch.inf).softmax(-1), _tensor(f"{case}/probs"), f"{case}/probs")
    out.backward(_tensor(f"{case}/cotangent"))
    assert scores.grad is not None
    _close(scores.grad, _tensor(f"{case}/grad_scores"), f"{case}/grad_scores")
    ours, named = dict(model.named_parameters()), _named(case, "g.")
    assert set(ours) == set(named)
    for name, theirs in named.items():
        gradient = ours[name].grad
        assert gradient is not None
        _close(gradient, _tensor(theirs).reshape(gradient.shape), theirs)


@every_case
def test_constants(case: str) -> None:
    position = _Scores(case).position
    if f"{case}/b.slopes" in VECTORS:
        tokens = torch.arange(2)
        assert isinstance(position, BiasedPosition)
        bias_hts = position.bias(Offsets(tokens[:, None] - tokens, tokens))
        _close(-bias_hts[:, 1, 0], _tensor(f"{case}/b.slopes").flatten(), f"{case}/b.slopes")
    if f"{case}/w.init_L" in VECTORS:
        assert isinstance(position, FIRE)
        assert position.threshold == float(_tensor(f"{case}/w.init_L"))
