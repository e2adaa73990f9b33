"""Partial rotations equal the reference of the p-RoPE authors and of Hugging Face: frequencies, rotation, logits, heads.

Cases, shares p and sizes are read from the vector file; nothing here knows how many there are. Planned tolerances: 1e-5
(relative for frequencies, the slowest of which are smaller than that), and 1e-3 beyond position 1000, where angles of the
reference, computed in fp32, are that far off.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.nn.position.ladder import Variant, kept_pairs
from torchstone.nn.position.rotary import Layout, Rotary, turn
from torchstone.nn.span import Span

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "p-rope.npz"
NEAR, FAR, FAR_POSITION = 1e-5, 1e-3, 1000

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, Any] = json.loads(str(VECTORS["config"])) if VECTORS else {}
# every share: what stands before its names, such as "p0.25/" (or "case/p0.25/")
SHARES = sorted(name.removesuffix("inv_freq") for name in VECTORS if re.search(r"(^|/)p[0-9.]+/inv_freq$", name))
HEADS = sorted(name.removesuffix("amp") for name in VECTORS if re.search(r"(^|/)head/amp$", name))


def _tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name]))


def _case(prefix: str) -> tuple[str, float]:
    """What stands before the names of the case, and the share."""
    match = re.fullmatch(r"(.*?)p([0-9.]+)/", prefix)
    assert match is not None
    return match[1], float(match[2])


def _settings(case: str) -> dict[str, Any]:
    return CONFIG.get(case.strip("/"), CONFIG)


def _rotary(prefix: str, variant: Variant, layout: Layout = "half") -> Rotary:
    case, p = _case(prefix)
    settings = _settings(case)
    head_dim = int(settings["head_dim"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file may hold shares that cut a pair, or keep none
        return Rotary(head_dim, float(settings["theta"]), layout, variant, p, float(settings.get("scale", 1.0)))


def _limit(position: Tensor, size: Tensor) -> Tensor:
    """What an entry at a position may be off."""
    return torch.where(position > FAR_POSITION, FAR, NEAR) * size.abs().max().clamp_min(1.0)


def test_every_share_is_compared() -> None:
    assert SHARES and HEADS
    named = {name.rsplit("/", 1)[0] + "/" for name in VECTORS if name.endswith(("/q_rot", "/k_rot", "/logits"))}
    assert named == set(SHARES)


@pytest.mark.parametrize("prefix", SHARES)
def test_frequencies(prefix: str) -> None:
    settings = _settings(_case(prefix)[0])
    # frequencies may be told before interpolation, as in the paper, or after it, as by Hugging Face: the fastest decides
    scale = float(settings.get("scale", 1.0)) if float(_tensor(f"{prefix}inv_freq").max()) == 1 else 1.0
    pairs = int(settings["head_dim"]) // 2
    for variant, name in (("p", "inv_freq"), ("reversed", "inv_freq_reversed")):
        ours = _rotary(prefix, variant).frequencies() * scale
        assert ours.shape == (pairs,)
        torch.testing.assert_close(ours.float(), _tensor(prefix + name), atol=0, rtol=NEAR)
    theirs = _tensor(f"{prefix}inv_freq_partial")
    assert len(theirs) == kept_pairs(int(settings["head_dim"]), _case(prefix)[1])
    if len(theirs) == 0:
        with pytest.raises(ConfigError, match="2r = 0"):
            _rotary(prefix, "partial")
        return
    ours = _rotary(prefix, "partial").frequencies() * scale
    torch.testing.assert_close(ours[: len(theirs)].float(), theirs, atol=0, rtol=NEAR)
    assert not ours[len(theirs) :].any()


@pytest.mark.parametrize("prefix", SHARES)
def test_rotation_and_logits(prefix: str) -> None:
    case, _ = _case(prefix)
    q, k, positions_bt = (_tensor(f"{case}{name}") for name in ("q", "k", "positions"))
    rotary, span = _rotary(prefix, "p"), Span(positions_bt=positions_bt.long())
    turned = rotary.rotate(q, k, span, 0)
    for ours, name in zip(turned, ("q_rot", "k_rot"), strict=True):
        theirs = _tensor(prefix + name)
        assert ours.shape == theirs.shape
        off = (ours - theirs).abs().amax(dim=(2, 3))
        assert (off <= _limit(positions_bt, theirs)).all(), f"{prefix}{name}: off by {float(off.max()):.3g}"
    _check_logits(prefix, *turned, positions_bt)


@pytest.mark.parametrize("prefix", SHARES)
def test_logits_of_interleaved_weights(prefix: str) -> None:
    """The same weights in the other layout, arranged as a mixer arranges them, give the same logits."""
    case, _ = _case(prefix)
    q, k, positions_bt = (_tensor(f"{case}{name}") for name in ("q", "k", "positions"))
    rotary = _rotary(prefix, "p", "interleaved")
    pairs = q.shape[-1] // 2
    interleaved = [x.unflatten(-1, (2, pairs)).transpose(-1, -2).flatten(-2) for x in (q, k)]
    arranged = [x[..., rotary.order()] for x in interleaved]
    assert torch.equal(arranged[0], q)
    _check_logits(prefix, *rotary.rotate(*arranged, Span(positions_bt=positions_bt.long()), 0), positions_bt)


def _check_logits(prefix: str, q_btnd: Tensor, k_bsnd: Tensor, positions_bt: Tensor) -> None:
    ours = torch.einsum("btnd,bsnd->bnts", q_btnd, k_bsnd) / q_btnd.shape[-1] ** 0.5
    theirs = _tensor(f"{prefix}logits")
    farther = torch.maximum(positions_bt[:, None, :, None], positions_bt[:, None, None, :])
    off = (ours - theirs).abs()
    assert (off <= _limit(farther, theirs)).all(), f"{prefix}logits: off by {float(off.max()):.3g}"


@pytest.mark.parametrize("back", [0, 1], ids=["diag", "prev"])
@pytest.mark.parametrize("prefix", HEADS)
def test_constructed_heads(prefix: str, back: int) -> None:
    """One frequency, the same vector at every token: queries look `back` tokens back."""
    frequency = _tensor(f"{prefix}g").double()
    for amplitude, theirs in zip(_tensor(f"{prefix}amp"), _tensor(prefix + ("diag", "prev")[back]), strict=True):
        length = theirs.shape[-1]
        psi = torch.tensor([float(amplitude) ** 0.5, 0.0], dtype=torch.float64).expand(length, 2)
        angles = [(torch.arange(length) + shift).double()[:, None] * frequency for shift in (0, back)]
        q, k = (turn(psi, angle.cos(), angle.sin(), "half") for angle in angles)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        ours = (q @ k.T).masked_fill(hidden, -torch.inf).softmax(-1)
        torch.testing.assert_close(ours.float(), theirs, atol=NEAR, rtol=0)


@pytest.mark.parametrize("variant", ["full", "p", "partial", "reversed"])
@pytest.mark.parametrize("first", [1000, 4090, 131_000])
def test_golden_positions(variant: Variant, first: int) -> None:
    """Far from the start, where a wrong denominator or pairing shows, against the formula in double precision."""
    head_dim, base, p = 16, 10_000.0, 1.0 if variant == "full" else 0.5
    rotary = Rotary(head_dim, base, "half", variant, p)
    x = torch.randn(1, 6, 2, head_dim, generator=torch.Generator().manual_seed(0))
    turned = rotary.rotate(x, x, Span(), first)[0]
    kept, pairs = (8, 8) if variant == "full" else (4, 8)
    steps = range(pairs - kept, pairs) if variant == "reversed" else range(kept)
    denominator = 2 * kept if variant == "partial" else head_dim
    expected = x.double().clone()
    for t in range(6):
        for m in steps:
            phi = torch.tensor((first + t) * base ** (-2 * m / denominator), dtype=torch.float64)
            a, b = x[0, t, :, m].double(), x[0, t, :, m + pairs].double()
            expected[0, t, :, m] = a * phi.cos() - b * phi.sin()
            expected[0, t, :, m + pairs] = b * phi.cos() + a * phi.sin()
    torch.testing.assert_close(turned.double(), expected, atol=1e-6, rtol=1e-6)


def test_hugging_face_proportional() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import _compute_proportional_rope_parameters

    for head_dim, p, factor in ((16, 0.25, 1.0), (64, 0.75, 4.0), (256, 0.25, 1.0), (20, 0.33, 1.0)):
        parameters = {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": p,
            "factor": factor,
        }
        config = transformers.LlamaConfig(
            hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=parameters
        )
        theirs, _ = _compute_proportional_rope_parameters(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = Rotary(head_dim, 1e6, "half", "p", p, factor).frequencies()
        torch.testing.assert_close(ours.float(), theirs, atol=0, rtol=NEAR)


def test_gpt_neox_partial() -> None:
    """Rotation of the first lanes of a head, as GPT-NeoX does it, through arranged lanes."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

    head_dim, length, first = 16, 5, 2000
    for p in (0.25, 0.5, 1.0):
        parameters = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": p}
        config = transformers.GPTNeoXConfig(hidden_size=2 * head_dim, num_attention_heads=2, rope_parameters=parameters)
        q, k = torch.randn(2, 1, length, 2, head_dim, generator=torch.Generator().manual_seed(0)).unbind(0)
        cos, sin = GPTNeoXRotaryEmbedding(config)(q, torch.arange(first, first + length)[None])
        theirs = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        rotary = Rotary(head_dim, 10_000.0, "half", "partial", p)
        order = rotary.order()
        ours = rotary.rotate(q[..., order], k[..., order], Span(), first)
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left, right[..., order], atol=FAR, rtol=0)
            near = rotary.rotate(q[..., order], k[..., order], Span(), 1)[0]
            assert p == 1 or (near - q[..., order]).abs().amax((0, 1, 2)).count_nonzero() == 2 * kept_pairs(head_dim, p)
