"""Inputs and output gradients of a model's linear layers, by example, from one backward pass.

For every wanted matrix W the capture yields X (what the layer was given) and Δ (the gradient of the loss with respect to what
it gave), the two factors of the weight gradient Δᵀ X. Weight gradients are never made: the gradient is asked for at the
output of the token embedding only, so that autograd skips everything that leads to weights alone. Frozen models, adapters
and half-precision weights therefore work as they are. Each matrix is handed on as soon as its Δ arrives and then dropped.

How X and Δ are found:
  modules      a forward hook, for layers that run as modules (fused layers serve several matrices by rows)
  joint product  torchstone multiplies several weights at once, put side by side and perhaps with rows rearranged; a function
               mode moves row numbers along with the weights, and so knows which column of the product is which row

Shapes: b examples · t tokens · i inputs · o outputs.

Pitfall: splitting by example needs layers that see [b, t, …] or [b·t, …]; experts of a mixture see chosen tokens only and are
refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from torchstone.diagnose.gradients.spectra import Factors
from torchstone.diagnose.subject import Subject, require_attention
from torchstone.errors import ConfigError

ATTENTION = ("q", "k", "v", "o")
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.(.+)$")  # the first number in a module's path is its layer
_MOVES = frozenset({
    torch.cat, Tensor.unflatten, Tensor.transpose, Tensor.flatten, Tensor.reshape, Tensor.view, Tensor.permute,
    Tensor.__getitem__, Tensor.index_select, torch.index_select, Tensor.contiguous, Tensor.split, torch.split,
    Tensor.chunk, torch.chunk, Tensor.unbind, torch.unbind,
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix of one layer.

    Attributes:
        layer: number of the block.
        name: `q`, `k`, `v`, `o`, or the module's path inside the block.
        path: name for people and for patterns; fused layers add the part in brackets.
        module: the layer that it belongs to.
        rows: output features of the module that are this matrix's; None for all.
        transposed: the weight is stored [in, out].
    """

    layer: int
    name: str
    path: str
    module: nn.Module
    rows: Tensor | None = None
    transposed: bool = False


def select_matrices(subject: Subject, modules: str = "attention") -> tuple[Matrix, ...]:
    """The matrices that are asked for, by layer.

    Args:
        modules: `attention` (q, k, v and o), `all` (every linear layer inside the blocks), or a regular expression that is
            searched in the paths of all of them.

    Raises:
        ConfigError: the pattern is no regular expression or matches nothing; the message lists candidates.
    """
    attention, refusals = _attention_matrices(subject)
    if modules == "attention":
        if not attention:
            reason = f": {refusals[0]}" if refusals else "."
            raise ConfigError(
                f"{subject.name} has no attention projections to read (try modules='all' or a pattern){reason}"
            )
        return attention
    everything = (*attention, *_other_matrices(subject, {id(matrix.module) for matrix in attention}))
    everything = tuple(sorted(everything, key=lambda matrix: matrix.layer))
    if modules == "all":
        return everything
    try:
        pattern = re.compile(modules)
    except re.error as error:
        raise ConfigError(
            f"modules={modules!r} is neither 'attention' nor 'all' and no regular expression: {error}."
        ) from error
    chosen = tuple(matrix for matrix in everything if pattern.search(matrix.path))
    if not chosen:
        paths = [matrix.path for matrix in everything]
        near = get_close_matches(modules, paths, n=3, cutoff=0.3)
        shown = list(dict.fromkeys([*near, *paths]))[:12]
        raise ConfigError(
            f"modules={modules!r} matches none of the {len(paths)} matrices of {subject.name}; candidates are "
            f"{', '.join(shown)}{', …' if len(paths) > len(shown) else ''}. Give 'attention', 'all' or a regular expression."
        )
    return chosen


def _attention_matrices(subject: Subject) -> tuple[tuple[Matrix, ...], list[ConfigError]]:
    """The projections of all attention layers, and why others have none (shared keys, latent attention)."""
    require_attention(subject)
    found, refusals = [], []
    for layer in subject.layers:
        for which in ATTENTION:
            try:
                projection = layer.projection(which)  # type: ignore[arg-type]
            except ConfigError as refusal:
                refusals.append(refusal)
                continue
            path = projection.parameter.removesuffix(".weight")
            number = _NUMBER.search(path)
            found.append(
                Matrix(
                    int(number[1]) if number else layer.index,
                    which,
                    path if projection.rows is None else f"{path}[{which}]",
                    projection.module,
                    projection.rows,
                    projection.transposed,
                )
            )
    return tuple(found), refusals


def _other_matrices(subject: Subject, taken: set[int]) -> list[Matrix]:
    """Linear layers inside the blocks that are no attention projection."""
    found = []
    for path, module in subject.model.named_modules():
        number = _NUMBER.search(path)
        conv = type(module).__name__ == "Conv1D"
        if number and id(module) not in taken and (isinstance(module, nn.Linear) or conv):
            found.append(Matrix(int(number[1]), number[2], path, module, transposed=conv))
    return found


Sink = Callable[[int, Factors], None]


class Capture:
    """Collects the factors of all matrices during one forward and backward pass; a context manager around the forward pass.

    Args:
        subject: the model.
        matrices: what is wanted.
        shape: examples and tokens of the batch.
        sink: called as `sink(index of the matrix, factors)`, once for each matrix that gets a gradient.
    """

    def __init__(self, subject: Subject, matrices: Sequence[Matrix], shape: tuple[int, int], sink: Sink) -> None:
        self.subject, self.matrices, self.shape, self.sink = subject, matrices, shape, sink
        self.source: Tensor | None = None
        self._calls: dict[int, int] = defaultdict(int)
        self._arrived: dict[int, list[Factors]] = defaultdict(list)
        self._stack = ExitStack()

    def __enter__(self) -> Capture:
        modules: dict[int, list[int]] = defaultdict(list)
        for index, matrix in enumerate(self.matrices):
            modules[id(matrix.module)].append(index)
        hooks = [self.subject.embedding().register_forward_hook(self._embedded)]
        for indices in modules.values():
            module = self.matrices[indices[0]].module
            hooks.append(module.register_forward_hook(partial(self._ran, indices)))
        for hook in hooks:
            self._stack.callback(hook.remove)
        self._stack.enter_context(_JointProducts(self._tracked(), self._multiplied))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a scalar and hand on every matrix's factors.

        Raises:
            ConfigError: a wanted matrix took no part in the forward pass.
        """
        missing = [matrix.path for index, matrix in enumerate(self.matrices) if index not in self._calls]
        if missing or self.source is None:
            raise ConfigError(
                f"{', '.join(missing[:4]) or 'the token embedding'} of {self.subject.name} took no part in its forward pass as a "
                "module or in a joint product, so that there is nothing to read; choose other modules."
            )
        torch.autograd.grad(loss, self.source)
        for index in list(self._arrived):  # calls whose output reached no loss add nothing
            self._hand_on(index)

    def _embedded(self, module: nn.Module, given: Any, output: Tensor) -> Tensor:
        """Start the graph at the embedding's output, whatever is frozen."""
        self.source = output.detach().requires_grad_()
        return self.source

    def _ran(self, indices: Sequence[int], module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        for index in indices:
            self._record(index, given[0], output, self.matrices[index].rows)

    def _tracked(self) -> list[tuple[Tensor, int]]:
        """Weights that may take part in a joint product, with the index of their matrix; fused ones never do."""
        pairs = [(getattr(matrix.module, "weight", None), index) for index, matrix in enumerate(self.matrices)]
        return [(w, i) for w, i in pairs if isinstance(w, Tensor) and w.dim() == 2 and self.matrices[i].rows is None]

    def _multiplied(self, index: int, x: Tensor, output: Tensor, columns: Tensor) -> None:
        self._record(index, x, output, columns)

    def _record(self, index: int, x: Tensor, output: Tensor, columns: Tensor | None) -> None:
        self._calls[index] += 1
        columns = None if columns is None else columns.to(output.device)
        output.register_hook(partial(self._received, index, x.detach(), columns))

    def _received(self, index: int, x: Tensor, columns: Tensor | None, gradient: Tensor) -> None:
        delta = gradient if columns is None else gradient[..., columns]
        self._arrived[index].append(Factors(self._by_example(index, x), self._by_example(index, delta)))
        if len(self._arrived[index]) == self._calls[index]:
            self._hand_on(index)

    def _hand_on(self, index: int) -> None:
        """Give a matrix's factors away; several calls of one layer are one longer sequence."""
        parts = self._arrived.pop(index)
        x, delta = torch.cat([part.x_bti for part in parts], 1), torch.cat([part.delta_bto for part in parts], 1)
        self.sink(index, Factors(x, delta))

    def _by_example(self, index: int, x: Tensor) -> Tensor:
        b, t = self.shape
        if x.dim() == 3 and x.shape[:2] == (b, t):
            return x
        if x.dim() == 2 and x.shape[0] == b * t:
            return x.unflatten(0, (b, t))
        raise ConfigError(
            f"{self.matrices[index].path} was given a tensor {list(x.shape)} for {b} examples of {t} tokens, which does not "
            "divide by example (as in a mixture of experts); leave it out with a pattern for modules."
        )


class _JointProducts(TorchFunctionMode):
    """Sees products with weights that were put together from others, and tells which column belongs to which row.

    Every tracked weight has a companion of its shape that holds row numbers, counted over all tracked weights. What moves
    the rows of a weight (`_MOVES`) moves the companion's alike.
    """

    def __init__(self, weights: Sequence[tuple[Tensor, int]], found: Callable[[int, Tensor, Tensor, Tensor], None]):
        super().__init__()
        self._found = found
        self._companions: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []  # an id is a name only as long as its tensor lives
        self._whole = {id(weight) for weight, _ in weights}
        self._spans: list[tuple[int, int, int]] = []
        start = 0
        for weight, index in weights:
            rows = torch.arange(start, start + weight.shape[0], dtype=torch.int32, device=weight.device)
            self._companions[id(weight)] = rows[:, None].expand(weight.shape)
            self._spans.append((start, weight.shape[0], index))
            start += weight.shape[0]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _MOVES:
            self._move(func, args, kwargs, out)
        elif func is F.linear and len(args) > 1 and id(args[1]) in self._companions and id(args[1]) not in self._whole:
            self._announce(args[0], out, self._companions[id(args[1])][:, 0].long())
        return out

    def _move(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Give the result of a move the companion that the same move makes of its arguments' companions."""
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        results = [out] if isinstance(out, Tensor) else list(out)
        if not any(id(x) in self._companions for x in tensors) or any(y is x for y in results for x in tensors):
            return

        def companion(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x  # an index
            known = self._companions.get(id(x))
            return torch.full(x.shape, -1, dtype=torch.int32, device=x.device) if known is None else known

        moved_args, moved_kwargs = tree_map(companion, (args, kwargs))
        moved = func(*moved_args, **moved_kwargs)
        for result, companions in zip(results, [moved] if isinstance(moved, Tensor) else moved, strict=True):
            self._companions[id(result)] = companions
            self._alive.append(result)

    def _announce(self, x: Tensor, out: Tensor, rows_o: Tensor) -> None:
        for start, count, index in self._spans:
            inside = (rows_o >= start) & (rows_o < start + count)
            if int(inside.sum()) == count:
                columns = inside.nonzero()[:, 0]
                self._found(index, x, out, columns[rows_o[columns].argsort()])
