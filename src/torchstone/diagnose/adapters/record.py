"""Who looks during a pass, at which layers, and with or without attention maps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torchstone.diagnose.finite import require_finite
from torchstone.diagnose.subject import Activations, AttentionLayer, Look
from torchstone.errors import ConfigError


def make_recorder(
    known: Sequence[AttentionLayer], look: Look, weights: bool, layers: Collection[int] | None
) -> Recorder:
    """One visit; raises ConfigError for a layer that does not exist."""
    absent = sorted(set(layers or ()) - {layer.index for layer in known})
    if absent:
        raise ConfigError(f"layer {absent[0]} does not exist; attention layers are 0 to {len(known) - 1}.")
    return Recorder(look, weights, layers)


@dataclass
class Recorder:
    """One `visit`. While `look` runs nothing is shown, so that it may run the model again.

    Attributes:
        look: called with every wanted layer.
        weights: whether maps are wanted.
        layers: indices of wanted layers; None for all.
    """

    look: Look
    weights: bool
    layers: Collection[int] | None
    _looking: bool = False

    def wants(self, layer: AttentionLayer) -> bool:
        """Whether this layer is to be shown."""
        return not self._looking and (self.layers is None or layer.index in self.layers)

    def show(self, layer: AttentionLayer, seen: Activations) -> None:
        """Call `look`; raises DataError where an activation is not finite."""
        tensors = {"queries": seen.q_bhtd, "keys": seen.k_bhsd, "values": seen.v_bhse}
        tensors["outputs"] = seen.heads_bthe.transpose(1, 2)
        require_finite(layer.index, layer.name, tensors)
        self._looking = True
        try:
            self.look(layer, seen)
        finally:
            self._looking = False
