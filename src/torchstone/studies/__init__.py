"""The studies, one file per method: `torchstone.studies["osca"].run(scale="toy")`.

This module behaves like a mapping from slug to study; a study is made when it is asked for, so that listing is free.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchstone.lab.runnable import Runnable


class _Studies(ModuleType):
    """A module that is also a read-only mapping."""

    def __getitem__(self, slug: str) -> Runnable:
        from torchstone.lab.catalogue import study
        from torchstone.lab.runnable import Runnable

        return Runnable(study(slug))

    def __iter__(self) -> Iterator[str]:
        from torchstone.lab.catalogue import slugs

        return iter(slugs())

    def __len__(self) -> int:
        return sum(1 for _ in self)


sys.modules[__name__].__class__ = _Studies
