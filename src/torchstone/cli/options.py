"""Options that `compare` and `study run` share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MOST_SEEDS = 12

UntilDecided = Annotated[bool, typer.Option("--until-decided", help="Add seeds under a group-sequential rule.")]
MaxSeeds = Annotated[int, typer.Option(help="Most seeds that --until-decided may use.")]
On = Annotated[str, typer.Option(help="Where cells run: local, inline, ray or ray://HOST:PORT.")]
Jobs = Annotated[int | None, typer.Option(help="Cells at a time; default: chosen from cores and model size.")]
Out = Annotated[
    Path | None, typer.Option(help="Directory; the same one continues. Default: runs/NAME-SCALE-FINGERPRINT.")
]
