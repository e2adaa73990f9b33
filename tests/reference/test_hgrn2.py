"""HGRN2 equals published code: the recurrence, lower bounds, layers and the authors' unit, with all gradients in the file.

Cases, sizes and settings are read from the vector file: `op.*`, `bounds.*`, any number of layers `layerN.*`, and `unit.*`.
Layer 0 has no lower bound; layer N has row N of `bounds.value`, both from Γ itself and as one row given. Tolerances: 5e-5
absolute and 1e-4 relative, for the unit 1e-5 absolute.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchstone.nn.context import BuildContext
from torchstone.nn.recurrence.gated_linear import gated_linear_attention, gated_linear_recurrence
from torchstone.nn.recurrence.gated_linear_reference import reference_gated_linear_attention
from torchstone.nn.recurrence.hgrn2 import HGRN2, HGRN2Config
from torchstone.nn.recurrence.lower_bounds import NAME, LowerBounds
from torchstone.nn.span import Span

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "hgrn2.npz"
OP, UNIT, EXACT = (5e-5, 1e-4), (1e-5, 0.0), (1e-6, 1e-6)  # absolute and relative
OUR_NAMES = {
    "q_proj.weight": "w_q.weight",
    "f_proj.weight": "w_f.weight",
    "i_proj.weight": "w_i.weight",
    "o_proj.weight": "w_o.weight",
    "g_norm.weight": "norm.gain",
    "out_proj.weight": "w_o.weight",
    "out_proj.bias": "w_o.bias",
    "norm.weight": "norm.gain",
    "norm.bias": "norm.bias",
}

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, Any] = json.loads(str(VECTORS["config"])) if VECTORS else {}
LAYERS = sorted({int(found[1]) for name in VECTORS if (found := re.match(r"layer(\d+)\.", name))})
PATHS: dict[str, Any] = {
    "reference": reference_gated_linear_attention,
    "recurrence": gated_linear_recurrence,
    "chunks": gated_linear_attention,
    **{f"chunks of {size}": partial(gated_linear_attention, chunk=size) for size in (1, 4, 32)},
}


def _tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name]))


def _close(ours: Tensor | None, theirs: Tensor, tolerance: tuple[float, float]) -> None:
    assert ours is not None
    torch.testing.assert_close(ours, theirs, atol=tolerance[0], rtol=tolerance[1])


def _gradients(prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in VECTORS if name.startswith(prefix)}


def test_every_part_of_the_file_is_compared() -> None:
    groups = {name.split(".")[0] for name in VECTORS} - {"config"}
    assert groups == {"op", "bounds", "unit"} | {f"layer{layer}" for layer in LAYERS}
    assert 0 in LAYERS and len(LAYERS) > 1
    assert float(_tensor("op.log_f").min()) == CONFIG["min_log_f"]
    assert _tensor("bounds.value").shape == (CONFIG["num_layers"], CONFIG["hidden_size"])


@pytest.mark.parametrize("path", PATHS)
def test_operator_and_gradients(path: str) -> None:
    inputs = {name: _tensor(f"op.{name}").requires_grad_() for name in ("q", "k", "v", "log_f", "h0")}
    o, last = PATHS[path](*inputs.values())
    _close(o, _tensor("op.o"), OP)
    _close(last, _tensor("op.hT"), OP)
    ((o * _tensor("op.w_o")).sum() + (last * _tensor("op.w_h")).sum()).backward()
    assert _gradients("op.grad.") == set(inputs)
    for name, value in inputs.items():
        _close(value.grad, _tensor(f"op.grad.{name}"), OP)


def _bounds(gamma: Tensor) -> LowerBounds:
    bounds = LowerBounds(*gamma.shape)
    bounds.load_state_dict({"gamma": gamma})
    return bounds


def test_lower_bounds() -> None:
    bounds, value = _bounds(_tensor("bounds.gamma")), _tensor("bounds.value")
    _close(bounds.values(), value, EXACT)
    for layer in range(1, len(value)):
        beta_d, rest_d = bounds(layer)
        _close(beta_d, value[layer], EXACT)
        _close(rest_d, 1 - value[layer], EXACT)
    fill = bounds.own_initialisation()["gamma"]
    with torch.no_grad():
        fill(bounds.gamma, torch.Generator())
    _close(bounds.values(), _tensor("bounds.at_init"), EXACT)


def _context(width: int, layer: int) -> BuildContext:
    shared = torch.nn.ModuleDict({NAME: _bounds(_tensor("bounds.gamma"))})
    return BuildContext(width, width, CONFIG["num_layers"], layer, 2, 2, shared=shared)


def _load(mixer: HGRN2, prefix: str) -> None:
    theirs = {name.removeprefix(prefix): _tensor(name) for name in VECTORS if name.startswith(prefix)}
    for kind in ("weight", "bias"):  # of one projection, with rows in the order i, q, f
        fused = theirs.pop(f"in_proj.{kind}", None)
        if fused is not None:
            theirs |= {f"{letter}_proj.{kind}": part for letter, part in zip("iqf", fused.chunk(3), strict=True)}
    names = OUR_NAMES | {f"{letter}_proj.bias": f"w_{letter}.bias" for letter in "qfi"}
    mixer.load_state_dict({names[name]: value for name, value in theirs.items()})


@pytest.mark.parametrize("mode", ["auto", "recurrent"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_and_gradients(layer: int, mode: str) -> None:
    settings = {"expand_ratio": CONFIG["expand_ratio"], "norm_eps": CONFIG["norm_eps_effective"], "mode": mode}
    mixer = HGRN2Config.model_validate(settings).build(_context(CONFIG["hidden_size"], layer))
    _load(mixer, f"layer{layer}.param.")
    x = _tensor(f"layer{layer}.x").requires_grad_()
    q, v, k, g = mixer.gates(x)
    for name, found in {"q": q, "k": k, "v": v, "g": g}.items():
        inner = _tensor(f"layer{layer}.inner.{name}")
        _close(found.view_as(inner), inner, OP)
    y, _ = mixer(x, Span())
    _close(y, _tensor(f"layer{layer}.y"), OP)
    (y * _tensor(f"layer{layer}.w")).sum().backward()
    ours = dict(mixer.named_parameters())
    expected = _gradients(f"layer{layer}.grad.")
    assert expected == {"x", *(name for name in OUR_NAMES if name in _gradients(f"layer{layer}.param."))}
    for name in expected:
        gradient = x.grad if name == "x" else ours[OUR_NAMES[name]].grad
        _close(gradient, _tensor(f"layer{layer}.grad.{name}"), OP)


@pytest.mark.parametrize("mode", ["auto", "recurrent"])
@pytest.mark.parametrize("bounded", [True, False])
def test_unit(bounded: bool, mode: str) -> None:
    width, layer = CONFIG["unit_dim"], 1
    settings: dict[str, Any] = {
        "variant": "unit",
        "expand_ratio": CONFIG["unit_expand"],
        "norm_eps": 1e-5,
        "mode": mode,
    }
    settings["lower_bound"] = "learned" if bounded else "none"
    bound = _tensor("unit.lower_bound")
    gamma = torch.stack([torch.log1p(-bound), bound.log()])  # of two layers, so that the upper one has this bound
    shared = torch.nn.ModuleDict({NAME: _bounds(gamma)})
    mixer = HGRN2Config.model_validate(settings).build(BuildContext(width, width, 2, layer, 2, 2, shared=shared))
    _load(mixer, "unit.param.")
    x_btd = _tensor("unit.x").transpose(0, 1).requires_grad_()
    y_btd, _ = mixer(x_btd, Span())
    _close(y_btd.transpose(0, 1), _tensor("unit.y" if bounded else "unit.y_zero_bound"), UNIT)
