"""Training. `torchstone.train(recipe, directory)` trains a recipe; this package holds what it is made of.

The package can be called, because its name is the verb that users want; see `torchstone.train.run.train`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchstone.train.run import RunSummary


class _Train(ModuleType):
    """A module that is also the function `train`."""

    def __call__(self, *arguments: Any, **options: Any) -> RunSummary:
        from torchstone.train.run import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Train
