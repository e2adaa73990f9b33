"""Seeing and changing what an attention mixer of torchstone computes; outside these blocks it runs as always.

Heads are seen and changed where they enter the output projection, by a hook on `w_o`. Queries, keys and values are taken
where the mixer hands them to attention, so that no maps are made unless they are wanted; then they come from the mixer's
own observation (`nn.attention.observe`), with biases, score processors and differences of maps.

For a window, the mixer is run a second time with that window and the chosen heads are taken from it, which is right for
every kind of attention.

Shapes: b batch · t queries · s keys · u query sub-heads · h heads · d, e channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchstone.diagnose.adapters.ablation import Ablation, ablate_heads
from torchstone.diagnose.adapters.record import Recorder
from torchstone.diagnose.subject import Activations, AttentionLayer
from torchstone.errors import ConfigError
from torchstone.nn.attention.observe import Observation


@contextmanager
def watched(mixer: Any, layer: AttentionLayer, recorder: Recorder) -> Iterator[None]:
    """Show the mixer each time that its heads enter the output projection, after every ablation around this block."""
    previous, given = mixer.observation, mixer.__dict__.get("_attend")
    attend = mixer._attend
    taken: list[Tensor] = []

    def take(q_btud: Tensor, k_btgd: Tensor, v_btge: Tensor, *others: Any, **more: Any) -> Tensor:
        k_bsud, v_bshe = _repeat(k_btgd, q_btud.shape[2]), _repeat(v_btge, mixer.heads)
        taken[:] = [x.transpose(1, 2) for x in (q_btud, k_bsud, v_bshe)]
        return attend(q_btud, k_btgd, v_btge, *others, **more)

    def show(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not recorder.wants(layer):
            return
        q_butd, k_busd, v_bhse = (x.float() for x in taken)
        weights_bhts = mixer.observation.weights.float() if recorder.weights else None
        heads_bthe = by_head(mixer, inputs[0]).float()
        taken.clear()
        mixer.observation = Observation() if recorder.weights else None
        maps = mixer.maps // mixer.heads
        recorder.show(layer, Activations(q_butd, k_busd, v_bhse, weights_bhts, heads_bthe, mixer.scale, maps))

    handle = mixer.w_o.register_forward_pre_hook(show)
    mixer._attend = take
    mixer.observation = Observation() if recorder.weights else None
    try:
        yield
    finally:
        handle.remove()
        mixer.observation = previous
        del mixer._attend
        if given is not None:
            mixer._attend = given


@contextmanager
def ablated(mixer: Any, index: int, ablation: Ablation) -> Iterator[None]:
    """Change heads of the mixer, layer `index`, where they enter the output projection."""
    narrow: list[tuple[Tensor, Tensor | None]] = []

    def run_windowed(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert ablation.window is not None
        if len(inputs) > 2 and inputs[2] is not None:
            raise ConfigError(
                "a window ablation met a decoding state, which the second run would advance twice; run whole sequences."
            )
        narrow.append(_under_window(mixer, inputs, ablation.window))

    def windowed(heads: tuple[int, ...], window: int) -> Tensor:
        heads_bthe, weights_bhts = narrow.pop()
        if weights_bhts is not None:
            mixer.observation.weights = mixer.observation.weights.clone()
            mixer.observation.weights[:, list(heads)] = weights_bhts[:, list(heads)]
        return heads_bthe[:, :, list(heads)]

    def replace(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (ablate_heads(by_head(mixer, inputs[0]), index, [ablation], windowed).flatten(2),)

    handles = [mixer.w_o.register_forward_pre_hook(replace)]
    if ablation.mode == "window":
        handles.append(mixer.register_forward_pre_hook(run_windowed))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_head(mixer: Any, heads_btx: Tensor) -> Tensor:
    """[b, t, h·e] → [b, t, h, e]."""
    return heads_btx.unflatten(-1, (mixer.heads, mixer.value_shape[1]))


def _under_window(mixer: Any, inputs: tuple[Any, ...], window: int) -> tuple[Tensor, Tensor | None]:
    """Head outputs [b, t, h, e], and weights where the mixer is observed, of the mixer on these inputs with a window.

    The mixer's hooks do not run: its `forward` is called, with another module in the place of `w_o`.
    """
    caught: list[Tensor] = []
    own_window, own_projection, own_observation = mixer.window, mixer.w_o, mixer.observation
    observation = None if own_observation is None else Observation()
    mixer.window = window if own_window is None else min(own_window, window)
    mixer.w_o, mixer.observation = _Catcher(caught), observation
    try:
        mixer.forward(*inputs)
    finally:
        mixer.window, mixer.w_o, mixer.observation = own_window, own_projection, own_observation
    return by_head(mixer, caught[0]), None if observation is None else observation.weights


def _repeat(x_btgd: Tensor, heads: int) -> Tensor:
    """One key or value head per query (sub-)head, as attention reads them."""
    repeats = heads // x_btgd.shape[2]
    return x_btgd if repeats == 1 else x_btgd.repeat_interleave(repeats, dim=2)


class _Catcher(nn.Module):
    """Keeps what would enter the output projection."""

    def __init__(self, caught: list[Tensor]) -> None:
        super().__init__()
        self._caught = caught

    def forward(self, heads_btx: Tensor) -> Tensor:
        """Keep and return the input."""
        self._caught.append(heads_btx)
        return heads_btx
