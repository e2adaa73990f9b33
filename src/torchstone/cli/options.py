"""Options that `compare` and `study run` share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torchstone.errors import ConfigError

MOST_SEEDS = 12

UntilDecided = Annotated[bool, typer.Option("--until-decided", help="Add seeds under a group-sequential rule.")]
MaxSeeds = Annotated[int | None, typer.Option(help=f"Most seeds that --until-decided may use; default {MOST_SEEDS}.")]
On = Annotated[str, typer.Option(help="Where cells run: local, inline, ray or ray://HOST:PORT.")]
Jobs = Annotated[int | None, typer.Option(help="Cells at a time; default: chosen from cores and model size.")]
Out = Annotated[
    Path | None, typer.Option(help="Directory; the same one continues. Default: runs/NAME-SCALE-FINGERPRINT.")
]


def most_seeds(until_decided: bool, max_seeds: int | None) -> int | None:
    """The largest number of seeds of a sequential design, None for a fixed one; raises ConfigError."""
    if not until_decided and max_seeds is not None:
        raise ConfigError("--max-seeds is for --until-decided, which is not given; add it, or use --seeds.")
    return (MOST_SEEDS if max_seeds is None else max_seeds) if until_decided else None
