"""Where a Hugging Face attention layer keeps its four projections, by name, and confirmed by what they put out.

The last part of a module's path inside the attention layer decides; a family that uses other words is served by
`open_subject(..., names={"q": "regular expression", ...})`, or for good by a word more in `NAMES`.

    q     q_proj  query  wq  w_q  q_lin  query_proj  to_q         (k and v alike)
    o     o_proj  out_proj  dense  c_proj  wo  w_o  out_lin  output_proj
    qkv   query_key_value  qkv_proj  c_attn  qkv  Wqkv  W_pack    one layer for all three

Fused layers put their rows together in one of two ways, which names do not tell; the values that the layer recorded do:

    joined    all queries, all keys, all values (GPT-2, Phi-3)
    grouped   for every key-value head: its queries, its key, its value (GPT-NeoX, one query a group)

Whatever was found must reproduce what the layer recorded at the first position, where rotation does nothing: values
always, queries and keys up to a common factor unless a norm stands between. So a layer that gates or merges its
projections is an error and not a wrong matrix.

Shapes: n rows · h heads · g key-value heads · d head channels · e value channels · i and o channels of a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchstone.diagnose.subject import Projection, ProjectionName
from torchstone.errors import ConfigError

NAMES: dict[str, str] = {
    "q": r"q_proj|query|wq|w_q|q_lin|query_proj|to_q",
    "k": r"k_proj|key|wk|w_k|k_lin|key_proj|to_k",
    "v": r"v_proj|value|wv|w_v|v_lin|value_proj|to_v",
    "o": r"o_proj|out_proj|dense|c_proj|wo|w_o|out_lin|output_proj",
    "qkv": r"query_key_value|qkv_proj|c_attn|qkv|Wqkv|W_pack",
}
_INPUTS: tuple[ProjectionName, ...] = ("q", "k", "v")
FACTORED = re.compile(r"(q|k|v|kv)_[ab]_proj(_with_mqa)?|kv_a_proj_with_mqa")
WORDS = {"q": "query", "k": "key", "v": "value", "o": "output"}
LIKE = 1e-3  # relative
LIKE_HALF = 5e-2


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer as one pass saw it.

    Attributes:
        path: relative to the attention layer.
        module: the layer.
        input_ni, output_no: at the first position of every row.
        norm: the norm whose output was the input; None if none was.
    """

    path: str
    module: nn.Module
    input_ni: Tensor
    output_no: Tensor
    norm: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Located:
    """A projection of one attention layer.

    Attributes:
        projection: where it is.
        norm: the norm before the layer, or None.
        factor: what the layer multiplies its output by (1, but for queries scaled early and rotations of another length).
    """

    projection: Projection
    norm: nn.Module | None
    factor: float


@dataclass(frozen=True, eq=False)
class Recorded:
    """What the attention layer itself recorded at the first position.

    Attributes:
        q_nhd, k_ngd, v_nge: before rotation has any effect.
        q_normed, k_normed: a norm stands between projection and record.
    """

    q_nhd: Tensor
    k_ngd: Tensor
    v_nge: Tensor
    q_normed: bool
    k_normed: bool


def find_projections(
    name: str, linears: Sequence[Linear], recorded: Recorded, names: Mapping[str, str]
) -> dict[ProjectionName, Located]:
    """The projections of a layer.

    Args:
        name: module path of the attention layer.
        linears: the linear layers inside it that the pass used.
        recorded: what the layer recorded.
        names: patterns that replace those of `NAMES`.

    Raises:
        ConfigError: one is missing, factored into several, or does not reproduce the record.
    """
    patterns = {**NAMES, **names}
    factored = [linear.path for linear in linears if FACTORED.fullmatch(linear.path)]
    if factored:
        raise ConfigError(
            f"{name} factors its projections into {', '.join(factored)} (latent attention), so that it has no query, key "
            "and value matrix of its own; analyses of weights and of their gradients cannot use this model."
        )
    which: ProjectionName
    out = _match(name, linears, "o", patterns)
    found: dict[ProjectionName, tuple[Projection, Linear]] = {"o": (_projection(name, out), out)}
    fused = [] if "q" in names else _matches(linears, patterns["qkv"])
    if fused:
        linear = _match(name, linears, "qkv", patterns)
        for which, rows in _fused_rows(name, linear, recorded).items():
            found[which] = (_projection(name, linear, rows), linear)
    else:
        for which in _INPUTS:
            linear = _match(name, linears, which, patterns)
            found[which] = (_projection(name, linear), linear)
    return {which: _located(name, which, *pair, recorded) for which, pair in found.items()}


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer has no plain floating-point matrix."""
    weight = getattr(module, "weight", None)
    return not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2 or weight.itemsize < 2


def _matches(linears: Sequence[Linear], words: str) -> list[Linear]:
    """The linear layers whose path, or its last part, is one of the words."""
    pattern = re.compile(words)
    return [x for x in linears if pattern.fullmatch(x.path) or pattern.fullmatch(x.path.rpartition(".")[2])]


def _match(name: str, linears: Sequence[Linear], which: str, patterns: Mapping[str, str]) -> Linear:
    """The one linear layer with one of the names."""
    found = _matches(linears, patterns[which])
    if len(found) == 1:
        return found[0]
    there = ", ".join(linear.path for linear in linears) or "none"
    problem = f"found {len(found)} modules for" if found else "could not find"
    raise ConfigError(
        f"{problem} the {WORDS.get(which, which)} projection in {name} (its linear layers: {there}); pass name patterns: "
        f"names={{{which!r}: '...'}}. Adapters such as LoRA must be merged first."
    )


def _projection(name: str, linear: Linear, rows: Tensor | None = None) -> Projection:
    transposed = type(linear.module).__name__ == "Conv1D"
    return Projection(linear.module, f"{name}.{linear.path}.weight", rows, transposed)


def _fused_rows(name: str, fused: Linear, recorded: Recorded) -> dict[ProjectionName, Tensor]:
    """Output features of queries, keys and values in a fused layer."""
    heads, dim = recorded.q_nhd.shape[1:]
    groups, value_dim = recorded.v_nge.shape[1:]
    index = torch.arange(fused.output_no.shape[1])
    sizes = [heads * dim, groups * dim, groups * value_dim]
    if sum(sizes) == len(index):
        joined = index.split(sizes)
        grouped = [part.flatten() for part in index.view(groups, -1).split([size // groups for size in sizes], dim=1)]
        for rows in (joined, grouped):
            if _like(fused.output_no[:, rows[2]], recorded.v_nge):
                return dict(zip(_INPUTS, rows, strict=True))
    raise ConfigError(
        f"{name}.{fused.path} puts out {len(index)} features for {heads} query and {groups} key-value heads of {dim} "
        "channels, and neither known order of its rows gives the layer's values; this family needs a reading of its own."
    )


def _located(name: str, which: ProjectionName, projection: Projection, linear: Linear, recorded: Recorded) -> Located:
    """Compare a projection with what the layer recorded and with its own matrix."""
    out_no = linear.output_no if projection.rows is None else linear.output_no[:, projection.rows]
    factor, same = 1.0, True
    if which == "v":
        same = _like(out_no, recorded.v_nge)
    elif which in ("q", "k"):
        record = recorded.q_nhd if which == "q" else recorded.k_ngd
        same = out_no.numel() == record.numel()
        if same and not (recorded.q_normed if which == "q" else recorded.k_normed):
            factor = _factor(out_no, record)
            same = _like(factor * out_no, record)
    if same and not is_quantised(linear.module):
        same = _like(_product(projection, linear), out_no)
    if not same:
        raise ConfigError(
            f"the {WORDS[which]} projection of {name} was taken to be {linear.path}, whose output is not what the layer "
            f"uses; if another module is meant, pass name patterns: names={{{which!r}: '...'}}. Gates, merged heads and "
            "unmerged adapters between the two cannot be analysed."
        )
    return Located(projection, linear.norm, factor)


def _factor(output: Tensor, record: Tensor) -> float:
    """The number that takes an output closest to a record; 1 where it is 1 within rounding."""
    x, y = output.double().flatten(), record.double().flatten()
    factor = float(x @ y / (x @ x).clamp_min(torch.finfo(torch.float64).tiny))
    coarse = min(output.dtype.itemsize, record.dtype.itemsize) < 4
    return 1.0 if abs(factor - 1) < (1e-2 if coarse else 1e-5) else factor


def _product(projection: Projection, linear: Linear) -> Tensor:
    """The projection's matrix and bias applied to the input that the pass saw."""
    out_no = linear.input_ni.double() @ projection.weight().double().cpu().T
    bias = getattr(linear.module, "bias", None)
    if bias is None:
        return out_no
    bias = bias.detach().double().cpu()
    return out_no + (bias if projection.rows is None else bias[projection.rows])


def _like(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel():
        return False
    coarse = min(a.dtype.itemsize, b.dtype.itemsize) < 4
    a, b = a.double().flatten(), b.double().flatten()
    return float((a - b).norm()) <= (LIKE_HALF if coarse else LIKE) * float(b.norm()) + 1e-12
