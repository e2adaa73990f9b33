"""Decoder: embed → blocks → norm → head, assembled from parts.

Shapes: b batch · t tokens · d width · v vocabulary.

The decoder knows no kind of mixer. `block.mixer` is used in every block, or `pattern` names mixers that repeat over
the depth (a hybrid such as RRA: two recurrences, then local attention; see `models.pattern`). `state=None` is the parallel form
of training; with a state the same call continues where the state ends, one or many tokens at a time.

The forward pass returns hidden states after the final norm, not logits: objectives compute the loss in chunks from
`head.weight_vd`, because all logits together may be the largest tensor of a training step.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from torchstone.models.pattern import spelled_out
from torchstone.models.stack import Stack
from torchstone.nn.context import BuildContext
from torchstone.nn.embedding import TokenEmbedding
from torchstone.nn.span import Span
from torchstone.nn.state import DecoderState
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field
from torchstone.recipe.schema import Section


class DecoderOutput(NamedTuple):
    """Hidden states [b, t, d] after the final norm, the state (None in the parallel form), and the sum of auxiliary losses
    that layers left (None if there are none)."""

    hidden_btd: Tensor
    state: DecoderState | None
    auxiliary: Tensor | None = None


class Decoder(Stack):
    """A causal language model; built by `DecoderConfig.build`."""

    embed: TokenEmbedding

    def __init__(self, config: DecoderConfig, vocab_size: int, length: int) -> None:
        contexts = config.contexts(vocab_size, length)
        block = config.block
        embed = TokenEmbedding(vocab_size, config.width)
        super().__init__(contexts, config.pattern or (block.mixer,), block.feedforward, block.norm, embed)
        self.config, self.vocab_size, self.length = config, vocab_size, length
        self.embedding_factor = embedding_factor(config.embedding_scale, config.width)
        self.head = config.head.build(contexts[0], embed)

    def forward(self, tokens_bt: Tensor, span: Span | None = None, state: DecoderState | None = None) -> DecoderOutput:
        """Hidden states of int64 tokens [b, t].

        Args:
            tokens_bt: token ids.
            span: positions, documents and padding; None for one plain causal sequence a row.
            state: from `new_state`, advanced in place; None for the parallel form.

        Raises:
            ConfigError: a state of another number of rows, or one that is full.
        """
        span = (Span() if span is None else span).opened()
        x_btd = self.embed(tokens_bt)
        if self.embedding_factor != 1.0:
            x_btd = x_btd * self.embedding_factor
        return DecoderOutput(self.encode(x_btd, span, state), state, span.left())

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
        return self.empty_state(batch, capacity, torch.device(device or weight.device), dtype or weight.dtype)

    def flops(self, length: int) -> float:
        """Forward FLOPs per token at this sequence length: matrix products only, attention maps in full."""
        return self.stack_flops(length) + self.head.flops()


class BlockConfig(Section):
    """The parts of every block."""

    mixer: part_field("mixer") = {"kind": "attention"}  # type: ignore[valid-type]
    feedforward: part_field("feedforward") = {"kind": "swiglu"}  # type: ignore[valid-type]
    norm: part_field("norm") = {"kind": "rmsnorm"}  # type: ignore[valid-type]
    projection: part_field("projection") = Field(  # type: ignore[valid-type]
        default={"kind": "linear"},
        validate_default=True,
        description="what the dense maps of mixer and feed-forward are",
    )


EmbeddingScale = Literal["sqrt-width", "sqrt-width-bf16"] | Annotated[float, Field(gt=0)] | None


def embedding_factor(scale: EmbeddingScale, width: int) -> float:
    """What embeddings are multiplied by: √width, √width rounded to bf16 as RecurrentGemma's code does, a number, or 1."""
    if scale is None:
        return 1.0
    if isinstance(scale, float | int):
        return float(scale)
    root = width**0.5
    return root if scale == "sqrt-width" else float(torch.tensor(root, device="cpu").bfloat16())


class DecoderConfig(Part):
    """`model: decoder`."""

    family: ClassVar[str] = "model"
    kind: Literal["decoder"] = "decoder"
    width: int = Field(default=256, gt=0, description="channels of the residual stream")
    depth: int = Field(default=6, gt=0, description="number of blocks")
    head_dim: int = Field(default=64, gt=0, description="channels of an attention head where a mixer has no head count")
    block: BlockConfig = BlockConfig()
    pattern: Annotated[tuple[part_field("mixer"), ...], BeforeValidator(spelled_out)] = Field(  # type: ignore[valid-type]
        default=(), description="mixers repeated over the depth, or letters such as RRA; empty: block.mixer everywhere"
    )
    embedding_scale: EmbeddingScale = Field(
        default=None, description="what token embeddings are multiplied by; null: nothing"
    )
    head: part_field("head") = {"kind": "linear"}  # type: ignore[valid-type]
    initialisation: part_field("initialisation") = {"kind": "normal"}  # type: ignore[valid-type]

    def contexts(self, vocab_size: int, length: int) -> list[BuildContext]:
        """What the parts of each layer may know; all layers share one dictionary of modules."""
        sizes, shared = (self.width, self.head_dim, self.depth), nn.ModuleDict()
        return [
            BuildContext(*sizes, layer, vocab_size, length, self.block.projection, shared)
            for layer in range(self.depth)
        ]

    def skeleton(self, vocab_size: int, length: int) -> Decoder:
        """The model on the meta device: all shapes, no memory, no values."""
        with torch.device("meta"):
            return Decoder(self, vocab_size, length)

    def build(self, vocab_size: int, length: int, seed: int) -> Decoder:
        """The initialised model on the CPU; the same seed gives the same values for equal names and shapes."""
        model = self.skeleton(vocab_size, length).to_empty(device="cpu")
        self.initialisation.fill(model, self.depth, seed)
        return model
