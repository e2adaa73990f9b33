"""Watch a model while it trains: the numbers of the analyses in the validation record, at a bounded cost.

    train(recipe, directory, callbacks=[Watch(["attention-rank", "anisotropy"])])
    torchstone train recipe.yaml --watch attention-rank --watch anisotropy

Before the first step a watch looks once: an analysis that does not fit the model or its rows is refused then, and the time
of a look is known. From then on it looks at an evaluation only if all its looks so far and one more stay below `share` of the
training time of this process (1 %), and at the last evaluation of the run in any case. So it takes at most about 1 % of the
time of training, or in a run that is too short for that one look before the first step, and one look at the end beyond it.
Which evaluations are left out depends on the machine's speed; training itself does not depend on the watch in any way, since
nothing of the model is changed and no random number is drawn.

A watch never ends a run that has begun: an analysis that fails later, and a number that is not finite, is left out of the
record with a warning.

Each number's name begins with its analysis: `anisotropy/final`, `rope-usage/layer01/slow_share`.

Pitfall: layer-gradients cannot be watched, because it needs pairs of prompts and responses; nor can rank-sweep and ngram-rank,
which train heads and read a whole text.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor

from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, TorchstoneError
from torchstone.storage.names import safe_text
from torchstone.train.budget import steps_of
from torchstone.train.loop import Callback, RunView

SHARE = 0.01
ROWS = 8
MOST_TOKENS = 1024
Numbers = Mapping[str, float]


def attention_rank_numbers(subject: Subject, tokens_bt: Tensor) -> Numbers:
    """Mean ranks and balance of the attention products (weights alone)."""
    from torchstone.diagnose.ranks.decoder_rank import rank_metrics

    return rank_metrics(subject.model)


def head_spectrum_numbers(subject: Subject, tokens_bt: Tensor) -> Numbers:
    """Entropy, effective and stable rank and top share of the output matrix (weights alone)."""
    from torchstone.diagnose.bottleneck.head_spectrum import spectrum

    return spectrum(subject.head_weight()).metrics()


def anisotropy_numbers(subject: Subject, tokens_bt: Tensor) -> Numbers:
    """Mean cosine of the states after the final norm, raw and centred."""
    from torchstone.diagnose.bottleneck.anisotropy import anisotropy

    final_nd = subject.hidden_states(tokens_bt)[-1].flatten(0, 1).double()
    return {"final": anisotropy(final_nd), "final_centred": anisotropy(final_nd - final_nd.mean(0))}


def rope_usage_numbers(subject: Subject, tokens_bt: Tensor) -> Numbers:
    """Share of the product usage in the slowest and the fastest quarter of the frequencies, by layer."""
    from torchstone.diagnose.rotary.frequency_usage import frequency_usage

    found: dict[str, float] = {}
    for usage in frequency_usage(subject, tokens_bt):
        found[f"layer{usage.layer:02d}/slow_share"] = float(usage.slow_share_u.mean())
        found[f"layer{usage.layer:02d}/fast_share"] = float(usage.fast_share_u.mean())
    return found


def positional_heads_numbers(subject: Subject, tokens_bt: Tensor) -> Numbers:
    """Largest and mean shift score and mean distance, over the heads for which they are defined."""
    from torchstone.diagnose.distance.heads import MIN_NULL, DistanceSettings, distance_heads

    table = distance_heads(subject, tokens_bt, DistanceSettings(null=MIN_NULL))
    shift, distance = (_defined(table.column(name)) for name in ("shift", "mean_distance"))
    return {
        "largest_shift": float(shift.max()) if shift.numel() else math.nan,
        "mean_shift": float(shift.mean()),
        "mean_distance": float(distance.mean()),
    }


def _defined(values: Tensor) -> Tensor:
    """The values that are numbers; the mean of none is nan, which is reported."""
    return values[~values.isnan()]


WATCHES: dict[str, Callable[[Subject, Tensor], Numbers]] = {
    "anisotropy": anisotropy_numbers,
    "attention-rank": attention_rank_numbers,
    "head-spectrum": head_spectrum_numbers,
    "positional-heads": positional_heads_numbers,
    "rope-usage": rope_usage_numbers,
}


class Watch(Callback):
    """Adds the numbers of analyses to the validation record.

    Args:
        analyses: names among `WATCHES`.
        share: most of the training time that it may take, looks at the start and at the end apart (see the module).

    Raises:
        ConfigError: an unknown analysis, none at all, or a share outside (0, 1].
    """

    def __init__(self, analyses: Sequence[str], share: float = SHARE) -> None:
        for name in analyses:
            if name not in WATCHES:
                near = get_close_matches(name, WATCHES, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ConfigError(f"{name!r} cannot be watched; what can: {', '.join(WATCHES)}.{hint}")
        if not analyses or not 0 < share <= 1:
            raise ConfigError(
                f"a watch needs analyses and a share above 0 and at most 1; given {list(analyses)}, {share:g}."
            )
        self.analyses, self.share = tuple(dict.fromkeys(analyses)), share
        self.spent = self.usual = self.begun = 0.0

    def on_start(self, view: RunView) -> None:
        """Look once, which shows whether the analyses fit and what a look costs.

        Raises:
            ConfigError: an analysis that the model has nothing for. DataError: rows that are too short for it.
        """
        self.spent, self.begun = 0.0, view.position.seconds
        self._timed(lambda: self._look(view))

    def on_evaluation(self, view: RunView) -> Mapping[str, float]:
        """The numbers, or nothing where they cannot be afforded yet."""
        last = view.position.step >= steps_of(view.recipe)
        allowed = self.share * (view.position.seconds - self.begun)
        if not last and self.spent + self.usual > allowed:
            return {}
        return self._timed(lambda: self._finite(self._look(view, self._warn), view.position.step))

    def _timed(self, look: Callable[[], dict[str, float]]) -> dict[str, float]:
        begun = time.perf_counter()
        found = look()
        self.usual = time.perf_counter() - begun
        self.spent += self.usual
        return found

    def _look(self, view: RunView, failed: Callable[[str], None] | None = None) -> dict[str, float]:
        """The numbers; an analysis that cannot give them raises, or is told to `failed` and left out."""
        from torchstone.diagnose.adapters import open_subject

        training = view.model.training
        found: dict[str, float] = {}
        try:
            subject = open_subject(view.model)
            tokens_bt = _tokens(view, subject.device)
            for name in self.analyses:
                try:
                    numbers = WATCHES[name](subject, tokens_bt)
                except (TorchstoneError, RuntimeError) as error:  # torch's own: memory, a decomposition that fails
                    if failed is None:
                        raise
                    failed(f"{name} after step {view.position.step} failed and is left out: {error}")
                    continue
                found |= {f"{name}/{number}": value for number, value in numbers.items()}
        finally:
            view.model.train(training)
        return found

    def _finite(self, numbers: Mapping[str, float], step: int) -> dict[str, float]:
        """The numbers that a record can hold; the others are reported."""
        kept = {name: value for name, value in numbers.items() if math.isfinite(value)}
        if left := [f"{name} is {numbers[name]}" for name in numbers if name not in kept]:
            self._warn(f"{', '.join(left)} after step {step} and is left out")
        return kept

    def _warn(self, text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: watch: {safe_text(text)}", file=sys.stderr, flush=True)


def _tokens(view: RunView, device: torch.device) -> Tensor:
    """The first held-out rows, few and short enough to be cheap."""
    batch = next(iter(view.data.evaluation(ROWS, min(ROWS, view.recipe.evaluation.sequences))))
    return batch.tokens_bt[:, :MOST_TOKENS].to(device)
