"""What the configurations of dense feed-forward layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torchstone.recipe.part import Part


class DenseFeedForwardConfig(Part):
    """Base of dense feed-forward layers; `size_field` is the setting that a match of sizes changes."""

    family: ClassVar[str] = "feedforward"
    size_field: ClassVar[str] = "hidden"

    @classmethod
    def inherit(cls, previous: Mapping[str, Any]) -> dict[str, Any]:
        """Experts' hidden width is that of one expert, and their bias is another one: neither is kept."""
        own = {"hidden", "bias"} if previous.get("kind") == "smoe" else set()
        return {key: value for key, value in super().inherit(previous).items() if key not in own}
