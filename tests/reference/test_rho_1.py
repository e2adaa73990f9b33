"""Selective language modelling equals published token weighting: selected tokens, losses, gradients, weights, trajectories.

Cases, sizes and settings are read from the vector file: `slmN_*`, `wN_*` and `trajN_*`, any number of each. Weights come from
UKPLab's code, trajectories from the rule of the paper. Tolerance: 1e-5; masks and categories are equal.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.data.batch import IGNORE
from torchstone.evals.trajectories import categorise
from torchstone.objectives.selection import Evidence, Rule, scored
from torchstone.objectives.selective_loss import selective_loss
from torchstone.objectives.token_weights import PRESETS, TokenWeights

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "rho-1.npz"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SCOPES = {"batch": "global", "sequence": "sequence"}
CATEGORIES = {
    "H→L": "HL",
    "L→H": "LH",
    "L→L": "LL",
    "H→H": "HH",
    "H->L": "HL",
    "L->H": "LH",
    "L->L": "LL",
    "H->H": "HH",
}

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, list[dict[str, Any]]] = json.loads(str(VECTORS["config"])) if VECTORS else {}


def cases(group: str) -> list[int]:
    return list(range(len(CONFIG.get(group, []))))


def _tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name]))


def test_every_part_of_the_file_is_compared() -> None:
    expected = {"config"}
    for prefix, group in (("slm", "slm"), ("w", "weight"), ("traj", "traj")):
        expected |= {name for name in VECTORS for case in cases(group) if name.startswith(f"{prefix}{case}_")}
    assert set(VECTORS) == expected
    assert set(CONFIG) <= {"slm", "weight", "traj"} and any(map(cases, CONFIG))


def _selection(case: int) -> tuple[Rule, Tensor, Tensor]:
    config, prefix = CONFIG["slm"][case], f"slm{case}_"
    rule = Rule(config["ratio"], scope=SCOPES[config["scope"]])  # type: ignore[arg-type]
    valid_bt = _tensor(prefix + "valid").bool()
    targets_bt = _tensor(prefix + "target").long().masked_fill(~valid_bt, IGNORE)
    assert targets_bt.shape == (config["B"], config["T"])
    return rule, targets_bt, valid_bt


@pytest.mark.parametrize("case", cases("slm"))
def test_losses_and_scores(case: int) -> None:
    rule, targets_bt, valid_bt = _selection(case)
    prefix = f"slm{case}_"
    for logits, losses in (("logits", "loss"), ("ref_logits", "ref_loss")):
        found = selective_loss(_tensor(prefix + logits), targets_bt, ratio=1.0)
        torch.testing.assert_close(found.losses_bt[valid_bt], _tensor(prefix + losses)[valid_bt], **CLOSE)
    scores_bt = scored(rule, Evidence(valid_bt, _tensor(prefix + "loss"), _tensor(prefix + "ref_loss")))
    torch.testing.assert_close(scores_bt[valid_bt], _tensor(prefix + "excess")[valid_bt], **CLOSE)


@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden states"])
@pytest.mark.parametrize("case", cases("slm"))
def test_selected_tokens_loss_and_gradient(case: int, hidden: bool) -> None:
    """From logits, and in chunks from hidden states and an output matrix: here the logits and the identity."""
    rule, targets_bt, _ = _selection(case)
    prefix = f"slm{case}_"
    logits_btv = _tensor(prefix + "logits").requires_grad_()
    predictions = (logits_btv, torch.eye(logits_btv.shape[-1])) if hidden else logits_btv
    reference_n = F.cross_entropy(
        _tensor(prefix + "ref_logits").flatten(0, 1), targets_bt.flatten(), ignore_index=IGNORE, reduction="none"
    )
    found = selective_loss(
        predictions, targets_bt, reference_n.view(targets_bt.shape), rule.ratio, scope=rule.scope, chunk=5
    )
    assert torch.equal(found.mask_bt, _tensor(prefix + "selected").bool())
    torch.testing.assert_close(found.loss, _tensor(prefix + "slm_loss"), **CLOSE)
    (gradient,) = torch.autograd.grad(found.loss, [logits_btv])
    torch.testing.assert_close(gradient, _tensor(prefix + "grad_logits"), **CLOSE)


def _pipeline(config: dict[str, Any]) -> TokenWeights:
    known = {
        "transforms",
        "truncation",
        "normalization",
        "sparsification",
        "interpolation",
        "comparison",
        "logit_comparison",
    }
    assert set(config) <= known, f"settings without a counterpart: {set(config) - known}"
    transforms: list[Any] = []
    for step in config.get("transforms") or []:
        name, _, value = step.partition(" ")
        transforms.append({"shift": float(value)} if name == "shift" else {"absolute": "abs"}.get(name, name))
    normalise = config.get("normalization")
    return TokenWeights.model_validate(
        {
            "compare": config.get("comparison") or config.get("logit_comparison") or "difference",
            "transforms": transforms,
            "truncate": config.get("truncation"),
            "sparsify": config.get("sparsification"),
            "normalise": normalise and normalise.lower(),
            # the published code interpolates only where it normalises
            "interpolate": config.get("interpolation") if normalise else None,
        }
    )


@pytest.mark.parametrize("case", cases("weight"))
def test_weights(case: int) -> None:
    found = _pipeline(CONFIG["weight"][case]).weights(_tensor(f"w{case}_long_loss"), _tensor(f"w{case}_short_loss"))
    torch.testing.assert_close(found, _tensor(f"w{case}_weight"), **CLOSE)


def test_selection_over_the_batch_is_a_preset_of_the_pipeline() -> None:
    for case in cases("slm"):
        if CONFIG["slm"][case]["scope"] == "batch":
            prefix, (rule, _, valid_bt) = f"slm{case}_", _selection(case)
            pipeline = PRESETS["slm"].model_copy(update={"sparsify": rule.ratio})
            weights_bt = pipeline.weights(_tensor(prefix + "loss"), _tensor(prefix + "ref_loss"), valid_bt)
            assert torch.equal(weights_bt > 0, _tensor(prefix + "selected").bool())
            mean = (weights_bt * _tensor(prefix + "loss")).sum() / valid_bt.sum()
            torch.testing.assert_close(mean, _tensor(prefix + "slm_loss"), **CLOSE)


@pytest.mark.parametrize("case", cases("traj"))
def test_trajectories(case: int) -> None:
    prefix, config = f"traj{case}_", CONFIG["traj"][case]
    losses_nm = _tensor(prefix + "losses")
    assert losses_nm.shape == (config["N"], config["K"])
    settings = {name: config[name] for name in ("threshold",) if name in config}
    found = categorise(losses_nm, **settings)
    for ours, theirs in (
        (found.fit_start_n, "fit_start"),
        (found.fit_end_n, "fit_end"),
        (found.delta_n, "delta"),
        (found.mean_last, "mean_last"),
    ):
        value = torch.as_tensor(ours, dtype=torch.float64)
        torch.testing.assert_close(value, _tensor(prefix + theirs).double(), **CLOSE)
    names = [CATEGORIES.get(str(name), str(name)) for name in found.category_n]
    assert names == [CATEGORIES.get(str(name), str(name)) for name in VECTORS[prefix + "category"]]
