"""How a Hugging Face layer turns its queries and keys, read from the model and confirmed by what it does.

Models disagree on which channels make a pair, how many channels turn, and which of several tables a layer uses. None of
that is a setting that could be read for every family. So every table of frequencies that the model holds is tried with
every layout, and the one that reproduces the layer is taken: when all tokens of a row are the same and attention mixes
nothing in, every position has the same query before rotation, and

    recorded query at position t = R(t) · recorded query at position 0,   R(t) turns pair m by t · frequency_m

Layouts, r frequencies on d channels:
    half          channels m and m + r (Llama, GPT-NeoX, Phi; with r < d/2 the channels from 2r on do not turn)
    interleaved   channels 2m and 2m + 1 (Cohere, GLM)

Shapes: n rows · h heads · t positions · d head channels · r frequencies · m = d/2 pairs.

Pitfalls
- Tables that depend on the length of the input (dynamic scaling, LongRoPE) are those of short inputs.
- Where no table fits, the layer's rotation is unknown, which is an error and not "none".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchstone.diagnose.subject import Rotation

Layout = Literal["half", "interleaved"]
LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")
UNCHANGED = 1e-5  # relative; the same matrix product at two positions
TURNED = 2e-3  # relative; angles in fp32 besides
HALF_PRECISION = 3e-2


@dataclass(frozen=True, eq=False)
class Table:
    """Frequencies that a model holds.

    Attributes:
        frequencies_r: fp64, radians per token.
        theta: what the configuration states as base, or None.
        kind: how the configuration scales them ("llama3", "yarn", …); empty for a plain ladder.
    """

    frequencies_r: Tensor
    theta: float | None
    kind: str


@dataclass(frozen=True, eq=False)
class Reading:
    """What is known of a layer's rotation.

    Attributes:
        rotation: None where the layer does not turn, or where `problem` says why it could not be read.
        order_d: channels of the model in half order; None where they are in it already.
        problem: empty where the reading is confirmed.
    """

    rotation: Rotation | None
    order_d: Tensor | None = None
    problem: str = ""


def frequency_tables(model: nn.Module, config: Any) -> list[Table]:
    """The different frequency tables of a model, with what its configuration says of them."""
    tables: list[Table] = []
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1:
            frequencies_r = buffer.detach().double().cpu()
            if not any(torch.equal(frequencies_r, known.frequencies_r) for known in tables):
                tables.append(Table(frequencies_r, *_stated(config, name.rpartition(".")[2])))
    return tables


def read_rotation(x_nhtd: Tensor, tables: Sequence[Table], name: str) -> Reading:
    """The rotation that takes position 0 of `x_nhtd` to all its positions.

    Args:
        x_nhtd: queries and keys as recorded, of rows of equal tokens.
        tables: from `frequency_tables`.
        name: the layer, for the problem.
    """
    coarse = x_nhtd.dtype.itemsize < 4
    x_nhtd = x_nhtd.detach().double().cpu()
    first_nh1d = x_nhtd[:, :, :1]
    size = float(x_nhtd.norm())
    if size == 0 or not math.isfinite(size):
        return Reading(None, problem=f"{name} has queries and keys that are all zero or not finite")
    if float((x_nhtd - first_nh1d).norm()) <= (HALF_PRECISION if coarse else UNCHANGED) * size:
        return Reading(None)
    dim = x_nhtd.shape[-1]
    tried = [(table, layout) for table in tables for layout in LAYOUTS if 2 * len(table.frequencies_r) <= dim]
    errors = [_error(x_nhtd, table.frequencies_r, layout) / size for table, layout in tried]
    if errors and min(errors) <= (HALF_PRECISION if coarse else TURNED):
        return _reading(*tried[errors.index(min(errors))], dim)
    lengths = x_nhtd.norm(dim=-1)
    turns = float((lengths - lengths[:, :, :1]).norm()) <= TURNED * size
    if tables or turns:
        return Reading(
            None, problem=f"{name} changes queries and keys in a way that none of {len(tried)} readings explains"
        )
    return Reading(None)  # positions are added to the residual stream


def half_order(dim: int, turning: int, layout: Layout) -> Tensor:
    """Channels in half order, int64 [d], where the first `turning` pairs turn; the other pairs follow in the same layout."""
    pairs_m2 = torch.cat([_pairs(0, turning, layout), _pairs(2 * turning, dim // 2 - turning, layout)])
    return pairs_m2.T.flatten()


def rotate(x_td: Tensor, frequencies_m: Tensor, positions_t: Tensor) -> Tensor:
    """Vectors [..., t, d] in half order, turned to their positions."""
    angle_tm = positions_t.to(frequencies_m.dtype)[:, None] * frequencies_m.to(x_td.device)
    first, second = x_td.chunk(2, dim=-1)
    cos, sin = angle_tm.cos(), angle_tm.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _pairs(start: int, count: int, layout: Layout) -> Tensor:
    index_m = torch.arange(count)
    if layout == "half":
        return start + torch.stack([index_m, index_m + count], dim=1)
    return start + torch.stack([2 * index_m, 2 * index_m + 1], dim=1)


def _frequencies(table_r: Tensor, dim: int) -> Tensor:
    return torch.cat([table_r, table_r.new_zeros(dim // 2 - len(table_r))])


def _error(x_nhtd: Tensor, table_r: Tensor, layout: Layout) -> float:
    dim = x_nhtd.shape[-1]
    ordered = x_nhtd[..., half_order(dim, len(table_r), layout)]
    positions_t = torch.arange(x_nhtd.shape[2])
    return float((ordered - rotate(ordered[:, :, :1], _frequencies(table_r, dim), positions_t)).norm())


def _reading(table: Table, layout: Layout, dim: int) -> Reading:
    frequencies_r = table.frequencies_r
    order_d = half_order(dim, len(frequencies_r), layout)
    in_order = torch.equal(order_d, torch.arange(dim))
    ladder = _base(frequencies_r)
    base = table.theta if ladder is None else ladder
    turning = 2 * int((frequencies_r != 0).sum())
    words = ["rotary", "full" if turning == dim else f"{turning} of {dim} channels", layout]
    words += [] if base is None else [f"base {base:g}"]
    words += [table.kind] if table.kind else []
    rotation = Rotation(_frequencies(frequencies_r, dim), ", ".join(words), base)
    return Reading(rotation, None if in_order else order_d)


def _base(table_r: Tensor) -> float | None:
    """θ of a plain ladder θ^(−m/r), zeros at its end left out; None for any other table."""
    ladder = table_r[table_r != 0]
    if len(ladder) < 2 or not math.isclose(float(ladder[0]), 1.0, rel_tol=1e-6):
        return None
    base = float((ladder[-1] / ladder[0]) ** (-len(table_r) / (len(ladder) - 1)))
    plain = base ** (-torch.arange(len(ladder), dtype=torch.float64) / len(table_r))
    return float(f"{base:.6g}") if torch.allclose(plain, ladder, rtol=1e-5) else None


def _stated(config: Any, buffer: str) -> tuple[float | None, str]:
    """Base and kind of scaling in a configuration, for all layers alike or by kind of layer."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if any(isinstance(value, dict) for value in settings.values()):
        settings = settings.get(buffer.removesuffix("_inv_freq")) or {}
    theta = settings.get("rope_theta", getattr(config, "rope_theta", None))
    kind = settings.get("rope_type", "default")
    return None if theta is None else float(theta), "" if kind == "default" else str(kind)
