"""Subject: a causal language model under analysis, whatever made it.

Every analysis in this package sees a model through this interface, so that one analysis runs on torchstone's own models
and on Hugging Face causal language models alike. `torchstone.diagnose.adapters.open_subject` makes one.

    subject = open_subject("path/to/checkpoint")
    for layer in subject.layers: layer.heads, layer.rotation, layer.weights()
    subject.visit(tokens_bt, look)                     # look(layer, activations) for every attention layer, in order
    with subject.ablate([(3, 1)], mode="mean"): subject.losses(tokens_bt)

Shapes: b batch · h query heads · g key-value heads · t queries · s keys · d head channels · e value channels · w width of
the residual stream · v vocabulary · l layers · m = d/2 frequency pairs.

Conventions, whatever the model's own: heads come first; queries and keys are in half order (pair m is channels m and
m + d/2); channels that do not rotate are pairs of frequency 0, at their place in that order; key heads are repeated to
one per query head.

Pitfall: a subject is in evaluation mode and its weights are not to be changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError

ProjectionName = Literal["q", "k", "v", "o"]
AblationMode = Literal["mean", "zero", "window"]
Head = tuple[int, int]  # layer, query head


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one layer turns its queries and keys.

    Attributes:
        frequencies_m: fp64 [head_dim/2], radians per token of every pair in half order; 0 where a pair does not turn.
        description: the model's own words, such as "rotary full, base 10000, interleaved".
        base: θ, where the model states one.
    """

    frequencies_m: Tensor
    description: str
    base: float | None = None


@dataclass(frozen=True, eq=False)
class Projection:
    """One of the four projections, wherever the model keeps it.

    Attributes:
        module: the linear layer whose input and output belong to it; fused layers serve several projections.
        parameter: name of its weight in the model's `named_parameters()`.
        rows: int64 [out], the output features of `module` that are this projection's; None for all.
        transposed: the weight is stored [in, out] (GPT-2's Conv1D).
    """

    module: nn.Module
    parameter: str
    rows: Tensor | None = None
    transposed: bool = False

    def weight(self) -> Tensor:
        """The matrix [out, in], detached, in the stored type."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        weight = weight.T if self.transposed else weight
        return weight if self.rows is None else weight[self.rows.to(weight.device)]


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """Projections of one layer by head, fp64, with every linear gain around them multiplied in.

    Attributes:
        q_hdw, k_gdw: rows in half order; gains of a norm on queries or keys multiply the rows (which is exact up to the
            norm's own scale), those of the norm before the layer multiply the columns.
        v_gew, o_hwe: values and outputs; output of head h is o_hwe[h] @ its value vector.
        normalised_qk: queries and keys pass a norm, so that the raw product has no scale of its own.
    """

    q_hdw: Tensor
    k_gdw: Tensor
    v_gew: Tensor
    o_hwe: Tensor
    normalised_qk: bool = False


@dataclass(frozen=True, eq=False)
class Activations:
    """What one attention layer computed for one batch, detached and finite.

    Attributes:
        q_bhtd, k_bhsd: fp32, after normalisation and rotation, half order, keys repeated to one head per query head.
        v_bhse: fp32, value heads repeated likewise.
        weights_bhts: fp32, what multiplies the values; None unless asked for. Signed in differential attention.
        heads_bthe: fp32, outputs per head before the output projection (after ablation, if any).
        scale: factor of q·k in the scores.
        maps_per_head: 1; 2 in differential attention, whose q and k then have 2h heads in the model's own order.
    """

    q_bhtd: Tensor
    k_bhsd: Tensor
    v_bhse: Tensor
    weights_bhts: Tensor | None
    heads_bthe: Tensor
    scale: float
    maps_per_head: int = 1


class AttentionLayer(ABC):
    """One attention layer.

    Attributes:
        index: 0-based among the subject's attention layers.
        name: module path in the model.
        heads, kv_heads, head_dim, value_dim: counts and channels.
        rotation: None where positions do not turn queries and keys.
        window: sliding window in tokens, or None.
    """

    index: int
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotation: Rotation | None
    window: int | None

    @abstractmethod
    def projection(self, which: ProjectionName) -> Projection:
        """Where W_q, W_k, W_v or W_o is; raises ConfigError where the layer has no such matrix of its own."""

    @abstractmethod
    def weights(self) -> HeadWeights:
        """All four by head; raises ConfigError for quantised weights."""

    def kv_of(self, head: int) -> int:
        """The key-value head that a query head reads."""
        return head // (self.heads // self.kv_heads)


Look = Callable[[AttentionLayer, Activations], None]


class Subject(ABC):
    """A model under analysis.

    Attributes:
        name: path or identifier, for people.
        architecture: "torchstone decoder", "LlamaForCausalLM", …
        model: the module itself, in evaluation mode.
        layers: attention layers, in order; empty where the model mixes tokens otherwise.
        vocab_size, width: sizes; `vocab_size` leaves out padded rows of the head where the tokenizer tells.
        max_length: longest context in tokens, or None where there is no limit.
    """

    name: str
    architecture: str
    model: nn.Module
    layers: tuple[AttentionLayer, ...]
    vocab_size: int
    width: int
    max_length: int | None

    @property
    def trained_length(self) -> int | None:
        """Tokens that training showed at once, where the model says so."""
        return self.max_length

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens; raises ConfigError where there is no tokenizer."""

    def first_tokens(self) -> list[int]:
        """Special tokens that the model's tokenizer puts before every text (BOS); none, unless an adapter says otherwise."""
        return []

    def spans(self, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and for each the characters start … end-1 that it stands for.

        Args:
            text: any text.
            special: with the special tokens that the tokenizer puts around a text; they span (0, 0).

        Raises:
            ConfigError: there is no tokenizer. DataError: the tokenizer cannot tell where its tokens lie.
        """
        raise ConfigError(f"{self.name} has no tokenizer that tells which characters its tokens stand for.")

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; ids as numbers where there is no tokenizer."""

    @abstractmethod
    def logits(self, tokens_bt: Tensor) -> Tensor:
        """Logits [b, t, v] of whole sequences, in the model's type; differentiable."""

    @abstractmethod
    def losses(self, tokens_bt: Tensor, last: int | None = None) -> Tensor:
        """-log p(token t+1 | tokens … t), fp32 [b, t-1], or only the `last` of them; without gradients, and without holding
        the logits of all tokens at once. Raises DataError where a loss is not finite, naming row, token and layer."""

    @abstractmethod
    def hidden_states(self, tokens_bt: Tensor) -> tuple[Tensor, ...]:
        """Residual stream [b, t, w]: after the embedding, after every block, and (last) after the final norm; no gradients."""

    @abstractmethod
    def visit(
        self, tokens_bt: Tensor, look: Look, *, weights: bool = False, layers: Collection[int] | None = None
    ) -> None:
        """Run the model once and call `look(layer, activations)` for each attention layer as it is computed.

        Nothing is kept after `look` returns. `weights` asks for attention maps, which need h·t·s numbers. Raises DataError
        where an activation is not finite, naming layer and token.
        """

    @abstractmethod
    def ablate(
        self, heads: Collection[Head], mode: AblationMode = "mean", *, window: int | None = None
    ) -> AbstractContextManager[None]:
        """Take heads out inside the block, before the output projection: `zero`, `mean` over the batch and tokens of each
        forward pass, or `window` (the head sees only the last `window` tokens).

        Raises ConfigError for a head that does not exist, or `window` given or missing wrongly.
        """

    @abstractmethod
    def head_weight(self) -> Tensor:
        """The output matrix [v, w] without padded rows, detached; raises ConfigError where there is none (no linear head)."""

    @property
    @abstractmethod
    def tied(self) -> bool:
        """Whether the output matrix is the token embedding."""

    @abstractmethod
    def embedding(self) -> nn.Module:
        """The token embedding module."""

    @abstractmethod
    def untrained(self, seed: int = 0) -> Subject:
        """The same architecture with fresh random weights, as its makers initialise it; the usual control."""

    def describe(self) -> str:
        """One line: name, architecture, parameters."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{self.name} ({self.architecture}, {count / 1e6:.3g}M parameters)"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


def require_attention(subject: Subject) -> None:
    """Raise ConfigError unless the subject has an attention layer that can be analysed."""
    if not subject.layers:
        raise ConfigError(
            f"{subject.name} has no attention layer with query, key, value and output projections, which this analysis "
            "reads; give a model whose mixer is attention, local-attention or differential."
        )


def as_tokens(rows: Sequence[Sequence[int]] | Any, device: torch.device) -> Tensor:
    """Token rows of equal length as int64 [b, t]."""
    return torch.as_tensor(rows, dtype=torch.long, device=device)
