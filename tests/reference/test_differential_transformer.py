"""Differential attention equals its authors' code, and plain attention their baseline: outputs and gradients.

Cases, sizes and settings are read from the vector file; nothing here knows how many there are. Planned tolerances: 2e-5
absolute on outputs, 1e-4 of the largest entry on gradients.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchstone.nn.attention.adaptive_temperature import (
    adaptive_softmax,
    attention_entropy,
    inverse_temperature,
)
from torchstone.nn.attention.differential_v1 import DifferentialV1, scheduled_lambda
from torchstone.nn.attention.observe import observe
from torchstone.nn.context import BuildContext
from torchstone.nn.position.rotary import Rotary
from torchstone.nn.span import Span
from torchstone.recipe.registry import parse_part

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "differential-transformer.npz"
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")

OUR_NAMES = {
    "q_proj.weight": "w_q.weight",
    "k_proj.weight": "w_k.weight",
    "v_proj.weight": "w_v.weight",
    "out_proj.weight": "w_o.weight",
    "o_proj.weight": "w_o.weight",
    "lambda_proj.weight": "w_lambda.weight",
    "subln.weight": "norm.gain",
}


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, dict[str, Any]] = json.loads(str(VECTORS["config"])) if VECTORS else {}
# every output in the file: (case, prefix of its results), such as ("v1_mha", "v1_mha/flash/")
OUTPUTS = sorted((name.split("/")[0], name.removesuffix("out")) for name in VECTORS if name.endswith("/out"))


def _tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name]))


def _mixer(case: str, prefix: str) -> nn.Module:
    """The mixer of a case with the case's weights."""
    config = CONFIG[case]
    width, heads = config["embed_dim"], config["num_heads"]
    part: dict[str, Any] = {
        "kind": "attention" if config["kind"] == "base" else "differential",
        "heads": heads,
        "kv_heads": config.get("num_kv_heads"),
        "head_dim": config.get("head_dim"),
        "position": {"kind": "rotary", "layout": "interleaved", "base": config.get("rope_base", 10000.0)},
    }
    if config["kind"] != "base":
        part["version"] = config["kind"]
    if prefix.endswith("/naive/"):
        part["kv_pairing"] = "naive"
    layer = config.get("depth", 0)
    context = BuildContext(width, width // heads, layer + 1, layer, vocab_size=1, length=config["len"])
    mixer = parse_part("mixer", part).build(context)
    weights = {name: _tensor(name) for name in VECTORS if name.startswith(f"{case}/w.")}
    named = {name.removeprefix(f"{case}/w."): weight for name, weight in weights.items()}
    mixer.load_state_dict({OUR_NAMES.get(name, name): weight for name, weight in named.items()})
    return mixer


def _span(case: str) -> Span:
    if f"{case}/attn_mask" not in VECTORS:
        return Span()
    additive = _tensor(f"{case}/attn_mask")
    assert bool(((additive == 0) | (additive == -torch.inf)).all()), "only 0 and -inf are masks"
    return Span(allowed_bts=additive == 0)


def _close(ours: Tensor, name: str, tolerance: float) -> None:
    theirs = _tensor(name)
    assert ours.shape == theirs.shape
    worst = float((ours.detach() - theirs).abs().max())
    assert worst <= tolerance, f"{name}: largest difference {worst:.3g}, allowed {tolerance:.3g}"


def _gradient_tolerance(name: str, floor: float) -> float:
    return max(GRADIENT_TOLERANCE * float(_tensor(name).abs().max()), floor)


def _noise_floor(theirs: dict[str, str]) -> float:
    """Rounding of sums of entries as large as the case's largest gradient: a tenth of what that one may be off.

    With one token the softmax is constant, and gradients of queries, keys and λ are 0 in exact arithmetic: what the
    file holds for them is the rounding noise of its own order of summation, and a share of it means nothing.
    """
    lengths = {_tensor(name).shape[1] for label, name in theirs.items() if _tensor(name).dim() == 3}
    if lengths != {1}:
        return 0.0
    return 0.1 * GRADIENT_TOLERANCE * max(float(np.abs(VECTORS[name]).max()) for name in theirs.values())


def test_every_case_is_compared() -> None:
    assert CONFIG and {case for case, _ in OUTPUTS} == set(CONFIG)
    assert {config["kind"] for config in CONFIG.values()} <= {"v1", "v2", "base"}


@pytest.mark.parametrize("core", ["fast", "eager"])
@pytest.mark.parametrize(("case", "prefix"), OUTPUTS, ids=lambda value: value.strip("/"))
def test_outputs_and_gradients(case: str, prefix: str, core: str) -> None:
    mixer = _mixer(case, prefix)
    x = _tensor(f"{case}/x").requires_grad_()
    with observe(mixer) if core == "eager" else nullcontext():
        out, _ = mixer(x, _span(case))
    _close(out, f"{prefix}out", OUTPUT_TOLERANCE)
    theirs = _gradients(prefix)
    if not theirs:  # some outputs come alone (naive pairing)
        return
    out.backward(_tensor(f"{case}/cotangent"))
    ours = {"grad_x": x.grad} | {name: parameter.grad for name, parameter in mixer.named_parameters()}
    assert set(ours) == set(theirs)
    floor = _noise_floor(theirs)
    for name, gradient in ours.items():
        assert gradient is not None
        _close(gradient, theirs[name], _gradient_tolerance(theirs[name], floor))


def _gradients(prefix: str) -> dict[str, str]:
    """Our name of everything that has a gradient in the file → the name of that gradient."""
    start = f"{prefix}g."
    names = [name.removeprefix(start) for name in VECTORS if name.startswith(start)]
    found = {OUR_NAMES.get(name, name): start + name for name in names}
    return found | ({"grad_x": f"{prefix}grad_x"} if f"{prefix}grad_x" in VECTORS else {})


@pytest.mark.parametrize("case", sorted(CONFIG))
def test_rotary_tables(case: str) -> None:
    cos = _tensor(f"{case}/cos")
    rotary = Rotary(2 * cos.shape[1], CONFIG[case].get("rope_base", 10000.0), "interleaved")
    cos_t1c, sin_t1c = rotary.tables(Span(), cos.shape[0], 0, cos.device)
    torch.testing.assert_close(cos_t1c[:, 0], cos, atol=2e-6, rtol=0)
    torch.testing.assert_close(sin_t1c[:, 0], _tensor(f"{case}/sin"), atol=2e-6, rtol=0)


@pytest.mark.parametrize("case", [case for case in sorted(CONFIG) if CONFIG[case]["kind"] == "v1"])
def test_lambda(case: str) -> None:
    mixer = _mixer(case, f"{case}/flash/")
    assert isinstance(mixer, DifferentialV1)
    assert mixer.lambda_init == pytest.approx(float(VECTORS[f"{case}/lambda_init"]), abs=1e-6)
    assert mixer.diagnostics()["lambda"] == pytest.approx(float(VECTORS[f"{case}/lambda_full"]), abs=1e-6)


def test_lambda_schedule() -> None:
    table = VECTORS["lambda_init_table"]
    ours = [scheduled_lambda(layer) for layer in range(len(table))]
    np.testing.assert_allclose(ours, table, atol=1e-6)


@pytest.mark.parametrize("form", ["logits", "maps"])
def test_adaptive_temperature(form: str) -> None:
    logits = _tensor("adaptive_temperature/logits")
    entropy = attention_entropy(logits.softmax(dim=-1))
    torch.testing.assert_close(entropy, _tensor("adaptive_temperature/entropy"), atol=2e-5, rtol=0)
    torch.testing.assert_close(inverse_temperature(entropy), _tensor("adaptive_temperature/beta"), atol=2e-5, rtol=0)
    given = logits if form == "logits" else logits.log_softmax(dim=-1)
    torch.testing.assert_close(adaptive_softmax(given), _tensor("adaptive_temperature/probs"), atol=2e-5, rtol=0)
