"""torchstone's own decoders as subjects, with plain and differential attention.

What layers compute is seen and changed in `mixers`.

Differential attention: queries and keys of `Activations` and of `HeadWeights` have two sub-heads per head, in the order
in which the layer pairs them (version 1 puts the first maps of all heads before the second, unless `kv_pairing: naive`).
`o_hwe` takes the head's normalised output.

Shapes: b batch · t tokens · h heads · d, e channels · w width · v vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchstone.diagnose.adapters.ablation import make_ablation
from torchstone.diagnose.adapters.losses import finite_losses, losses_of, targets_of
from torchstone.diagnose.adapters.mixers import ablated, watched
from torchstone.diagnose.adapters.record import make_recorder
from torchstone.diagnose.adapters.text_codec import TextCodec
from torchstone.diagnose.subject import (
    AblationMode,
    AttentionLayer,
    Head,
    HeadWeights,
    Look,
    Projection,
    ProjectionName,
    Rotation,
    Subject,
)
from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder
from torchstone.nn.attention.differential_v1 import DifferentialV1
from torchstone.nn.attention.mixer import AttentionMixer
from torchstone.nn.norm.rmsnorm import RMSNorm
from torchstone.nn.position.rotary import Rotary


def has_projections(mixer: nn.Module) -> bool:
    """Whether this is attention with a query, key, value and output projection for all tokens (experts have several)."""
    return isinstance(mixer, AttentionMixer) and all(hasattr(mixer, f"w_{which}") for which in "qkvo")


class TorchstoneLayer(AttentionLayer):
    """See `AttentionLayer`.

    Attributes:
        mixer: the attention module.
        norm: the norm before it.
        scale: factor of q·k in the scores.
    """

    def __init__(self, index: int, name: str, mixer: Any, norm: Any) -> None:
        self.index, self.name, self.mixer, self.norm = index, name, mixer, norm
        self.heads, self.head_dim, self.scale = mixer.heads, mixer.key_shape[1], mixer.scale
        self.kv_heads, self.value_dim = mixer.value_shape
        self.window = mixer.window
        self.rotation = _rotation(mixer.position)

    def projection(self, which: ProjectionName) -> Projection:
        """See `AttentionLayer`."""
        module = getattr(self.mixer, f"w_{which}")
        if not isinstance(module, nn.Linear):
            raise ConfigError(
                f"{self.name}.w_{which} is a {type(module).__name__}, which has no single matrix to analyse; give a model whose "
                "block.projection is linear."
            )
        return Projection(module, f"{self.name}.w_{which}.weight")

    def weights(self) -> HeadWeights:
        """See `AttentionLayer`."""
        mixer, arrange = self.mixer, self.mixer.position.arrange
        q, k, v, o = (self.projection(which).weight().double() for which in ("q", "k", "v", "o"))
        if not isinstance(self.norm, RMSNorm):
            raise ConfigError(
                f"the norm before {self.name} is a {type(self.norm).__name__}, whose gain does not fold into the "
                "projections; give a model whose block.norm is rmsnorm."
            )
        gain_w = self.norm.gain.detach().double()
        q_udw, k_udw = ((arrange(w) * gain_w).unflatten(0, (-1, self.head_dim)) for w in (q, k))
        q_norm, k_norm = getattr(mixer, "q_norm", None), getattr(mixer, "k_norm", None)
        if q_norm is not None and k_norm is not None:
            q_udw = q_udw * arrange(q_norm.gain.detach().double())[:, None]
            k_udw = k_udw * arrange(k_norm.gain.detach().double())[:, None]
        if isinstance(mixer, DifferentialV1) and mixer.kv_pairing == "flash":
            q_udw, k_udw = (w.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) for w in (q_udw, k_udw))
        v_gew = (v * gain_w).unflatten(0, (self.kv_heads, self.value_dim))
        o_hwe = o.unflatten(1, (self.heads, self.value_dim)).transpose(0, 1)
        return HeadWeights(q_udw, k_udw, v_gew, o_hwe, q_norm is not None)


class TorchstoneSubject(Subject):
    """See `Subject`; made by `open_subject`.

    Args:
        model: a decoder.
        name: run directory or another name.
        codec: its tokenizer.
    """

    architecture = "torchstone decoder"

    def __init__(self, model: Decoder, name: str, codec: TextCodec) -> None:
        self.model: Decoder = model.eval()
        self.name, self._codec = name, codec
        self.vocab_size, self.width, self.max_length = model.vocab_size, model.config.width, None
        found = [
            (f"blocks.{i}.mixer", block) for i, block in enumerate(model._blocks()) if has_projections(block.mixer)
        ]
        self._layers = tuple(
            TorchstoneLayer(index, path, block.mixer, block.mixer_norm) for index, (path, block) in enumerate(found)
        )
        self.layers = self._layers

    @property
    def trained_length(self) -> int:
        """Tokens of a training sequence."""
        return self.model.length

    def encode(self, text: str) -> list[int]:
        """See `Subject`."""
        return self._codec.encode(text)

    def spans(self, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """See `Subject`."""
        return self._codec.spans(text, special)

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Subject`."""
        return self._codec.decode(tokens)

    def logits(self, tokens_bt: Tensor) -> Tensor:
        """See `Subject`."""
        return self.model.logits(self.model(tokens_bt).hidden_btd)

    @torch.no_grad()
    def losses(self, tokens_bt: Tensor, last: int | None = None) -> Tensor:
        """See `Subject`."""
        targets_bt = targets_of(tokens_bt, last)
        hidden_btd = self.model(tokens_bt[:, :-1]).hidden_btd
        losses_bt = losses_of(hidden_btd, targets_bt, self.model.logits, self.vocab_size)
        return finite_losses(self, losses_bt, tokens_bt)

    @torch.no_grad()
    def hidden_states(self, tokens_bt: Tensor) -> tuple[Tensor, ...]:
        """See `Subject`."""
        states: list[Tensor] = []

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            states.append((output[0] if isinstance(output, tuple) else output).clone())

        with ExitStack() as stack:
            for module in (self.model.embed, *self.model._blocks()):
                stack.callback(module.register_forward_hook(note).remove)
            final_btw = self.model(tokens_bt).hidden_btd
        return (*states, final_btw)

    @torch.no_grad()
    def visit(
        self, tokens_bt: Tensor, look: Look, *, weights: bool = False, layers: Collection[int] | None = None
    ) -> None:
        """See `Subject`."""
        recorder = make_recorder(self.layers, look, weights, layers)
        with ExitStack() as stack:
            for layer in self._layers:
                if recorder.wants(layer):
                    stack.enter_context(watched(layer.mixer, layer, recorder))
            self.model(tokens_bt)

    @contextmanager
    def ablate(
        self, heads: Collection[Head], mode: AblationMode = "mean", *, window: int | None = None
    ) -> Iterator[None]:
        """See `Subject`."""
        ablation = make_ablation(self.layers, heads, mode, window)
        with ExitStack() as stack:
            for index in ablation.heads:
                stack.enter_context(ablated(self._layers[index].mixer, index, ablation))
            yield

    def head_weight(self) -> Tensor:
        """See `Subject`."""
        matrix = self.model.head.full_matrix()
        if matrix is None:
            raise ConfigError(
                f"the head of {self.name} ({self.model.config.head.kind}) is not linear in the hidden state, so it has no "
                "output matrix; give a model with a linear head."
            )
        return matrix.detach()

    @property
    def tied(self) -> bool:
        """See `Subject`."""
        return bool(self.model.head.tied)

    def embedding(self) -> nn.Module:
        """See `Subject`."""
        return self.model.embed

    def untrained(self, seed: int = 0) -> TorchstoneSubject:
        """See `Subject`."""
        weight = self.model.embed.weight
        fresh = self.model.config.build(self.vocab_size, self.model.length, seed)
        return TorchstoneSubject(fresh.to(weight.device, weight.dtype), f"{self.name}, untrained", self._codec)


def _rotation(position: nn.Module) -> Rotation | None:
    """What a rotary position does; None for every other kind, and for one that turns nothing."""
    if not isinstance(position, Rotary):
        return None
    frequencies_m = position.frequencies()
    if not bool(frequencies_m.any()):
        return None
    return Rotation(frequencies_m, f"rotary, {position.extra_repr()}", position.base)
