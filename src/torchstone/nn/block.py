"""One pre-norm residual block: x + mixer(norm(x)), then x + feedforward(norm(x))."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.nn.span import Span
from torchstone.recipe.part import Part


class Block(nn.Module):
    """Mixer and feed-forward with their norms, built from their configurations."""

    def __init__(self, context: BuildContext, mixer: Part, feedforward: Part, norm: Part) -> None:
        super().__init__()
        self.mixer_norm = norm.build(context)  # type: ignore[attr-defined]
        self.mixer = mixer.build(context)  # type: ignore[attr-defined]
        self.feedforward_norm = norm.build(context)  # type: ignore[attr-defined]
        self.feedforward = feedforward.build(context)  # type: ignore[attr-defined]

    def forward(self, x_btd: Tensor, span: Span, state: Any = None) -> tuple[Tensor, Any]:
        """[b, t, width] → [b, t, width], and the mixer's state advanced by t tokens."""
        mixed_btd, state = self.mixer(self.mixer_norm(x_btd), span, state)
        x_btd = x_btd + mixed_btd
        return x_btd + self.feedforward(self.feedforward_norm(x_btd)), state
