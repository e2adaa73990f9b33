"""Stack: blocks and a final norm, the part of a model between its embedding and its head.

Shapes: b batch · t tokens · d width.

`pattern` lists mixers that repeat over the depth (a hybrid such as [recurrence, recurrence, attention]); without one, every
block has the same mixer. `state=None` is the parallel form of training; with a state the same call continues where it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.nn.block import Block
from torchstone.nn.context import BuildContext
from torchstone.nn.span import Span
from torchstone.nn.state import DecoderState, require_rows
from torchstone.recipe.part import Part


class Stack(nn.Module):
    """Blocks and norm.

    Args:
        contexts: of every layer, in order; they share one `shared` dictionary.
        mixers: repeated over the layers.
        feedforward, norm: of every block.
        embed: the token embedding, if it belongs to this stack.
    """

    def __init__(
        self,
        contexts: Sequence[BuildContext],
        mixers: Sequence[Part],
        feedforward: Part,
        norm: Part,
        embed: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if embed is not None:
            self.embed = embed
        self.blocks = nn.ModuleList(
            Block(context, mixers[layer % len(mixers)], feedforward, norm) for layer, context in enumerate(contexts)
        )
        shared = contexts[0].shared
        if shared:
            self.shared = shared
        self.norm = norm.build(contexts[0])  # type: ignore[attr-defined]

    def encode(self, x_btd: Tensor, span: Span, state: DecoderState | None = None) -> Tensor:
        """Hidden states [b, t, d] after the final norm; `span` is opened, the state is advanced in place.

        Raises:
            ConfigError: the state is of another number of layers or rows.
        """
        if state is not None:
            if len(state.layers) != len(self.blocks):
                raise ConfigError(
                    f"the decoding state is of {len(state.layers)} layers and there are {len(self.blocks)} here; make it with "
                    "new_state of the same model."
                )
            require_rows(state, x_btd.shape[0])
        for layer, block in enumerate(self.blocks):
            x_btd, _ = block(x_btd, span, None if state is None else state.layers[layer])
        normed_btd: Tensor = self.norm(x_btd)
        return normed_btd

    def empty_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> DecoderState:
        """Decoding state for `batch` rows of up to `capacity` tokens."""
        return DecoderState([block.mixer.new_state(batch, capacity, device, dtype) for block in self._blocks()])

    def stack_flops(self, length: int) -> float:
        """Forward FLOPs per token of all blocks."""
        return sum(block.flops(length) for block in self._blocks())

    def diagnostics(self) -> dict[str, float]:
        """Numbers worth logging, by layer: {"layer03/lambda": 0.31}."""
        return {
            f"layer{layer:02d}/{name}": value
            for layer, block in enumerate(self._blocks())
            for name, value in block.diagnostics().items()
        }

    def _blocks(self) -> list[Any]:
        """The blocks, in order."""
        return list(self.blocks)
