"""What all our optimizers refuse or survive: unknown settings, other states, copies, a rate of 0, what is no number."""

from __future__ import annotations

import copy
import subprocess
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.optim import momentum_native as native
from torchstone.optim.lion import Lion
from torchstone.optim.liona import LionA
from torchstone.optim.lionar import LionAR
from torchstone.optim.rotational import Rotational
from torchstone.optim.rrc import RRCLimiter
from torchstone.optim.sgdm import SGDM


def weight(*shape: int, shift: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)) + shift)


def stepped(optimizer: Any) -> Any:
    for group in optimizer.param_groups:
        for value in group["params"]:
            value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "group, words",
    [
        ({"bias_correction": "half"}, "bias_correction is 'half'; choose one of none, adam, inverse, rms"),
        ({"angle_schedule": "cubic"}, "angle_schedule is 'cubic'; choose one of sqrt, linear"),
        ({"update_norm_deacy": 0.3}, "gives update_norm_deacy, which it does not have"),
        ({"betas": (0.9, 0.99)}, "gives betas, which it does not have"),
        ({"lr": 0.1}, "lr is 0.1, above peak_lr 0.001"),
    ],
)
def test_settings_of_a_group_are_checked(group: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LionAR([{"params": [weight(4, 5)], **group}], peak_lr=1e-3)


def test_a_refused_build_leaves_no_trace() -> None:
    good, bad = weight(4, 5, shift=1.0), nn.Parameter(torch.zeros(4, 5))
    before = good.detach().clone()
    with pytest.raises(ConfigError, match="zero norm"):
        LionAR([{"params": [good]}, {"params": [bad]}], peak_lr=1e-3)
    assert torch.equal(good, before)
    optimizer = LionAR([weight(4, 5)], peak_lr=1e-3)
    with pytest.raises(ConfigError, match="zero norm"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


def test_only_vectors_do_not_rotate() -> None:
    with pytest.raises(ConfigError, match="LionAR was given no matrix that may rotate"):
        LionAR([weight(5)], peak_lr=1e-3)


def test_states_of_other_optimizers_are_refused() -> None:
    for made, other in ((LionA, Lion), (Lion, LionA), (SGDM, Lion)):
        with pytest.raises(ConfigError, match=f"the state is not that of {other.__name__}"):
            other([weight(4, 5)]).load_state_dict(stepped(made([weight(4, 5)])).state_dict())
    adamw = stepped(torch.optim.AdamW([weight(4, 5)]))
    with pytest.raises(ConfigError, match="the state is not that of Rotational"):
        Rotational([weight(4, 5)]).load_state_dict(adamw.state_dict())


def test_a_parameter_unfrozen_later_is_centred_before_it_turns() -> None:
    late = weight(4, 5, shift=1.0)
    late.requires_grad_(False)
    optimizer = LionAR([late, weight(4, 5)], peak_lr=1e-3)
    late.requires_grad_(True)
    stepped(optimizer)
    assert float(late.detach().mean(1).abs().max()) < 1e-6


@pytest.mark.parametrize("fused", [True, False])
def test_a_rate_of_zero_moves_moments_alone(fused: bool) -> None:
    value = weight(4, 5)
    optimizer = Rotational([value], lr=0.0, fused=fused)
    before = value.detach().clone()
    stepped(optimizer)
    state = optimizer.state[value]
    assert torch.equal(value, before) and state["turns"] == 0 and state["step"] == 1 and bool(state["exp_avg"].any())
    assert not state["row_square"].any()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("make", [lambda p, f: Lion([p], fused=f), lambda p, f: LionAR([p], peak_lr=1e-3, fused=f)])
def test_a_sign_does_not_hide_what_is_no_number(make: Any, fused: bool) -> None:
    value = weight(4, 5)
    optimizer = make(value, fused)
    value.grad = torch.ones(4, 5)
    value.grad[1, 2] = torch.nan
    optimizer.step()
    assert value[1].isnan().any() and not value[0].isnan().any()


def test_a_copy_is_not_limited() -> None:
    optimizer = LionA([weight(4, 5)])
    RRCLimiter(optimizer, 64)
    stepped(optimizer)
    assert optimizer.rates and copy.deepcopy(optimizer).rates == {}


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: SGDM(p, weight_decay=0.1), "decay of SGDM goes through its momentum"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "decay of Adam goes through its momentum"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "maximize=True"),
    ],
)
def test_a_limit_that_would_be_wrong_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RRCLimiter(make([weight(4, 5)]), 64)


def test_a_limit_needs_gradients_before_the_step() -> None:
    value = weight(4, 5)
    optimizer = Lion([value])
    RRCLimiter(optimizer, 64)

    def closure() -> Tensor:
        loss = value.square().sum()
        loss.backward()
        return loss

    with pytest.raises(ConfigError, match="given a closure"):
        optimizer.step(closure)


@pytest.mark.parametrize("error", [OSError("No space left on device"), subprocess.TimeoutExpired("cc", 60)])
def test_a_kernel_that_cannot_be_made_ends_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*given: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(native, "_compiled", fails)
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="slower than the compiled kernel"):
            stepped(Lion([weight(4, 5)]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stepped(Lion([weight(4, 5)]))
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
        with warnings.catch_warnings():  # of a machine without a compiler, which has been told already
            warnings.simplefilter("ignore")
            native.library()
