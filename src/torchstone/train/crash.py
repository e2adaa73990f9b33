"""What a run leaves when its loss or gradient is not finite: a small bundle to find the cause with.

`crash/step-N.json` holds the step, the documents of its batch, the seed, the last metrics and the norms of every
parameter and its gradient. The update has not happened: the weights are those after step N.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchstone.data.source import DocumentSpan
from torchstone.storage.atomic import atomic_write


def write_bundle(
    path: Path, step: int, model: nn.Module, documents: Sequence[Sequence[DocumentSpan]], context: Mapping[str, Any]
) -> None:
    """Write the bundle. Numbers that are not finite are written as text ("nan", "inf").

    Args:
        path: the file.
        step: updates done.
        model: its parameters and their gradients are summarised.
        documents: of each row of the batch.
        context: anything else that is plain data.
    """
    norms = {
        name: {"norm": _norm(parameter), "gradient": None if parameter.grad is None else _norm(parameter.grad)}
        for name, parameter in model.named_parameters()
    }
    spans = [[asdict(span) for span in row] for row in documents]
    bundle = {"step": step, **context, "parameters": norms, "documents": spans}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(bundle, indent=1, allow_nan=False) + "\n")


def _norm(value: Tensor) -> float | str:
    norm = float(value.detach().float().norm())
    return norm if math.isfinite(norm) else str(norm)
