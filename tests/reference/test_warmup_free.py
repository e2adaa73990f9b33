"""Rotational updates equal the authors' code: centring, trajectories of weights, angles of rows and layers.

Cases, shapes, steps and settings are read from the vector file; nothing here knows how many there are. Tolerances: 3e-5 absolute
on weights, 1e-3 rad on angles. Every case runs with the compiled kernel and with tensor operations.
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
from updates import both_ways

from torchstone.optim.rotational import Rotational

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "warmup-free.npz"
WEIGHTS, ANGLES = 3e-5, 1e-3
INNER = {"rot_lion": "lion", "rot_adamw": "adamw", "rot_sgd": "sgdm", "rot_sgdm": "sgdm"}
INNER |= {"wrap_lion": "lion", "wrap_adamw": "adamw", "wrap_sgdm": "sgdm", "wrap_sgd": "sgdm"}

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CASES: list[dict[str, Any]] = json.loads(str(VECTORS["config"])) if VECTORS else []

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['kind']}")


def _tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name])).float()


def _prefixes(case: dict[str, Any]) -> list[str]:
    return [f"c{case['case']}_p{index}" for index in range(len(case["shapes"]))]


def _optimizer(case: dict[str, Any], parameters: list[nn.Parameter], fused: bool) -> Rotational:
    settings = {
        key: case[key] for key in ("weight_decay", "per_neuron", "zero_mean", "betas", "momentum", "eps") if key in case
    }
    u = case["update_norm_decay_factor"]
    return Rotational(parameters, INNER[case["kind"]], lr=1.0, update_norm_decay=u, fused=fused, **settings)


def test_everything_is_compared() -> None:
    known = {"config"}
    for case in CASES:
        assert case["kind"] in INNER
        known.add(f"c{case['case']}_lr")
        for prefix, shape in zip(_prefixes(case), case["shapes"], strict=True):
            known |= {f"{prefix}_{what}" for what in ("init", "centered", "grad", "traj")}
            known |= {f"{prefix}_{what}_angle" for what in ("neuron", "layer") if len(shape) > 1}
    assert CASES and set(VECTORS) == known


def _angle(before: Tensor, after: Tensor) -> Tensor:
    """Between rows of the last dimension, in float64."""
    return torch.acos(torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1))


@every_case
@both_ways
def test_trajectory(case: dict[str, Any], fused: bool) -> None:
    prefixes = _prefixes(case)
    parameters = [nn.Parameter(_tensor(f"{prefix}_init").clone()) for prefix in prefixes]
    optimizer = _optimizer(case, parameters, fused)
    for prefix, parameter in zip(prefixes, parameters, strict=True):
        torch.testing.assert_close(parameter.detach(), _tensor(f"{prefix}_centered"), atol=WEIGHTS, rtol=0)
    for step, rate in enumerate(_tensor(f"c{case['case']}_lr").tolist()):
        before = [parameter.detach().clone() for parameter in parameters]
        for prefix, parameter in zip(prefixes, parameters, strict=True):
            parameter.grad = _tensor(f"{prefix}_grad")[step]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for prefix, parameter, old in zip(prefixes, parameters, before, strict=True):
            new = parameter.detach()
            torch.testing.assert_close(new, _tensor(f"{prefix}_traj")[step], atol=WEIGHTS, rtol=0)
            if parameter.dim() > 1:
                rows, layer = _tensor(f"{prefix}_neuron_angle")[step], _tensor(f"{prefix}_layer_angle")[step]
                torch.testing.assert_close(_angle(old.flatten(1), new.flatten(1)).float(), rows, atol=ANGLES, rtol=0)
                torch.testing.assert_close(_angle(old.flatten(), new.flatten()).float(), layer, atol=ANGLES, rtol=0)
