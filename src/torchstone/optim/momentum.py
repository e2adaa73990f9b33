"""Base of our optimizers: groups, state, steps, the rotation of chosen parameters.

A subclass says what its rule is (`direction`, `beta_of`), what it keeps per parameter (`moments`) and, if it rotates, the target
angle (`angle`). Everything else is here: which parameters rotate, centring at construction, sparse and tied parameters, state.

State of a parameter: `step` (int), the rule's moments in the parameter's shape, and where it rotates `row_norm` (N) and
`row_square` (q), one number per row, and `turns` (t of q, int). All tensors are fp32 for weights of 16 bits, and
`load_state_dict` keeps them so.

Pitfalls: building a rotational optimizer with `zero_mean` changes weights (their rows are centred), so it is built before stored
weights are loaded; for weights that are centred already nothing changes, and loading a state never touches weights. A group whose
weight decay changes has another angle, though no decay is applied: log `angles()`, not only the rate.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.optim.momentum_checks import check_group, check_state, refuse_parameters, refuse_unknown
from torchstone.optim.momentum_direction import Direction, update_factor
from torchstone.optim.momentum_update import Piece, Plain, Turn, correction_of, update
from torchstone.optim.rotational_rows import centre, norm_shape, row_norms, row_shape, state_dtype

STILL = -1
"""In place of the number of a rotation: the angle is 0, so that moments go on and no weight is touched."""
COARSE = 2e-3
"""Rotations below this are lost in the rounding of 16-bit weights."""


class MomentumOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer whose rule is a `Direction`.

    Args:
        params: parameters, named parameters, or groups of either.
        defaults: settings of groups that do not give their own.
        fused: False for tensor operations only; None or True: the compiled kernel where it fits.

    Raises:
        ConfigError: a setting is out of range, a parameter is listed twice, or a rotation is undefined.
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg",)
    sums: ClassVar[bool] = False
    """Whether the momentum is SGD's: a sum of gradients, through which decay goes too."""
    rest_decays: ClassVar[bool] = True
    """Whether what does not rotate in a group that rotates is decayed."""

    def __init__(self, params: Any, defaults: dict[str, Any], fused: bool | None = None) -> None:
        self.fused = fused is not False
        self.rates: dict[nn.Parameter, float] = {}
        self._warned, self._built = False, False
        super().__init__(params, defaults)
        self._built = True
        for group in self.param_groups:  # once nothing can be refused any more
            self._centre(group)

    # What a subclass says ---------------------------------------------------------------------------

    @abstractmethod
    def direction(self, group: Mapping[str, Any], step: int) -> Direction:
        """The rule's coefficients at step t = 1, 2, …"""

    @abstractmethod
    def beta_of(self, group: Mapping[str, Any]) -> float:
        """β of the momentum itself, which is the rule's first moment."""

    def angle(self, group: Mapping[str, Any], lr: float) -> float:
        """θ at a rate, from the group's decay; asked only of rules that rotate."""
        raise AssertionError(f"{type(self).__name__} rotates nothing")

    # Groups ---------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises ConfigError (see the class)."""
        group = dict(param_group)
        given = group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        group["params"] = given
        refuse_unknown(type(self).__name__, group, self.defaults)
        known = [parameter for one in self.param_groups for parameter in one["params"]]
        refuse_parameters(known, [entry[1] if isinstance(entry, tuple) else entry for entry in given])
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            check_group(added)
            for parameter in added["params"]:
                if self.rotates(added, parameter) and not parameter.is_meta:
                    row_norms(parameter, added["per_neuron"], self.name(parameter))
                    if added["zero_mean"]:
                        centre(parameter, added["per_neuron"], self.name(parameter), write=False)
        except ConfigError:
            self.param_groups.pop()
            raise
        if self._built:
            self._centre(added)

    def _centre(self, group: Mapping[str, Any]) -> None:
        for parameter in group["params"]:
            if self.rotates(group, parameter) and group["zero_mean"] and not parameter.is_meta:
                centre(parameter, group["per_neuron"], self.name(parameter))

    def name(self, parameter: Tensor) -> str:
        """The parameter's name where named parameters were given, else its place."""
        for number, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is parameter:
                    names = group.get("param_names")
                    return names[position] if names else f"parameter {position} of group {number}"
        return "a parameter"

    def rotates(self, group: Mapping[str, Any], parameter: Tensor) -> bool:
        """Whether the parameter rotates: by the group's `rotational`, or where it is None if λ ≠ 0 and it is a matrix.

        Raises:
            ConfigError: a rotation is asked for that does not exist.
        """
        asked = group.get("rotational", False)
        if asked is None:
            return group["weight_decay"] != 0 and parameter.dim() > 1 and parameter.requires_grad
        if asked and parameter.dim() < 2 and group["per_neuron"]:
            raise ConfigError(
                f"{self.name(parameter)} has shape {list(parameter.shape)}, and its group is rotational per neuron, where every "
                "row would be one number, which has no direction; put it into a group with rotational=False, or set "
                "per_neuron=False."
            )
        return bool(asked)

    def angles(self) -> list[float | None]:
        """The present target angle of every group, in radians per step; None where nothing rotates."""
        return [
            self._theta(group) if any(self.rotates(group, value) for value in group["params"]) else None
            for group in self.param_groups
        ]

    def _theta(self, group: Mapping[str, Any]) -> float:
        lr = float(group["lr"])
        if group["angle_schedule"] == "linear":
            peak = float(group["peak_lr"])
            return self.angle(group, peak) * lr / peak
        return self.angle(group, lr)

    # Steps ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss.

        Raises:
            ConfigError: a gradient is sparse, or a row that is to rotate is zero. Nothing has been updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        jobs = [job for group in self.param_groups for job in self._jobs(group)]
        for group, step, turn, parameters in jobs:
            self._update(group, step, turn, parameters)
        return loss

    def _jobs(self, group: dict[str, Any]) -> Iterable[tuple[dict[str, Any], int, int, list[nn.Parameter]]]:
        """Parameters of a group that are updated alike: by the number of the step and of the rotation (0: none; or STILL)."""
        found: dict[tuple[int, int], list[nn.Parameter]] = {}
        moves = "angle_schedule" in group and self._theta(group) > 0
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            turning = self.rotates(group, parameter)
            self._start(group, parameter, turning)
            state = self.state[parameter]
            key = state["step"] + 1, (state["turns"] + 1 if moves else STILL) if turning else 0
            found.setdefault(key, []).append(parameter)
        return [(group, *key, values) for key, values in found.items()]

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    raise ConfigError(
                        f"{self.name(parameter)} has a sparse gradient, and {type(self).__name__} takes dense ones only; make "
                        "its embedding with sparse=False, or give it an optimizer of its own."
                    )

    def _start(self, group: Mapping[str, Any], parameter: nn.Parameter, turning: bool) -> None:
        """State of a parameter that has none yet; N is the norm at its first rotation, or after the parameter has grown."""
        state, fine = self.state[parameter], state_dtype(parameter)
        known = state["row_norm"].shape if "row_norm" in state else None
        if turning and known != norm_shape(parameter, group["per_neuron"]):
            norm = row_norms(parameter, group["per_neuron"], self.name(parameter))
            if (
                known is None and group["zero_mean"]
            ):  # it was frozen at construction, or loaded since; else nothing changes
                centre(parameter, group["per_neuron"], self.name(parameter))
            state["row_norm"], state["row_square"] = norm, torch.zeros_like(norm)
            state["turns"] = 0
        if "step" not in state:
            state["step"] = 0
            for key in self.moments:
                state[key] = torch.zeros(parameter.shape, dtype=fine, device=parameter.device)

    def _update(self, group: Mapping[str, Any], step: int, turn: int, parameters: list[nn.Parameter]) -> None:
        turning = turn > 0
        rule, how = self.direction(group, step), self._how(group, step, turn)
        if isinstance(how, Turn):
            self._warn_if_coarse(how.theta, parameters)
        pieces, staged = [], []
        for parameter in parameters:
            shape = row_shape(parameter, not turning or group["per_neuron"])
            fine = state_dtype(parameter)
            weight = parameter.detach()
            if weight.dtype != fine or not weight.is_contiguous():
                weight = weight.to(fine).contiguous()
                staged.append((parameter, weight))
            pieces.append(self._piece(group, parameter, weight, shape, turning))
            self.state[parameter]["step"] = step
            if turning:
                self.state[parameter]["turns"] = turn
        update(pieces, rule, how, self.fused)
        for parameter, weight in staged:
            parameter.copy_(weight)

    def _how(self, group: Mapping[str, Any], step: int, turn: int) -> Plain | Turn:
        if turn == STILL:
            return Plain(0.0, 0.0)
        factor = update_factor(group.get("bias_correction", "none"), self.beta_of(group), step)
        if turn:
            average, theta = group["update_norm_decay"], self._theta(group) * factor
            return Turn(theta, average, correction_of(average, turn), group["eps_norm"], group["zero_mean"])
        lr, decay = float(group["lr"]), group["weight_decay"]
        if not self.rest_decays and group.get("rotational") is not False:
            decay = 0.0
        if self.sums:
            return Plain(lr * factor, 0.0, decay)
        return Plain(lr * factor, lr * decay)

    def _piece(
        self, group: Mapping[str, Any], parameter: nn.Parameter, weight: Tensor, shape: tuple[int, int], turning: bool
    ) -> Piece:
        state = self.state[parameter]
        rate = self.rates.get(parameter, 1.0)
        if turning and group["angle_schedule"] == "sqrt":
            rate **= 0.5
        second = state[self.moments[1]].view(shape) if len(self.moments) > 1 else None
        norm, square = (state[key].view(-1, 1) if turning else None for key in ("row_norm", "row_square"))
        gradient = parameter.grad
        assert gradient is not None
        gradient = gradient.to(weight.dtype).reshape(shape).contiguous()
        return Piece(weight.view(shape), gradient, state[self.moments[0]].view(shape), second, norm, square, rate)

    def _warn_if_coarse(self, theta: float, parameters: list[nn.Parameter]) -> None:
        coarse = [value for value in parameters if value.dtype.itemsize < 4]
        if coarse and theta < COARSE and not self._warned:
            self._warned = True
            warnings.warn(
                f"a step turns {self.name(coarse[0])} by {theta:.2g} rad, and its type {coarse[0].dtype} resolves about 4e-3: "
                "most of the update is lost in rounding. Keep the weights in fp32 (autocast does), or raise the rate.",
                stacklevel=2,
            )

    # State ----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For copies: torch's own entries, and what tells the rule."""
        own = ("fused", "_warned", "_built", "inner", "moments", "sums")
        kept = {name: vars(self)[name] for name in own if name in vars(self)}
        return {**super().__getstate__(), **kept, "rates": {}}  # a limiter's hooks stay with the original

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, with tensors in the type they were stored in; weights are not touched.

        Raises:
            ConfigError: the state is that of another kind of optimizer.
        """
        check_state(type(self).__name__, state_dict, self.moments, self.defaults)
        defaults = dict(self.defaults)
        super().load_state_dict(dict(state_dict))
        self.defaults = defaults  # torch adds `differentiable`, which no group of ours has
        stored = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(stored, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    kept = value.to(parameter.device, copy=True).contiguous()
                    self.state[parameter][key] = kept
