"""torchstone runs as the model `torchstone` of lm-evaluation-harness.

    python -m torchstone.interop.lm_eval --model torchstone --model_args run=runs/first --tasks hellaswag
    evaluate("runs/first", ["hellaswag"], limit=100)

Importing this module registers the model. Scores are those of the decoder itself: log-likelihoods in one parallel pass for
each batch, longest first, and generation on torchstone's own decoding state, from which rows leave when they are done.

Conventions, equal to those of the harness's own `hf` model on a folder of `torchstone export`:
    empty context   the token that ends a document, after which a model has seen every text begin
    too long        the left end of the context is cut to `max_length`, by default the length of a training sequence
    rolling         windows of `max_length` tokens, each token scored once

Shapes: b rows · t tokens · n continuation tokens · d width · v vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchstone.data.tokenizer import Tokenizer
from torchstone.errors import ConfigError, DependencyError
from torchstone.models.decoder import Decoder
from torchstone.models.sampling import Sampling
from torchstone.nn.initialisation import generator_for
from torchstone.nn.span import Span
from torchstone.train.precision import default_device
from torchstone.train.run import load_run

try:
    import lm_eval.models  # noqa: F401  the harness registers its own models only while none is registered
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise DependencyError("lm-evaluation-harness is not installed: pip install 'torchstone[lm-eval]'") from error

_log = logging.getLogger(__name__)
MOST_NEW = 256  # tokens to generate where a task does not say
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DTYPES = ("float32", "bfloat16")
Scored = tuple[float, bool]


@dataclass
class _Continuation:
    """A text in progress."""

    index: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)


@register_model("torchstone")
class TorchstoneLM(TemplateLM):
    """A run directory as a model of lm-evaluation-harness.

    Args:
        run: what `torchstone train` or `torchstone import` left.
        step: which checkpoint; None takes the newest.
        batch_size: rows of a pass.
        device: None takes the first GPU, else the CPU.
        dtype: of the weights, one of DTYPES.
        max_length: most tokens that the model reads at once; None takes the length of a training sequence.
        seed: of sampled texts.
        max_batch_size: as the harness gives it; has no effect, since `batch_size` is a number here.

    Raises:
        ConfigError: no run, a run without a tokenizer, or a setting out of range.
    """

    def __init__(
        self,
        run: str,
        step: int | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES or not str(batch_size or 1).isdecimal():
            raise ConfigError(
                f"dtype is {dtype!r} and batch_size {batch_size!r}; dtypes are {', '.join(DTYPES)}, and batch_size is a number "
                "of rows."
            )
        _, model, data = load_run(Path(run), step)
        tokenizer: Tokenizer | None = getattr(data, "tokenizer", None)
        if tokenizer is None or not isinstance(model, Decoder):
            raise ConfigError(
                f"{run} was not trained on text as a decoder, so tasks have no meaning for it; give one that was."
            )
        self._device = _usable(device)
        self.model = model.to(self._device, getattr(torch, dtype))
        self.codec, self.run, self.seed = tokenizer, str(run), int(seed)
        self.batch_size, self.max_length = int(batch_size or 16), int(max_length or model.length)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.codec.end_of_document

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in request caches."""
        return self.codec.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What results say about the model."""
        return {"model_run": self.run, "model_num_parameters": sum(p.numel() for p in self.model.parameters())}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; torchstone's tokenizers add no special tokens."""
        return self.codec.encode(string)

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.codec.decode([tokens] if isinstance(tokens, int) else list(tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        """ln p of each continuation after its context, and whether it is what greedy decoding gives."""
        found: list[Scored] = [(0.0, True)] * len(requests)
        sequences = [self._cut(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(requests)), key=lambda index: -len(sequences[index]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            scores = self._score([(sequences[index], len(requests[index][2])) for index in chosen])
            for index, answer in zip(chosen, scores, strict=True):
                found[index] = answer
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return found

    def _cut(self, context: list[int], continuation: list[int]) -> list[int]:
        """Context and continuation, cut on the left; an empty context is the end of another document."""
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"a continuation has {len(continuation)} tokens and max_length is {self.max_length}; raise it: "
                "--model_args run=…,max_length=N."
            )
        return [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]

    @torch.no_grad()
    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[Scored]:
        """Scores of sequences whose last tokens, so many, are the continuation; padded on the right, which nothing sees."""
        longest = max(len(sequence) for sequence, _ in rows) - 1
        padded = [sequence[:-1] + [0] * (longest - len(sequence) + 1) for sequence, _ in rows]
        hidden_btd = self.model(torch.tensor(padded, device=self._device)).hidden_btd
        found = []
        for (sequence, count), hidden_td in zip(rows, hidden_btd, strict=True):
            last = len(sequence) - 1
            logprobs_nv = self.model.logits(hidden_td[last - count : last]).float().log_softmax(-1)
            target_n = torch.tensor(sequence[len(sequence) - count :], device=self._device)
            value = float(logprobs_nv.gather(1, target_n[:, None]).double().sum())
            found.append((value, bool((logprobs_nv.argmax(-1) == target_n).all())))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, in windows of `max_length`."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            tokens = self.codec.encode(request.args[0])
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [make_disjoint_window(pair) for pair in cut]
            windows += [(None, list(context), list(continuation)) for context, continuation in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue the prompts up to a stop."""
        found = [""] * len(requests)
        prompts = [self.codec.encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for group in groups.values():
            settings = generation_of(requests[group[0]].args[1])
            room = self.max_length - settings.most_new
            if room < 1:
                raise ConfigError(
                    f"the task generates {settings.most_new} tokens and max_length is {self.max_length}; raise it with "
                    "--model_args run=…,max_length=N, or lower the tokens with --gen_kwargs max_gen_toks=N."
                )
            group.sort(key=lambda index: -len(prompts[index]))
            for start in range(0, len(group), self.batch_size):
                rows = [(index, prompts[index][-room:]) for index in group[start : start + self.batch_size]]
                for index, text in self._continue(rows, settings):
                    found[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return found

    @torch.no_grad()
    def _continue(self, rows: Sequence[tuple[int, list[int]]], settings: Generation) -> list[tuple[int, str]]:
        """Texts of some prompts, which share a decoding state; a row leaves it when its text is done."""
        live = [_Continuation(index, generator_for(self.seed, f"harness request {index}")) for index, _ in rows]
        tokens_bt, span, length_b = _left_padded([prompt for _, prompt in rows], self._device)
        state = self.model.new_state(len(rows), tokens_bt.shape[1] + settings.most_new)
        done = []
        for step in range(settings.most_new):
            hidden_btd = self.model(tokens_bt, span, state).hidden_btd
            logits_bv = self.model.logits(hidden_btd[:, -1]).float()
            token_b = settings.sampling.choose(logits_bv, [row.generator for row in live])
            staying = []
            for place, (row, token) in enumerate(zip(live, token_b.tolist(), strict=True)):
                row.tokens.append(token)
                if token == self.eot_token_id or self._stopped(row.tokens, settings.until):
                    done.append((row.index, settings.until_stop(self.codec.decode(row.tokens))))
                else:
                    staying.append(place)
            if len(staying) < len(live):
                live = [live[place] for place in staying]
                if not live:
                    break
                keep_n = torch.tensor(staying, device=self._device)
                state, length_b, token_b = state.select(keep_n), length_b[keep_n], token_b[staying]
            tokens_bt = token_b[:, None].to(self._device)
            span = Span(positions_bt=(length_b + step)[:, None])
        done += [(row.index, settings.until_stop(self.codec.decode(row.tokens))) for row in live]
        return done

    def _stopped(self, tokens: list[int], until: Sequence[str]) -> bool:
        """Whether the last token completed a stop; no more tokens are decoded than a stop can consist of."""
        if not until:
            return False
        reach = max(len(stop.encode()) for stop in until) + 8
        tail = self.codec.decode(tokens[-reach:])
        return any(stop in tail for stop in until)


@dataclass(frozen=True)
class Generation:
    """How a task wants texts: stops, most new tokens, and how tokens are chosen."""

    until: tuple[str, ...]
    most_new: int
    sampling: Sampling

    def until_stop(self, text: str) -> str:
        """The text before the first stop."""
        return text[: min((text.find(stop) for stop in self.until if stop in text), default=len(text))]


def generation_of(given: Mapping[str, Any]) -> Generation:
    """A task's `generation_kwargs`; greedy unless `do_sample` is true, as in the harness.

    Raises:
        ConfigError: a setting that torchstone does not have, or one out of range.
    """
    settings = dict(given)
    until = settings.pop("until", None) or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    lengths = [settings.pop(name) for name in LENGTHS if settings.get(name) is not None]
    sample = bool(settings.pop("do_sample", False))
    temperature = float(settings.pop("temperature", 1.0) or 0.0)
    top_k, top_p = settings.pop("top_k", None) or None, settings.pop("top_p", None)
    left = [name for name, value in settings.items() if value is not None]
    if left:
        known = ", ".join(("until", *LENGTHS, "do_sample", "temperature", "top_k", "top_p"))
        raise ConfigError(
            f"the task asks for {left[0]}={settings[left[0]]!r}, which torchstone does not have; it has {known}."
        )
    greedy = not sample or temperature == 0.0
    sampling = Sampling(greedy=True) if greedy else Sampling(temperature, top_k, top_p)
    return Generation(tuple(stop for stop in until if stop), int(lengths[0]) if lengths else MOST_NEW, sampling)


def evaluate(
    run: str | Path,
    tasks: Sequence[Any],
    *,
    include: str | Path | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Results of a run on tasks of lm-evaluation-harness.

    Args:
        run: a run directory.
        tasks: names of tasks, or task settings as mappings.
        include: folder with task files of your own.
        limit: examples of each task, for trying out.
        num_fewshot: examples in the context; None takes the task's.
        model_args: see `TorchstoneLM`.
        settings: of `lm_eval.simple_evaluate`; a `task_manager` takes the place of `include`.

    Returns:
        the harness's results: `["results"][task]["acc,none"]`, ….
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = TorchstoneLM(str(run), **dict(model_args or {}))
    if "task_manager" not in settings:
        settings["task_manager"] = TaskManager(include_path=None if include is None else str(include))
    found: dict[str, Any] = simple_evaluate(
        model=model, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, **settings
    )
    return found


def _usable(device: str | None) -> torch.device:
    """A device by its name; the default where it is not there, because the harness asks for a GPU unless told otherwise."""
    if device is None:
        return default_device()
    if device.startswith("cuda") and not torch.cuda.is_available():
        _log.warning("there is no GPU here for device %r; torchstone runs on the CPU", device)
        return torch.device("cpu")
    return torch.device(device)


def _left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Span, Tensor]:
    """Tokens [b, t], the span that hides the padding, and the length of each prompt [b]."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    tokens_bt = torch.tensor(rows, device=device)
    length_b = torch.tensor([len(prompt) for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return tokens_bt, Span(), length_b
    positions_bt = torch.arange(longest, device=device) - (longest - length_b)[:, None]
    return tokens_bt, Span(positions_bt=positions_bt.clamp_min(0), valid_bt=positions_bt >= 0), length_b


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
