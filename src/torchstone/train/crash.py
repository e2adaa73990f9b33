"""What a run leaves when its loss or gradient is not finite: a small bundle to find the cause with.

`crash/step-N.json` holds the step, the documents of its batch, the seed, the last metrics and the norms of every
parameter and its gradient. The update has not happened: the weights are those of the step before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchstone.storage.atomic import atomic_write


def write_bundle(
    directory: Path, step: int, what: str, model: nn.Module, documents: Sequence[Any], context: Mapping[str, Any]
) -> Path:
    """Write the bundle and return its path. Numbers that are not finite are written as text."""
    norms = {
        name: {
            "norm": _plain(float(parameter.detach().float().norm())),
            "gradient": None if parameter.grad is None else _plain(float(parameter.grad.float().norm())),
        }
        for name, parameter in model.named_parameters()
    }
    bundle = {"step": step, "what": what, **context, "parameters": norms, "documents": documents}
    path = directory / "crash" / f"step-{step:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(bundle, indent=1, allow_nan=False, default=str) + "\n")
    return path


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
