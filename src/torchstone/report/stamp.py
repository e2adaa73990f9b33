"""What every finding says of its making: the command, the time, the machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from torchstone.report.finding import Finding


def stamped(finding: Finding, words: Sequence[str], environment: Mapping[str, str]) -> Finding:
    """The finding with the command that makes it again, the time now, and the machine and versions."""
    made = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(words),
        "environment": dict(environment),
    }
    return finding.model_copy(update=made)
