"""Decoder: embed → blocks → norm → head, assembled from parts.

Shapes: b batch · t tokens · d width · v vocabulary.

The decoder knows no kind of mixer. `block.mixer` is used in every block, or `pattern` lists mixers that repeat over
the depth (a hybrid such as [attention, recurrence, recurrence]). `state=None` is the parallel form of training; with
a state the same call continues where the state ends, one or many tokens at a time.

The forward pass returns hidden states after the final norm, not logits: objectives compute the loss in chunks from
`head.weight_vd`, because all logits together may be the largest tensor of a training step.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from torchstone.nn.block import Block
from torchstone.nn.context import BuildContext
from torchstone.nn.embedding import TokenEmbedding
from torchstone.nn.span import Span
from torchstone.nn.state import DecoderState
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field
from torchstone.recipe.schema import Section


class DecoderOutput(NamedTuple):
    """Hidden states [b, t, d] after the final norm, and the state (None in the parallel form)."""

    hidden_btd: Tensor
    state: DecoderState | None


class Decoder(nn.Module):
    """A causal language model; built by `DecoderConfig.build`."""

    def __init__(self, config: DecoderConfig, vocab_size: int, length: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.length = config, vocab_size, length
        mixers = config.pattern or (config.block.mixer,)
        self.embed = TokenEmbedding(vocab_size, config.width)
        self.blocks = nn.ModuleList(
            Block(
                config.context(vocab_size, length, layer),
                mixers[layer % len(mixers)],
                config.block.feedforward,
                config.block.norm,
            )
            for layer in range(config.depth)
        )
        outside = config.context(vocab_size, length, 0)
        self.norm = config.block.norm.build(outside)
        self.head = config.head.build(outside, self.embed)

    def forward(self, tokens_bt: Tensor, span: Span | None = None, state: DecoderState | None = None) -> DecoderOutput:
        """Hidden states of int64 tokens [b, t].

        Args:
            tokens_bt: token ids.
            span: positions, documents and padding; None for one plain causal sequence a row.
            state: from `new_state`, advanced in place; None for the parallel form.
        """
        span = (Span() if span is None else span).opened()
        x_btd = self.embed(tokens_bt)
        for layer, block in enumerate(self.blocks):
            x_btd, _ = block(x_btd, span, None if state is None else state.layers[layer])
        return DecoderOutput(self.norm(x_btd), state)

    def logits(self, hidden_btd: Tensor) -> Tensor:
        """Logits […, v] of hidden states […, d]."""
        return self.head.logits(hidden_btd)

    def new_state(
        self,
        batch: int,
        capacity: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DecoderState:
        """Empty decoding state for `batch` rows of up to `capacity` tokens; device and dtype default to the weights'."""
        weight = self.embed.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return DecoderState([block.mixer.new_state(batch, capacity, device, dtype) for block in self._blocks()])

    def _blocks(self) -> list[Any]:
        """The blocks, in order."""
        return list(self.blocks)

    def flops(self, length: int) -> float:
        """Forward FLOPs per token at this sequence length: matrix products only, attention maps in full."""
        blocks = sum(block.mixer.flops(length) + block.feedforward.flops() for block in self._blocks())
        return blocks + self.head.flops()

    def diagnostics(self) -> dict[str, float]:
        """Numbers worth logging, by layer: {"layer03/lambda": 0.31}."""
        return {
            f"layer{layer:02d}/{name}": value
            for layer, block in enumerate(self._blocks())
            for name, value in block.mixer.diagnostics().items()
        }


class BlockConfig(Section):
    """The parts of every block."""

    mixer: part_field("mixer") = {"kind": "attention"}  # type: ignore[valid-type]
    feedforward: part_field("feedforward") = {"kind": "swiglu"}  # type: ignore[valid-type]
    norm: part_field("norm") = {"kind": "rmsnorm"}  # type: ignore[valid-type]


class DecoderConfig(Part):
    """`model: decoder`."""

    family: ClassVar[str] = "model"
    kind: Literal["decoder"] = "decoder"
    width: int = Field(default=256, gt=0, description="channels of the residual stream")
    depth: int = Field(default=6, gt=0, description="number of blocks")
    head_dim: int = Field(default=64, gt=0, description="channels of an attention head where a mixer has no head count")
    block: BlockConfig = BlockConfig()
    pattern: tuple[part_field("mixer"), ...] = Field(  # type: ignore[valid-type]
        default=(), description="mixers repeated over the depth; empty: block.mixer everywhere"
    )
    head: part_field("head") = {"kind": "linear"}  # type: ignore[valid-type]
    initialisation: part_field("initialisation") = {"kind": "normal"}  # type: ignore[valid-type]

    def context(self, vocab_size: int, length: int, layer: int) -> BuildContext:
        """What the parts of a layer may know."""
        return BuildContext(self.width, self.head_dim, self.depth, layer, vocab_size, length)

    def skeleton(self, vocab_size: int, length: int) -> Decoder:
        """The model on the meta device: all shapes, no memory, no values."""
        with torch.device("meta"):
            return Decoder(self, vocab_size, length)

    def build(self, vocab_size: int, length: int, seed: int) -> Decoder:
        """The initialised model on the CPU; the same seed gives the same values for equal names and shapes."""
        model = self.skeleton(vocab_size, length).to_empty(device="cpu")
        self.initialisation.fill(model, self.depth, seed)
        return model
