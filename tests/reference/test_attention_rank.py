"""Ranks, balance, descent and decay groups give the numbers of the reference file.

Every case comes from the file: the values of λ, heads, spectra and parameters that it names, however many. Planned
tolerances: 1e-5 relative plus 1e-7 absolute; integer ranks exact.
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

from torchstone.diagnose.ranks.head_products import HeadProducts, balance
from torchstone.diagnose.spectra import spectral_metrics
from torchstone.nn.roles import Role, Roles
from torchstone.optim.adamw import AdamWConfig
from torchstone.optim.weight_decay import WeightDecay
from torchstone.studies._factor_descent import factor_descent

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "attention-rank.npz"

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")

OUR_METRICS = {"fro": "frobenius", "pseudo_rank_energy": "energy_rank"}
INTEGERS = {"pseudo_rank", "energy_rank", "numeric_rank"}


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, Any] = json.loads(str(VECTORS["config"])) if VECTORS else {}


def _tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name])).double()


def _names(prefix: str) -> list[str]:
    return sorted(name.removeprefix(prefix) for name in VECTORS if name.startswith(prefix))


def _close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach().double(), theirs, rtol=1e-5, atol=1e-7)


def _compare_metrics(values: Tensor, theirs: Tensor) -> None:
    """All metrics of spectra […, n] with their columns […, metric]."""
    ours = spectral_metrics(values, CONFIG["frac"])
    names = [OUR_METRICS.get(name, name) for name in json.loads(str(VECTORS["heads/metric_names"]))]
    assert theirs.shape[-1] == len(names)
    for column, name in enumerate(names):
        if name in INTEGERS:
            assert torch.equal(ours[name], theirs[..., column]), name
        else:
            _close(ours[name], theirs[..., column])


# Exact gradient descent ---------------------------------------------------------------------------

DECAYS = _names("gd/lam")


@pytest.mark.parametrize("name", DECAYS)
def test_descent_takes_the_same_path(name: str) -> None:
    record = CONFIG["record"]
    found = factor_descent(
        _tensor("gd/A0_f64"),
        _tensor("gd/B0_f64"),
        torch.diag(torch.tensor(CONFIG["diag"], dtype=torch.float64)),
        rate=CONFIG["lr"],
        decay=float(name),
        record=record,
    )
    rows = torch.column_stack(
        [
            torch.tensor(record, dtype=torch.float64),
            found.nuclear,
            found.half_frobenius,
            found.imbalance,
            found.loss,
            found.values,
        ]
    )
    _close(rows, _tensor(f"gd/lam{name}"))


def test_every_value_of_the_decay_is_compared() -> None:
    assert sorted(map(float, DECAYS)) == sorted(map(float, CONFIG["lam"]))


def test_the_stored_start_is_the_exact_one_rounded() -> None:
    for factor in ("A0", "B0"):
        assert torch.equal(_tensor(f"gd/{factor}_f64").float().double(), _tensor(f"gd/{factor}"))


# Heads --------------------------------------------------------------------------------------------


def _factors() -> dict[str, Tensor]:
    heads, groups, size = CONFIG["heads"], CONFIG["kv_heads"], CONFIG["head_dim"]
    counts = {"q": heads, "k": groups, "v": groups, "o": heads}
    found = {}
    for which, count in counts.items():
        weight = _tensor(f"w.{which}")
        found[which] = (weight.T if which == "o" else weight).reshape(count, size, CONFIG["embed"])
    return found


def _products() -> list[HeadProducts]:
    w = _factors()
    return [HeadProducts(w["k"], w["q"]), HeadProducts(w["v"], w["o"])]


def test_singular_values_of_every_head() -> None:
    ours = torch.stack([product.singular_values() for product in _products()], dim=1)
    _close(ours, _tensor("heads/singular_values"))


def test_metrics_of_every_head() -> None:
    ours = torch.stack([product.singular_values() for product in _products()], dim=1)
    _compare_metrics(ours, _tensor("heads/metrics"))


@pytest.mark.parametrize("head", range(CONFIG.get("heads", 0)))
def test_balance_of_one_head(head: int) -> None:
    w = _factors()
    group = head * CONFIG["kv_heads"] // CONFIG["heads"]
    found = balance(w["k"][group : group + 1], w["q"][head : head + 1])
    _close(found.half_frobenius[0], _tensor(f"head{head}/half_frobenius_qk"))
    _close(found.imbalance[0], _tensor(f"head{head}/imbalance_qk"))


def test_every_head_of_the_file_is_compared() -> None:
    known = {f"{head}/{name}" for head in range(CONFIG["heads"]) for name in ("half_frobenius_qk", "imbalance_qk")}
    assert set(_names("head")) - {name for name in _names("head") if name.startswith("s/")} == known


# Spectra ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(CONFIG.get("spectra", ()))))
def test_metrics_of_edge_cases(index: int) -> None:
    exact = torch.tensor(CONFIG["spectra"][index], dtype=torch.float64)
    assert torch.equal(exact.float().double(), _tensor(f"spectrum{index}/s"))
    _compare_metrics(exact, _tensor(f"spectrum{index}/metrics"))


def test_every_spectrum_is_compared() -> None:
    assert {name.split("/")[0] for name in _names("spectrum")} == {str(i) for i in range(len(CONFIG["spectra"]))}


# AdamW --------------------------------------------------------------------------------------------

PARAMETERS = _names("adamw/init.")


def _role(name: str) -> Role | None:
    """What the file's parameter is; None for one that no decay reaches: a vector, or a norm's gain whatever its shape."""
    module = name.split(".")[-2]
    if VECTORS[f"adamw/init.{name}"].ndim < 2:
        return None
    if module in ("q_proj", "k_proj"):
        return "attention_qk"
    if module in ("v_proj", "o_proj"):
        return "attention_vo"
    return "embeddings" if "embed" in module else None if "norm" in module else "mlp"


class Parameters(nn.Module):
    """The file's parameters with what their modules would declare."""

    def __init__(self) -> None:
        super().__init__()
        values = {name.replace(".", "/"): nn.Parameter(_tensor(f"adamw/init.{name}").float()) for name in PARAMETERS}
        self.values = nn.ParameterDict(values)

    def parameter_roles(self) -> Roles:
        roles = {f"values.{name.replace('.', '/')}": _role(name) for name in PARAMETERS}
        return {name: role for name, role in roles.items() if role is not None}

    def no_decay_parameters(self) -> tuple[str, ...]:
        return tuple(f"values.{name.replace('.', '/')}" for name in PARAMETERS if _role(name) is None)


def test_every_group_decays_its_own_way() -> None:
    decay = CONFIG["wd"]
    model = Parameters()
    settings = WeightDecay(
        default=decay["rest"], attention_qk=decay["qk"], attention_vo=decay["vo"], embeddings=decay["none"]
    )
    optimizer = AdamWConfig(learning_rate=CONFIG["adam_lr"], weight_decay=settings).build(model)
    for step in range(CONFIG["adam_steps"]):
        for name in PARAMETERS:
            model.values[name.replace(".", "/")].grad = _tensor(f"adamw/grads.{name}")[step].float()
        optimizer.step()
    for name in PARAMETERS:
        _close(model.values[name.replace(".", "/")], _tensor(f"adamw/final.{name}"))
