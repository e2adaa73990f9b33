"""Looking into attention: `with observe(model) as record:` records q, k, scores, maps and head outputs.

    with torch.no_grad(), observe(model) as record:
        model(tokens_bt)
    record["blocks.0.mixer"].weights        # [b, h, t, s]

Inside the block every mixer that can be observed runs its eager core, whose numbers equal the fast path's within
float error. Outside nothing changes and nothing is kept. Each forward pass replaces what the one before recorded.

Pitfalls: maps need h·t·s numbers per row and layer, and tensors keep their graph unless `no_grad` is on. Observe the
plain module, not its compiled version, which would recompile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from torchstone.errors import ConfigError


@dataclass
class Observation:
    """What one mixer computed in its last forward pass. Letters as in `nn.attention.core`.

    Attributes:
        q, k: [b, u, t, d] and [b, u, s, d] after normalisation and rotation, key heads repeated. Channels are in the
            order of `Position.arrange`: under rotation, first members of all pairs, then second members.
        v: [b, h, s, e], value heads repeated.
        scores: [b, u, t, s] in fp32, scaled, with the position's bias and whatever a score processor made of both;
            before the mask.
        maps: [b, u, t, s] in fp32, each a softmax.
        weights: [b, h, t, s], what multiplies the values of each head: `maps` for plain attention, where u = h; the
            signed difference of two maps for differential attention, where u = 2h.
        heads: [b, t, h, e], per-head outputs as they enter the output projection.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    scores: Tensor | None = None
    maps: Tensor | None = None
    weights: Tensor | None = None
    heads: Tensor | None = None


class Observable(nn.Module):
    """Base of mixers that can be observed: `observation` is None except inside `observe`."""

    def __init__(self) -> None:
        super().__init__()
        self.observation: Observation | None = None


@contextmanager
def observe(model: nn.Module) -> Iterator[dict[str, Observation]]:
    """Record every observable mixer inside the block; yields module name → observation.

    Raises:
        ConfigError: the model has nothing that can be observed.
    """
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, Observable)}
    if not mixers:
        raise ConfigError(
            f"{type(model).__name__} has no mixer that can be observed; give a model with attention "
            "(kinds `attention` or `differential`)."
        )
    previous = {name: mixer.observation for name, mixer in mixers.items()}
    record = {name: Observation() for name in mixers}
    try:
        for name, mixer in mixers.items():
            mixer.observation = record[name]
        yield record
    finally:
        for name, mixer in mixers.items():
            mixer.observation = previous[name]
