"""Watch a model while it trains: the numbers of the analyses in the validation record, at a bounded cost.

    train(recipe, directory, callbacks=[Watch(["attention-rank", "anisotropy"])])
    torchstone train recipe.yaml --watch attention-rank --watch anisotropy

A watch looks at evaluations. It keeps the time that it has spent below `share` of the time of training (1 %): it leaves out
an evaluation that it cannot afford yet, except the last one of the run, which always has the numbers. Which evaluations are
left out depends on the machine's speed; training itself does not depend on the watch in any way, since nothing of the model
is changed and no random number is drawn.

Each number's name begins with its analysis: `anisotropy/final`, `rope-usage/layer01/slow_share`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor

from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError
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
    """Largest and mean shift score and mean distance over all heads."""
    from torchstone.diagnose.distance.heads import MIN_NULL, DistanceSettings, distance_heads

    table = distance_heads(subject, tokens_bt, DistanceSettings(null=MIN_NULL))
    shift = table.column("shift").nan_to_num(0.0)
    return {
        "largest_shift": float(shift.max()),
        "mean_shift": float(shift.mean()),
        "mean_distance": float(table.column("mean_distance").mean()),
    }


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
        share: most of the training time that it may take.

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
        self.spent, self.looks = 0.0, 0

    def on_evaluation(self, view: RunView) -> Mapping[str, float]:
        """The numbers, or nothing where they cannot be afforded yet."""
        last = view.position.step >= steps_of(view.recipe)
        usual = self.spent / self.looks if self.looks else 0.0
        if not last and self.spent + usual > self.share * view.position.seconds:
            return {}
        begun = time.perf_counter()
        found = self._look(view)
        self.spent, self.looks = self.spent + time.perf_counter() - begun, self.looks + 1
        return found

    def _look(self, view: RunView) -> dict[str, float]:
        from torchstone.diagnose.adapters import open_subject

        training = view.model.training
        try:
            subject = open_subject(view.model)
            tokens_bt = _tokens(view, subject.device)
            found = {
                f"{name}/{number}": value
                for name in self.analyses
                for number, value in WATCHES[name](subject, tokens_bt).items()
            }
        finally:
            view.model.train(training)
        return {name: value for name, value in found.items() if math.isfinite(value)}


def _tokens(view: RunView, device: torch.device) -> Tensor:
    """The first held-out rows, few and short enough to be cheap."""
    batch = next(iter(view.data.evaluation(ROWS, min(ROWS, view.recipe.evaluation.sequences))))
    return batch.tokens_bt[:, :MOST_TOKENS].to(device)
