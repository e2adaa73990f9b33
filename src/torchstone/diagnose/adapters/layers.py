"""An attention layer of a Hugging Face model, as `probe` found it."""

from __future__ import annotations

from torch import Tensor

from torchstone.diagnose.adapters.gains import head_gain, measure_gain
from torchstone.diagnose.adapters.probe import LayerFacts
from torchstone.diagnose.adapters.projections import Located, is_quantised
from torchstone.diagnose.subject import AttentionLayer, HeadWeights, Projection, ProjectionName, Rotation
from torchstone.errors import ConfigError


class HuggingFaceLayer(AttentionLayer):
    """See `AttentionLayer`.

    Attributes:
        facts: what the pass found.
        scale: factor of q·k in the scores.
    """

    def __init__(self, index: int, facts: LayerFacts) -> None:
        self.index, self.facts, self.name = index, facts, facts.name
        self.heads, self.kv_heads = facts.heads, facts.kv_heads
        self.head_dim, self.value_dim = facts.head_dim, facts.value_dim
        self.window, self.scale = facts.window, facts.scale

    @property
    def rotation(self) -> Rotation | None:  # type: ignore[override]
        """See `AttentionLayer`. Raises ConfigError where the layer rotates in a way that could not be read."""
        if self.facts.reading.problem:
            raise ConfigError(
                f"the rotation of {self.facts.reading.problem}; frequencies are known for rotation with a table `inv_freq` "
                "in half or interleaved layout, in models whose layers mix positions through attention alone."
            )
        return self.facts.reading.rotation

    def projection(self, which: ProjectionName) -> Projection:
        """See `AttentionLayer`."""
        return self._located(which).projection

    def weights(self) -> HeadWeights:
        """See `AttentionLayer`."""
        q, k, v, o = (self._matrix("q"), self._matrix("k"), self._matrix("v"), self._matrix("o"))
        q_hdw = q.unflatten(0, (self.heads, self.head_dim))
        k_gdw = k.unflatten(0, (self.kv_heads, self.head_dim))
        v_gew = v.unflatten(0, (self.kv_heads, self.value_dim))
        facts = self.facts
        q_hdw = q_hdw * head_gain(facts.q_norm, self.heads, self.head_dim).unsqueeze(-1).to(q.device)
        k_gdw = k_gdw * head_gain(facts.k_norm, self.kv_heads, self.head_dim).unsqueeze(-1).to(k.device)
        order_d = facts.reading.order_d
        if order_d is not None:
            q_hdw, k_gdw = q_hdw[:, order_d.to(q.device)], k_gdw[:, order_d.to(k.device)]
        norm = self._located("q").norm
        if norm is not None:
            gain_w = measure_gain(norm, (q.shape[1],)).to(q.device)
            q_hdw, k_gdw, v_gew = q_hdw * gain_w, k_gdw * gain_w, v_gew * gain_w
        o_hwe = o.unflatten(1, (self.heads, self.value_dim)).transpose(0, 1)
        return HeadWeights(q_hdw, k_gdw, v_gew, o_hwe, facts.q_norm is not None or facts.k_norm is not None)

    def _matrix(self, which: ProjectionName) -> Tensor:
        located = self._located(which)
        projection = located.projection
        if is_quantised(projection.module):
            raise ConfigError(
                f"{projection.parameter} is quantised ({type(projection.module).__name__}), and analyses of weights need "
                "the matrix in floating point; load the model without quantisation."
            )
        return projection.weight().double() * located.factor

    def _located(self, which: ProjectionName) -> Located:
        if isinstance(self.facts.projections, ConfigError):
            raise ConfigError(str(self.facts.projections))
        return self.facts.projections[which]
