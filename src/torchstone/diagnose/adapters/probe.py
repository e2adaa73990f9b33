"""One small pass that finds a Hugging Face model's attention layers and reads their shapes, rotation and projections.

Rows of one repeated token go through the model while the seam answers every attention call with the values themselves.
All positions then hold the same numbers in every layer, save for what positions add, so that the queries which each
layer hands over show its rotation and nothing else (`rotation`), whatever masks, sinks or caps the family has. Hooks note
the linear layers and norms on the way.

Shapes: n rows · t positions · h query heads · g key-value heads · d head channels · e value channels.

Pitfall: models that mix positions in other ways (recurrent layers, convolutions) differ between positions for reasons of
their own; the rotation of their later layers is then reported as unknown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchstone.diagnose.adapters.gains import is_norm
from torchstone.diagnose.adapters.projections import Linear, Located, Recorded, find_projections
from torchstone.diagnose.adapters.rotation import Reading, Table, frequency_tables, read_rotation
from torchstone.diagnose.adapters.seam import Call, Seam, repeat_heads
from torchstone.diagnose.subject import ProjectionName
from torchstone.errors import ConfigError

ROWS, POSITIONS = 3, 16


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """What the pass found out about one attention layer.

    Attributes:
        module, name: the attention module and its path.
        heads, kv_heads, head_dim, value_dim, scale, window: as handed over.
        reading: its rotation.
        q_norm, k_norm: norms on queries and on keys.
        projections: by name; or the error that says why there are none.
        others: settings handed over that the seam does not know.
    """

    module: nn.Module
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None
    reading: Reading
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    projections: dict[ProjectionName, Located] | ConfigError
    others: tuple[str, ...]


@dataclass(eq=False)
class _Trace:
    """Events of one pass."""

    calls: list[Call] = field(default_factory=list)
    linears: dict[str, Linear] = field(default_factory=dict)
    norms: set[str] = field(default_factory=set)
    attention: list[str] = field(default_factory=list)
    recent: deque[tuple[nn.Module, Tensor]] = field(default_factory=lambda: deque(maxlen=4))


@torch.no_grad()
def probe(model: Any, seam: Seam, vocab_size: int, names: Mapping[str, str]) -> list[LayerFacts]:
    """Facts of all attention layers, in the order in which they are computed.

    Raises:
        ConfigError: a layer computes attention without the interface, or is computed twice.
    """
    trace = _Trace()

    def receive(call: Call) -> Tensor:
        trace.calls.append(_shortened(call))
        return repeat_heads(call.v_bgse, call.q_bhtd.shape[1]).transpose(1, 2)

    row_n1 = torch.linspace(0, vocab_size - 1, ROWS + 2, device=next(model.parameters()).device)[1:-1, None].long()
    with _watched(model, trace), seam.open(receive):
        run(model, row_n1.expand(ROWS, POSITIONS).contiguous())
    paths = {module: name for name, module in model.named_modules()}
    called = [paths[call.module] for call in trace.calls]
    _require_interface(model, trace, called)
    tables = frequency_tables(model, model.config.get_text_config())
    return [_facts(call, name, trace, tables, names) for call, name in zip(trace.calls, called, strict=True)]


def _shortened(call: Call) -> Call:
    """A call without its mask, which the pass does not need."""
    return Call(
        call.module, call.q_bhtd.clone(), call.k_bgsd.clone(), call.v_bgse[:, :, :1].clone(), None, call.scale,
        call.causal, call.softcap, call.sinks_h, call.window, call.others,
    )  # fmt: skip


def _require_interface(model: nn.Module, trace: _Trace, called: list[str]) -> None:
    """Raise for attention modules that ran and are no part of a layer that called."""

    def covered(name: str) -> bool:
        return any(name == c or name.startswith(c + ".") or c.startswith(name + ".") for c in called)

    missing = [name for name in trace.attention if not covered(name)]
    if missing or not called:
        module = f"{missing[0]} ({type(model.get_submodule(missing[0])).__name__})" if missing else type(model).__name__
        raise ConfigError(
            f"{module} computes attention without transformers' attention interface, so that its queries, keys and heads "
            "cannot be seen; this needs a model whose eager attention goes through the interface, perhaps in a newer "
            "version of transformers."
        )
    twice = [name for i, name in enumerate(called) if name in called[:i]]
    if twice:
        raise ConfigError(
            f"{twice[0]} is computed more than once in a pass; models that repeat layers cannot be analysed."
        )


def run(module: Any, tokens_bt: Tensor) -> Any:
    """One pass of a model or its trunk over rows without padding, which is said, lest models guess it from the ids."""
    return module(input_ids=tokens_bt, attention_mask=torch.ones_like(tokens_bt), use_cache=False)


@contextmanager
def _watched(model: nn.Module, trace: _Trace) -> Iterator[None]:
    """Note linear layers, norms and attention modules as they run."""
    handles = []
    for name, module in model.named_modules():
        if "attention" in type(module).__name__.lower():
            handles.append(module.register_forward_hook(_note_attention(name, trace)))
        if is_norm(module):
            handles.append(module.register_forward_hook(_note_norm(name, trace)))
        elif _is_linear(module):
            handles.append(module.register_forward_hook(_note_linear(name, trace)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_linear(module: nn.Module) -> bool:
    """Linear layers of any make: torch's, GPT-2's, quantised ones."""
    if isinstance(module, nn.Embedding) or any(True for _ in module.children()):
        return False
    weight = getattr(module, "weight", None)
    return (
        hasattr(module, "in_features")
        or (isinstance(weight, Tensor) and weight.dim() == 2)
        or hasattr(module, "qweight")
    )


Hook = Callable[[nn.Module, Any, Any], None]


def _note_attention(name: str, trace: _Trace) -> Hook:
    return lambda module, inputs, output: trace.attention.append(name)


def _note_norm(name: str, trace: _Trace) -> Hook:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        trace.norms.add(name)
        if isinstance(output, Tensor):
            trace.recent.append((module, output))

    return note


def _note_linear(name: str, trace: _Trace) -> Hook:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or x.shape[:2] != (ROWS, POSITIONS):
            return  # a router, or experts that see some of the tokens
        norm = next((m for m, y in reversed(trace.recent) if y.data_ptr() == x.data_ptr() and y.shape == x.shape), None)
        trace.linears[name] = Linear(name, module, x[:, 0].clone(), output[:, 0].clone(), norm)

    return note


def _facts(call: Call, name: str, trace: _Trace, tables: Sequence[Table], names: Mapping[str, str]) -> LayerFacts:
    inside = name + "."
    linears = [
        Linear(x.path.removeprefix(inside), x.module, x.input_ni.cpu(), x.output_no.cpu(), x.norm)
        for x in trace.linears.values()
        if x.path.startswith(inside)
    ]
    norms = {
        path.removeprefix(inside): call.module.get_submodule(path.removeprefix(inside))
        for path in trace.norms
        if path.startswith(inside)
    }
    q_norm, k_norm = _named(norms, "q"), _named(norms, "k")
    recorded = Recorded(
        call.q_bhtd[:, :, 0].cpu(),
        call.k_bgsd[:, :, 0].cpu(),
        call.v_bgse[:, :, 0].cpu(),
        q_norm is not None,
        k_norm is not None,
    )
    found: dict[ProjectionName, Located] | ConfigError
    try:
        _require_known_norms(name, norms)
        found = find_projections(name, linears, recorded, names)
    except ConfigError as error:
        found = error
    return LayerFacts(
        call.module,
        name,
        heads=call.q_bhtd.shape[1],
        kv_heads=call.k_bgsd.shape[1],
        head_dim=call.q_bhtd.shape[3],
        value_dim=call.v_bgse.shape[3],
        scale=call.scale,
        window=call.window,
        reading=read_rotation(torch.cat([call.q_bhtd, call.k_bgsd], dim=1), tables, name),
        q_norm=q_norm,
        k_norm=k_norm,
        projections=found,
        others=call.others,
    )


def _named(norms: Mapping[str, nn.Module], letter: str) -> nn.Module | None:
    """The norm on queries or on keys: q_norm, k_layernorm, query_layernorm, qk_norm, …"""
    starts = (letter, "qk")
    return next((module for path, module in norms.items() if path.rpartition(".")[2].startswith(starts)), None)


def _require_known_norms(name: str, norms: Mapping[str, nn.Module]) -> None:
    other = [path for path in norms if not path.rpartition(".")[2].startswith(("q", "k"))]
    if other:
        raise ConfigError(
            f"{name} has the norm {other[0]} besides those on queries and keys, so that its matrices do not say what the "
            "layer computes; analyses of weights cannot use this model."
        )
