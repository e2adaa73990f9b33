"""Distance scores, parts of logits and ablations equal the reference vectors: every entry of the file that is no input.

Sizes, heads and thresholds are read from the file's configuration. Planned tolerance: 1e-5, relative to the largest entry.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchstone.diagnose.adapters.ablation import Ablation, ablate_heads
from torchstone.diagnose.distance import scores
from torchstone.diagnose.distance.attended_pairs import LayerInputs, add_attended
from torchstone.diagnose.distance.sums import DistanceSums, SumsBuilder
from torchstone.diagnose.rotary.pairs import contribution, logit_parts
from torchstone.nn.context import BuildContext
from torchstone.nn.span import Span
from torchstone.recipe.registry import parse_part

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "positional-heads.npz"
TOLERANCE = 1e-5
WEIGHTS = "w."
INPUTS = {"x", "cos", "sin", "pair_q", "pair_k", "config"}

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, Any] = json.loads(str(VECTORS["config"])) if VECTORS else {}
OUTPUTS = sorted(name for name in VECTORS if name not in INPUTS and not name.startswith(WEIGHTS))


def _tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name])).double()


def _projected(which: str, heads: int) -> Tensor:
    """Heads [b, h, t, d] of a projection, repeated to one per query head."""
    out_btn = _tensor("x") @ _tensor(f"w.{which}_proj.weight").T
    split_bhtd = out_btn.unflatten(-1, (heads, CONFIG["head_dim"])).transpose(1, 2)
    return split_bhtd.repeat_interleave(CONFIG["heads"] // heads, dim=1)


def _rotated(x_bhtd: Tensor) -> Tensor:
    first, second = x_bhtd.chunk(2, dim=-1)
    return x_bhtd * _tensor("cos") + torch.cat([-second, first], dim=-1) * _tensor("sin")


def _layer() -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = CONFIG["kv_heads"]
    return _rotated(_projected("q", CONFIG["heads"])), _rotated(_projected("k", kv_heads)), _projected("v", kv_heads)


def _inputs(sequence: int) -> LayerInputs:
    q_bhtd, k_bhsd, v_bhse = _layer()
    scale = CONFIG["head_dim"] ** -0.5
    return LayerInputs(q_bhtd[sequence], k_bhsd[sequence], v_bhse[sequence], None, None, scale, None)


def _weights() -> Tensor:
    rows = range(len(VECTORS["x"]))
    return torch.stack([_inputs(sequence).rows(range(CONFIG["len"])) for sequence in rows])


def _sums() -> DistanceSums:
    length, pairs = CONFIG["len"], CONFIG["head_dim"] // 2
    builder = SumsBuilder(CONFIG["heads"], pairs, length, (1,), CONFIG["far_frac"], torch.device("cpu"))
    for sequence in range(len(VECTORS["x"])):
        add_attended(_inputs(sequence), builder, skip_sink=0, keys=None)
    return builder.sums()


def _output(mode: str | None) -> Tensor:
    """The layer's output, with the file's heads ablated."""
    heads_bthe = (_weights() @ _layer()[2]).transpose(1, 2)
    if mode is not None:
        request = Ablation({0: tuple(CONFIG["mask_heads"])}, mode, None)  # type: ignore[arg-type]
        heads_bthe = ablate_heads(heads_bthe, 0, [request], windowed=lambda heads, window: pytest.fail("no window"))
    return heads_bthe.flatten(2) @ _tensor("w.o_proj.weight").T


def _ours(name: str) -> Tensor:
    if name == "contribution":
        queries_n, keys_n = (torch.from_numpy(VECTORS[key]).long() for key in ("pair_q", "pair_k"))
        return contribution(*_layer()[:2], queries_n, keys_n)
    if name.startswith("logit_parts_b"):
        sequence = int(name.removeprefix("logit_parts_b"))
        q_bhtd, k_bhsd, _ = _layer()
        return logit_parts(q_bhtd[sequence : sequence + 1], k_bhsd[sequence : sequence + 1])[0]
    if name == "probs":
        return _weights()
    if name == "mean_distance":
        return scores.mean_distance(_sums())
    if name in ("far_profile", "usage_profile"):
        return getattr(scores, name)(_sums())
    if name.startswith("score_"):
        return scores.score_named(name.removeprefix("score_"))(_sums())
    modes = {"attn_out": None, "attn_out_masked": "zero", "attn_out_mean_ablated": "mean"}
    return _output(modes[name])


def _close(ours: Tensor, name: str) -> None:
    expected = _tensor(name)
    assert ours.shape == expected.shape
    largest = float(expected.abs().nan_to_num().max())
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=TOLERANCE * largest, equal_nan=True)


def test_the_file_has_something_to_compare() -> None:
    assert OUTPUTS


@pytest.mark.parametrize("name", OUTPUTS)
def test_entry(name: str) -> None:
    _close(_ours(name), name)


def test_the_attention_mixer_gives_the_same_layer() -> None:
    """torchstone's own attention, with the file's weights, computes what was analysed."""
    part = {
        "kind": "attention", "heads": CONFIG["heads"], "kv_heads": CONFIG["kv_heads"], "head_dim": CONFIG["head_dim"],
        "position": {"kind": "rotary", "layout": "half", "base": CONFIG["theta"]},
    }  # fmt: skip
    context = BuildContext(CONFIG["embed"], CONFIG["head_dim"], depth=1, layer=0, vocab_size=1, length=CONFIG["len"])
    mixer = parse_part("mixer", part).build(context)
    mixer.load_state_dict({f"w_{name}.weight": _tensor(f"w.{name}_proj.weight").float() for name in "qkvo"})
    with torch.no_grad():
        y_btd, _ = mixer(_tensor("x").float(), Span())
    _close(y_btd, "attn_out")
