"""A model as LongPPL reads it: ids with the characters they stand for, and losses; whatever made it.

Torchstone runs, Hugging Face models and plain functions `ids → logits` become one thing here, a `Scorer`. Losses are those of
fp32 log-softmax, and logits are made for the targets that are scored alone, in pieces, where the model lets itself be split
into trunk and head.

Shapes: t ids of a text · b windows · v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.adapters.loading import load_tokenizer
from torchstone.diagnose.adapters.text_codec import Spans, TextCodec
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.objectives.long_context import TOKENS_AT_ONCE, callable_losses
from torchstone.objectives.long_context_windows import windowed
from torchstone.storage.hashing import bytes_hash, fingerprint_of


@dataclass(frozen=True, eq=False)
class Scorer:
    """A model that gives losses of texts.

    Attributes:
        name: for people.
        spans: (text, with special tokens) → ids and characters.
        losses: (ids [b, t], last) → fp32 losses [b, last] of the last ids.
        source: what it was made of; equal objects are one model.
        max_length: ids that it can read, or None.
        fixed: a longer text cannot be read at all (a learned table of positions), rather than badly.
        device: where ids must be.
        known: ids that it has an embedding for, or None.
    """

    name: str
    spans: Callable[[str, bool], Spans]
    losses: Callable[[Tensor, int], Tensor]
    source: Any
    max_length: int | None = None
    fixed: bool = False
    device: torch.device = torch.device("cpu")
    known: int | None = None

    def encoded(self, text: str, special: bool) -> Spans:
        """Ids and characters; raises DataError for an id that the model does not know."""
        ids, spans = self.spans(text, special)
        if self.known is not None and ids and max(ids) >= self.known:
            raise DataError(
                f"the text holds token {max(ids)}, and {self.name} knows {self.known} (0 to {self.known - 1}): tokenizer and "
                "model do not belong together; give the model's own tokenizer."
            )
        return ids, spans

    def identity(self) -> str:
        """A hash that other weights do not have.

        Raises:
            ConfigError: a plain function, which has no weights to tell it by, without a name of its own.
        """
        model = self.source.model if isinstance(self.source, Subject) else self.source
        if isinstance(model, nn.Module):
            state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
            return fingerprint_of(
                {name: _tensor_hash(value) for name, value in state.items()} | {"": type(model).__name__}
            )
        named = getattr(model, "identity", None)
        if not isinstance(named, str):
            raise ConfigError(
                "key tokens of a plain function cannot be kept, since nothing tells it from another; give it an attribute "
                "`identity` (a string that changes with it), or leave cache out."
            )
        return fingerprint_of(["function", named])


def scorer_of(model: Any, tokenizer: Any = None) -> Scorer:
    """A scorer of a run directory, a Hugging Face folder or hub id, a model in memory, a subject, or a function ids → logits.

    Args:
        model: the model.
        tokenizer: in place of its own: a path or hub id, a tokenizer, or an object with `spans(text, special)`. A plain function
            has none of its own.

    Raises:
        ConfigError: nothing that gives losses, or a function without a tokenizer. DataError: files are missing or damaged.
    """
    subject = model if isinstance(model, Subject) else None
    if subject is None and (isinstance(model, str | Path) or _opens(model)):
        subject = open_subject(model)
    if subject is not None:
        spans = subject.spans if tokenizer is None else _spans_of(tokenizer, subject.name)
        rotates = any(layer.rotation is not None for layer in subject.layers)
        return Scorer(
            subject.name,
            spans,
            subject.losses,
            subject,
            subject.max_length,
            subject.max_length is not None and not rotates,
            subject.device,
            getattr(subject.embedding(), "num_embeddings", None),
        )
    if not callable(model):
        raise ConfigError(
            f"a {type(model).__name__} is no model; give a run directory, a Hugging Face folder or model, or a function of ids "
            "[b, t] that gives logits [b, t, v]."
        )
    if tokenizer is None:
        raise ConfigError("a plain function has no tokenizer; give tokenizer (for the evaluator evaluator_tokenizer).")
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    device = parameters[0].device if parameters else torch.device("cpu")
    name = getattr(model, "__name__", type(model).__name__)

    def losses(tokens_bt: Tensor, last: int) -> Tensor:
        return callable_losses(model, tokens_bt, last)

    return Scorer(name, _spans_of(tokenizer, name), losses, model, device=device)


def full_losses(scorer: Scorer, ids: Sequence[int]) -> NDArray[np.float32]:
    """Losses of all ids with everything before them as context, fp32 [t]; nan for the first."""
    ids_1t = torch.tensor([list(ids)], dtype=torch.long, device=scorer.device)
    found_t = np.full(len(ids), np.nan, dtype=np.float32)
    if len(ids) > 1:
        found_t[1:] = scorer.losses(ids_1t, len(ids) - 1)[0].float().cpu().numpy()
    return found_t


def short_losses(
    scorer: Scorer, ids: Sequence[int], trunc_len: int, stride: int, first: Sequence[int] = ()
) -> NDArray[np.float32]:
    """Losses with the short context of a window, fp32 [t]; nan for the first trunc_len ids.

    Args:
        scorer: the evaluator.
        ids: of the whole text.
        trunc_len, stride: of the windows (`torchstone.objectives.long_context_windows`).
        first: special tokens to put before every window that does not begin with them already, as the first one does.
    """
    ids_t = torch.tensor(list(ids), dtype=torch.long, device=scorer.device)
    first_f = ids_t.new_tensor(list(first))

    def losses(index_nw: Tensor, targets: int) -> Tensor:
        if not len(first) or int(index_nw[0, 0]) > 0:
            return scorer.losses(torch.cat([first_f.expand(len(index_nw), -1), ids_t[index_nw]], dim=1), targets)
        pieces = [scorer.losses(ids_t[index_nw[:1]], targets)]
        return torch.cat([*pieces, losses(index_nw[1:], targets)] if len(index_nw) > 1 else pieces)

    at_once = TOKENS_AT_ONCE.get(scorer.device.type, TOKENS_AT_ONCE["cpu"])
    index_1t = torch.arange(len(ids), device=scorer.device)[None]
    short_1s = windowed(index_1t, trunc_len, stride, losses, length=len(ids), at_once=at_once)
    found_t = np.full(len(ids), np.nan, dtype=np.float32)
    found_t[len(ids) - short_1s.shape[1] :] = short_1s[0].float().cpu().numpy()
    return found_t


def _opens(model: Any) -> bool:
    """Whether `open_subject` takes this model in memory."""
    if not isinstance(model, nn.Module):
        return False
    kinds = {kind.__name__ for kind in type(model).__mro__}
    return bool(kinds & {"Decoder", "PreTrainedModel"})


def _spans_of(tokenizer: Any, name: str) -> Callable[[str, bool], Spans]:
    if isinstance(tokenizer, str | Path):
        return TextCodec(lambda: load_tokenizer(str(tokenizer), None, False), name).spans
    whole = isinstance(tokenizer, Subject | TextCodec) or not hasattr(tokenizer, "encode")
    own = getattr(tokenizer, "spans", None) if whole else None
    return TextCodec(lambda: tokenizer, name).spans if own is None else own


def _tensor_hash(value: Tensor) -> str:
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {list(value.shape)} {bytes_hash(data)}"
