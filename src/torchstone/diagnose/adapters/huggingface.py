"""Hugging Face causal language models as subjects.

    load_model   folder or hub id → model        (loading)
    Seam         sees queries, keys, values      (seam)
    probe        finds layers, rotation, names   (probe, rotation, projections, gains)
    this file    visits, ablations, losses, hidden states

To add a family: nothing, if its attention goes through transformers' attention interface and its projections have names
of `projections.NAMES`. Otherwise, in this order: a word in `NAMES`; an order of fused rows in `projections._fused_rows`; a
setting of the attention function in `seam.Call`; a layout in `rotation.LAYOUTS`. Then give it a line in the tests, which
hold every family to its own outputs. On opening, the model's logits through the seam are compared with its own.

Shapes: b batch · t tokens · h heads · d, e channels · w width · v vocabulary.

Pitfall: a quantised or half-precision model is analysed as it is, with that precision's noise in every activation.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchstone.diagnose.adapters.ablation import Ablation, ablate_heads, make_ablation
from torchstone.diagnose.adapters.layers import HuggingFaceLayer
from torchstone.diagnose.adapters.losses import finite_losses, losses_of, targets_of
from torchstone.diagnose.adapters.probe import probe, run
from torchstone.diagnose.adapters.projections import is_quantised
from torchstone.diagnose.adapters.record import Recorder, make_recorder
from torchstone.diagnose.adapters.seam import Call, Seam, attend, attention_weights, combine
from torchstone.diagnose.adapters.text_codec import TextCodec
from torchstone.diagnose.subject import AblationMode, Activations, Head, Look, Subject
from torchstone.errors import ConfigError

CHECKED = 16  # tokens of the comparison on opening
ALIKE, ALIKE_HALF = 1e-3, 0.1


class HuggingFaceSubject(Subject):
    """See `Subject`; made by `open_subject`.

    Args:
        model: a causal language model of transformers.
        name: path or identifier.
        codec: its tokenizer.
        names: patterns of module names, see `projections`.

    Raises:
        ConfigError: no causal language model, or attention that cannot be seen.
    """

    def __init__(self, model: Any, name: str, codec: TextCodec, names: Mapping[str, str]) -> None:
        self.model, self.name, self.architecture = model.eval(), name, type(model).__name__
        self._codec, self._names = codec, dict(names)
        self._head = _output_head(model)
        self._rows, self.width = _head_shape(self._head)
        self._text = model.config.get_text_config()
        self.max_length = getattr(self._text, "max_position_embeddings", None)
        self._seam, self._ablations, self._recorders = Seam(model), list[Ablation](), list[Recorder]()
        found = probe(model, self._seam, self._rows, names)
        self._stem = _stem(model, found[0].module)
        self._layers = tuple(HuggingFaceLayer(index, facts) for index, facts in enumerate(found))
        self.layers = self._layers
        self._by_module = {layer.facts.module: layer for layer in self._layers}
        self._whole_head = self._compare()

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Rows of the head that stand for a token; all of them where there is no tokenizer."""
        size = self._codec.size()
        return self._rows if size is None else min(size, self._rows)

    def encode(self, text: str) -> list[int]:
        """See `Subject`."""
        return self._codec.encode(text)

    def spans(self, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """See `Subject`."""
        return self._codec.spans(text, special)

    def first_tokens(self) -> list[int]:
        """See `Subject`."""
        return self._codec.first_tokens()

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Subject`."""
        return self._codec.decode(tokens)

    def logits(self, tokens_bt: Tensor) -> Tensor:
        """See `Subject`; v counts padded rows of the head, as the model does."""
        return run(self.model, tokens_bt).logits

    @torch.no_grad()
    def losses(self, tokens_bt: Tensor, last: int | None = None) -> Tensor:
        """See `Subject`. Heads of unknown form give all logits of one row at a time."""
        targets_bt = targets_of(tokens_bt, last)
        if self._whole_head:
            rows = zip(tokens_bt[:, :-1].split(1), targets_bt.split(1), strict=True)
            losses_bt = torch.cat([losses_of(self.logits(row), y, lambda x: x, self._rows) for row, y in rows])
        else:
            losses_bt = losses_of(self._trunk(tokens_bt[:, :-1]), targets_bt, self._head_logits, self._rows)
        return finite_losses(self, losses_bt, tokens_bt)

    @torch.no_grad()
    def hidden_states(self, tokens_bt: Tensor) -> tuple[Tensor, ...]:
        """See `Subject`."""
        states: list[Tensor] = []
        blocks = self._blocks()

        def before(module: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any]) -> None:
            states.append((inputs[0] if inputs else settings["hidden_states"]).clone())

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            states.append((output[0] if isinstance(output, tuple) else output).clone())

        handles: list[Any] = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        handles += [block.register_forward_hook(after) for block in blocks]
        try:
            final_btw = self._trunk(tokens_bt)
        finally:
            for handle in handles:
                handle.remove()
        return (*states, final_btw)

    @torch.no_grad()
    def visit(
        self, tokens_bt: Tensor, look: Look, *, weights: bool = False, layers: Collection[int] | None = None
    ) -> None:
        """See `Subject`."""
        self._recorders.append(make_recorder(self.layers, look, weights, layers))
        try:
            with self._seam.open(self._receive):
                self._trunk(tokens_bt)
        finally:
            self._recorders.pop()

    @contextmanager
    def ablate(
        self, heads: Collection[Head], mode: AblationMode = "mean", *, window: int | None = None
    ) -> Iterator[None]:
        """See `Subject`."""
        ablation = make_ablation(self.layers, heads, mode, window)
        self._ablations.append(ablation)
        try:
            with self._seam.open(self._receive):
                yield
        finally:
            self._ablations.remove(ablation)

    def head_weight(self) -> Tensor:
        """See `Subject`."""
        if is_quantised(self._head):
            raise ConfigError(
                f"the output matrix of {self.name} is quantised ({type(self._head).__name__}); load the model without "
                "quantisation."
            )
        return self._head.weight.detach()[: self.vocab_size]  # type: ignore[operator]

    @property
    def tied(self) -> bool:
        """See `Subject`."""
        return getattr(self._head, "weight", None) is getattr(self.embedding(), "weight", self)

    def embedding(self) -> nn.Module:
        """See `Subject`."""
        return self.model.get_input_embeddings()  # type: ignore[operator]

    def untrained(self, seed: int = 0) -> HuggingFaceSubject:
        """See `Subject`; transformers' own initialisation, drawn on the CPU, with the global generator left as it was."""
        weight = next(p for p in self.model.parameters() if p.is_floating_point())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(self.model)(copy.deepcopy(self.model.config))
        fresh = model.to(device=self.device, dtype=weight.dtype)
        return HuggingFaceSubject(fresh, f"{self.name}, untrained", self._codec, self._names)

    def _receive(self, call: Call) -> Tensor:
        """Outputs of the heads for one attention call, ablated and shown to whoever looks."""
        layer = self._by_module[call.module]
        recorder = self._recorders[-1] if self._recorders and self._recorders[-1].wants(layer) else None
        weights_bhts = attention_weights(call) if recorder is not None and recorder.weights else None
        heads_bthe = attend(call) if weights_bhts is None else combine(call, weights_bhts)

        def windowed(heads: tuple[int, ...], window: int) -> Tensor:
            narrow_bnts = attention_weights(call, heads, window)
            if weights_bhts is not None:
                weights_bhts[:, list(heads)] = narrow_bnts
            return combine(call, narrow_bnts, heads)

        heads_bthe = ablate_heads(heads_bthe, layer.index, self._ablations, windowed)
        if recorder is not None:
            recorder.show(layer, _activations(layer, call, weights_bhts, heads_bthe))
        return heads_bthe

    def _trunk(self, tokens_bt: Tensor) -> Tensor:
        """Hidden states [b, t, w] after the final norm."""
        return run(self._stem, tokens_bt).last_hidden_state

    def _head_logits(self, hidden_btw: Tensor) -> Tensor:
        """The head with the factors and the cap that families put after it."""
        logits_btv = self._head(hidden_btw) * getattr(self._text, "logit_scale", 1.0)
        logits_btv = logits_btv / getattr(self._text, "logits_scaling", 1.0)
        cap = getattr(self._text, "final_logit_softcapping", None)
        return logits_btv if cap is None else cap * (logits_btv / cap).tanh()

    def _blocks(self) -> nn.ModuleList:
        """The list of blocks that holds the attention layers."""
        path = self.layers[0].name.split(".")
        for end in range(len(path), 0, -1):
            module = self.model.get_submodule(".".join(path[:end]))
            if isinstance(module, nn.ModuleList):
                return module
        raise ConfigError(
            f"{self.architecture} keeps its blocks in no list, so that its hidden states cannot be found."
        )

    @torch.no_grad()
    def _compare(self) -> bool:
        """Hold seam, stem and head to the model's own logits; returns whether losses must use all logits.

        A model whose fused attention leaves out what its family defines (a cap on the scores) is set to eager attention.

        Raises:
            ConfigError: the logits through the seam are others, or the head does not read what the stem returns.
        """
        index = torch.arange(2 * CHECKED, device=self.device)
        tokens_bt = (index * 7919 % self._rows).view(2, CHECKED)
        own_btv, read_btw = self._with_hidden(tokens_bt)
        if not bool(own_btv.isfinite().all()):
            return True  # visits name the layer
        with self._seam.open(self._receive):
            seen_btv = self.logits(tokens_bt)
        share = ALIKE_HALF if own_btv.dtype.itemsize < 4 else ALIKE
        if _differ(seen_btv, own_btv, share):
            self.model.set_attn_implementation("eager")  # type: ignore[operator]
            own_btv, read_btw = self._with_hidden(tokens_bt)
        if _differ(seen_btv, own_btv, share):
            others = sorted({other for layer in self._layers for other in layer.facts.others})
            unknown = f" (it passes {', '.join(others)}, which is not understood)" if others else ""
            raise ConfigError(
                f"the attention of {self.architecture} computes something else than scaled products, softmax and mask"
                f"{unknown}: seen through the attention interface its logits differ. This family cannot be analysed."
            )
        if _differ(self._trunk(tokens_bt), read_btw, share):
            raise ConfigError(
                f"the head of {self.architecture} does not read what {type(self._stem).__name__} returns, so that its "
                "final hidden states cannot be found. This family cannot be analysed."
            )
        return _differ(self._head_logits(read_btw), own_btv, share)

    def _with_hidden(self, tokens_bt: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own logits, and what its head read."""
        read: list[Tensor] = []
        handle = self._head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        try:
            return self.logits(tokens_bt), read[-1]
        finally:
            handle.remove()


def _differ(seen: Tensor, own: Tensor, share: float) -> bool:
    """Whether two results differ by more than a share of the largest value."""
    return seen.shape != own.shape or float((seen - own).abs().max()) > share * float(own.abs().max())


def _activations(layer: HuggingFaceLayer, call: Call, weights_bhts: Tensor | None, heads_bthe: Tensor) -> Activations:
    """What `look` is given, in the conventions of `Subject`."""
    order_d = layer.facts.reading.order_d
    q_bhtd, k_bgsd = call.q_bhtd, call.k_bgsd
    if order_d is not None:
        q_bhtd, k_bgsd = q_bhtd[..., order_d.to(q_bhtd.device)], k_bgsd[..., order_d.to(k_bgsd.device)]
    repeats = layer.heads // layer.kv_heads
    return Activations(
        q_bhtd.float(),
        k_bgsd.float().repeat_interleave(repeats, dim=1),
        call.v_bgse.float().repeat_interleave(repeats, dim=1),
        None if weights_bhts is None else weights_bhts.float(),
        heads_bthe.float(),
        call.scale,
    )


def _stem(model: nn.Module, layer: nn.Module) -> nn.Module:
    """The model without its head: the child that holds the attention layers."""
    for child in model.children():
        if any(module is layer for module in child.modules()):
            return child
    raise ConfigError(
        f"{type(model).__name__} keeps no part that ends before its head; this family cannot be analysed."
    )


def _output_head(model: Any) -> nn.Module:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} has an encoder and a decoder; give a causal language model.")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ConfigError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM.")
    return head


def _head_shape(head: Any) -> tuple[int, int]:
    """Rows and width of the head, which quantised heads state as features."""
    if hasattr(head, "out_features") and hasattr(head, "in_features"):
        return int(head.out_features), int(head.in_features)
    rows, width = head.weight.shape
    return int(rows), int(width)
