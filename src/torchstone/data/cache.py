"""Where built data is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(given: Path | None = None) -> Path:
    """`given`, or $TORCHSTONE_CACHE, or ~/.cache/torchstone; it need not exist."""
    if given is not None:
        return Path(given)
    set_ = os.environ.get("TORCHSTONE_CACHE")
    return Path(set_) if set_ else Path.home() / ".cache" / "torchstone"
