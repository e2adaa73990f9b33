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
        return x_btd + self.feedforward(self.feedforward_norm(x_btd), span), state

    def flops(self, length: int) -> float:
        """Forward FLOPs per token at this sequence length."""
        return self.mixer.flops(length) + self.feedforward.flops()

    def diagnostics(self) -> dict[str, float]:
        """Numbers worth logging, of the mixer and of the feed-forward."""
        found: dict[str, float] = dict(self.mixer.diagnostics())
        speak = getattr(self.feedforward, "diagnostics", dict)
        return found | {f"feedforward_{name}": value for name, value in speak().items()}
