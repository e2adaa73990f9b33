"""Belief State Transformer: one encoder reads prefixes, another reads suffixes, a head speaks for every pair of them.

Hu et al., *The Belief State Transformer*, arXiv 2410.23506. With f_i = F(x_≤i) and b_j = B(x_≥j), one vector each, a pair head
(`torchstone.nn.heads.pair`) gives the next token of the prefix and the previous token of the suffix. F and B have weights of
their own and share the token embedding. B is a causal stack that reads the row from its end, so that any mixer can be in it.

The blocks of F are named as those of a decoder (`blocks`, `norm`, `embed`), so that a decoder and this model start from the same
values; B is `backward_encoder`. As a decoder the model pairs every prefix with the empty suffix, which is an end token alone.

Documents and positions come from the end token: for F it opens the document on its right and has position 0, a row that starts
with another token starts at 1; for B the same holds in the row read from its end. A token before an end token is in its document
for B, the token after it for F:

    row          A B C E D F
    forward      1 2 3 0 1 2
    backward     3 2 1 0 2 1

Shapes: b batch · t tokens · d width · v vocabulary.

Pitfall: positions of a given `Span` are not used, and documents of a given span only add borders where no end token stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.models.decoder import BlockConfig, DecoderOutput
from torchstone.models.pattern import spelled_out
from torchstone.models.stack import Stack
from torchstone.nn.context import BuildContext
from torchstone.nn.embedding import TokenEmbedding
from torchstone.nn.heads.pair import PairHead, PairHeadConfig
from torchstone.nn.span import Span
from torchstone.nn.state import DecoderState
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field


@dataclass
class ReadingState(DecoderState):
    """Decoding state of one direction: states of the blocks, and where each row stands in its document.

    Attributes:
        position_b, document_b: int64, of the last visible token of each row; 0 before the first.
    """

    position_b: Tensor
    document_b: Tensor

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return super().nbytes() + 8 * (self.position_b.numel() + self.document_b.numel())

    def select(self, rows_n: Tensor) -> ReadingState:
        """A copy that holds only these rows, in this order."""
        layers = super().select(rows_n).layers
        return ReadingState(layers, self.position_b[rows_n], self.document_b[rows_n])

    def join(self, other: DecoderState) -> ReadingState:
        """A copy that holds the rows of both."""
        assert isinstance(other, ReadingState)
        layers, positions = super().join(other).layers, torch.cat([self.position_b, other.position_b])
        return ReadingState(layers, positions, torch.cat([self.document_b, other.document_b]))


def starts(tokens_bt: Tensor, end_token: int, documents_bt: Tensor | None = None) -> Tensor:
    """bool [b, t]: where a document starts, in reading order, the first token of a row not counted.

    End tokens start one; so does a change of given documents, unless the token before it is an end token.
    """
    ends_bt = tokens_bt == end_token
    if documents_bt is None:
        return ends_bt
    changed_bt = torch.zeros_like(ends_bt)
    changed_bt[:, 1:] = (documents_bt[:, 1:] != documents_bt[:, :-1]) & ~ends_bt[:, :-1]
    return ends_bt | changed_bt


def reading_span(
    tokens_bt: Tensor, end_token: int, span: Span | None = None, state: ReadingState | None = None
) -> Span:
    """Positions and documents of tokens in reading order; a state is advanced past them.

    Raises:
        ConfigError: documents are given with a state, whose documents come from end tokens alone.
    """
    span = Span() if span is None else span
    if state is not None and span.documents_bt is not None:
        raise ConfigError(
            "a belief-state model takes documents from its end token while it decodes, and Span.documents_bt was given "
            "with a state; leave it out, and put the end token between documents."
        )
    ends_bt, starts_bt = tokens_bt == end_token, starts(tokens_bt, end_token, span.documents_bt)
    index_bt = torch.ones_like(tokens_bt) if span.valid_bt is None else span.valid_bt.long()
    if span.valid_bt is not None:
        starts_bt = starts_bt & span.valid_bt
    document_bt = starts_bt.long().cumsum(1)
    index_bt = index_bt.cumsum(1)
    if state is not None:
        index_bt = index_bt + state.position_b[:, None]
        document_bt = document_bt + state.document_b[:, None]
    # the index that counts as 0 in each token's document: that of its end token, or the one before its first token
    zero_bt = torch.where(starts_bt, index_bt - (~ends_bt).long(), 0).cummax(1).values
    position_bt = index_bt - zero_bt
    if state is not None:
        state.position_b, state.document_b = position_bt[:, -1].clone(), document_bt[:, -1].clone()
    elif _one_document(starts_bt):
        return Span(position_bt, None, span.valid_bt, span.allowed_bts)
    return Span(position_bt, document_bt, span.valid_bt, span.allowed_bts)


def _one_document(starts_bt: Tensor) -> bool:
    """Whether every row is one document, so that no mask is needed; asked only where the answer costs no waiting."""
    if starts_bt.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not bool(starts_bt[:, 1:].any())


class BeliefState(Stack):
    """A belief-state model; built by `BeliefStateConfig.build`. What it is as a decoder stands in the module's docstring."""

    embed: TokenEmbedding

    def __init__(self, config: BeliefStateConfig, vocab_size: int, length: int) -> None:
        end_token = config.checked_end_token(vocab_size)
        block = config.block
        mixers = config.pattern or (block.mixer,)
        contexts = config.contexts(vocab_size, length, config.depth)
        embed = TokenEmbedding(vocab_size, config.width)
        super().__init__(contexts, mixers, block.feedforward, block.norm, embed)
        backward = config.contexts(vocab_size, length, config.backward_depth or config.depth)
        self.backward_encoder = Stack(backward, mixers, block.feedforward, block.norm)
        hidden = config.pair.width_of(config.width)
        self.head = PairHead(config.width, hidden, vocab_size, config.pair.eps, self.empty_suffix)
        self.config, self.vocab_size, self.length, self.end_token = config, vocab_size, length, end_token

    def forward(self, tokens_bt: Tensor, span: Span | None = None, state: ReadingState | None = None) -> DecoderOutput:
        """Prefix states f [b, t, d] of int64 tokens [b, t]: f_i has read tokens up to i.

        Args:
            tokens_bt: token ids.
            span: padding, and documents in the parallel form; positions come from the end tokens.
            state: from `new_state`, advanced in place; None for the parallel form.

        Raises:
            ConfigError: a state of another number of rows, one that is full, or documents together with a state.
        """
        return self._read(self, tokens_bt, span, state)

    def suffixes(self, tokens_bt: Tensor, span: Span | None = None) -> DecoderOutput:
        """Suffix states b [b, t, d]: b_j has read tokens from j on; arguments in the order of the row, no state."""
        span = Span() if span is None else span
        turned = [None if value is None else value.flip(1) for value in (span.documents_bt, span.valid_bt)]
        output = self.backwards(tokens_bt.flip(1), Span(documents_bt=turned[0], valid_bt=turned[1]))
        return output._replace(hidden_btd=output.hidden_btd.flip(1))

    def backwards(
        self, tokens_bt: Tensor, span: Span | None = None, state: ReadingState | None = None
    ) -> DecoderOutput:
        """The same for tokens that are given from the last to the first, and so are the results; with a state, from
        `new_state(backward=True)`, what is given comes before what it has read."""
        return self._read(self.backward_encoder, tokens_bt, span, state)

    def _read(self, encoder: Stack, tokens_bt: Tensor, span: Span | None, state: ReadingState | None) -> DecoderOutput:
        span = reading_span(tokens_bt, self.end_token, span, state).opened()
        return DecoderOutput(encoder.encode(self.embed(tokens_bt), span, state), state, span.left())

    def empty_suffix(self) -> Tensor:
        """b of an end token alone, [d]."""
        alone_11 = torch.full((1, 1), self.end_token, device=self.embed.weight.device)
        return self.backwards(alone_11).hidden_btd[0, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits […, v] of the next token of prefix states […, d] before the empty suffix."""
        return self.head.logits(hidden)

    def new_state(
        self,
        batch: int,
        capacity: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backward: bool = False,
    ) -> ReadingState:
        """Empty decoding state of either direction for `batch` rows of up to `capacity` tokens; device and dtype default to
        the weights'."""
        weight = self.embed.weight
        place = torch.device(device or weight.device)
        encoder: Stack = self.backward_encoder if backward else self
        layers = encoder.empty_state(batch, capacity, place, dtype or weight.dtype).layers
        where = torch.zeros(2, batch, dtype=torch.long, device=place)
        return ReadingState(layers, where[0], where[1])

    def flops(self, length: int) -> float:
        """Forward FLOPs per token as a decoder: the forward encoder, and the head for one pair, next token only.

        What training on pairs costs depends on them: see `BeliefStateObjective.flops`.
        """
        return self.stack_flops(length) + self.head.flops()

    def diagnostics(self) -> dict[str, float]:
        """Numbers worth logging of both encoders: {"layer03/lambda": 0.31, "backward/layer03/lambda": 0.28}."""
        backward = self.backward_encoder.diagnostics()
        return super().diagnostics() | {f"backward/{name}": value for name, value in backward.items()}


class BeliefStateConfig(Part):
    """`model: belief-state`."""

    family: ClassVar[str] = "model"
    kind: Literal["belief-state"] = "belief-state"
    width: int = Field(default=256, gt=0, description="channels of the residual stream")
    depth: int = Field(default=6, gt=0, description="number of blocks of the forward encoder")
    backward_depth: int | None = Field(default=None, gt=0, description="of the backward encoder; null: depth")
    head_dim: int = Field(default=64, gt=0, description="channels of an attention head where a mixer has no head count")
    block: BlockConfig = BlockConfig()
    pattern: Annotated[tuple[part_field("mixer"), ...], BeforeValidator(spelled_out)] = Field(  # type: ignore[valid-type]
        default=(), description="mixers repeated over the depth, or letters such as RRA; empty: block.mixer everywhere"
    )
    pair: PairHeadConfig = PairHeadConfig()
    end_token: int | None = Field(
        default=None, ge=0, description="id that separates documents; it has no default and must be given"
    )
    initialisation: part_field("initialisation") = {"kind": "normal"}  # type: ignore[valid-type]

    def contexts(self, vocab_size: int, length: int, depth: int) -> list[BuildContext]:
        """What the parts of each layer of one encoder may know; its layers share one dictionary of modules."""
        sizes, shared = (self.width, self.head_dim, depth), nn.ModuleDict()
        return [
            BuildContext(*sizes, layer, vocab_size, length, self.block.projection, shared) for layer in range(depth)
        ]

    def checked_end_token(self, vocab_size: int) -> int:
        """The end token; raises ConfigError if it is missing or no token of the vocabulary."""
        if self.end_token is not None and self.end_token < vocab_size:
            return self.end_token
        given = "is not set" if self.end_token is None else f"is {self.end_token}"
        raise ConfigError(
            f"model.end_token {given}, and this model needs the id, 0 to {vocab_size - 1} here, that separates documents. It is "
            "256 for the tokenizer `bytes`, vocab_size - 1 for `bpe` and nodes + 4 for star-graph data; elsewhere "
            "`recipe.data.build(None).tokenizer.end_of_document` tells it. Set model.end_token to it."
        )

    def skeleton(self, vocab_size: int, length: int) -> BeliefState:
        """The model on the meta device: all shapes, no memory, no values."""
        with torch.device("meta"):
            return BeliefState(self, vocab_size, length)

    def build(self, vocab_size: int, length: int, seed: int) -> BeliefState:
        """The initialised model on the CPU; the same seed gives the same values for equal names and shapes."""
        model = self.skeleton(vocab_size, length).to_empty(device="cpu")
        self.initialisation.fill(model, self.depth, seed)
        return model
