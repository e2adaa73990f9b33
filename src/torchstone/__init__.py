"""torchstone puts language-model research ideas to the test.

Public names are imported on first use (PEP 562), so that `import torchstone` costs nothing: torch, numpy and scipy
load only when something needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchstone.version import __version__

_PUBLIC = {
    "Recipe": "torchstone.recipe.schema",
    "allocate": "torchstone.llm.allocation",
    "compare": "torchstone.lab.compare",
    "generate": "torchstone.models.generate",
    "load_recipe": "torchstone.recipe.load",
    "load_run": "torchstone.train.run",
    "methods": "torchstone.methods",
    "register": "torchstone.recipe.registry",
    "studies": "torchstone.studies",
    "train": "torchstone.train",
}

# Public names that are modules themselves: a table, and mappings or functions with a module behind them.
_MODULES = {"methods", "studies", "train"}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from torchstone.lab.compare import compare as compare
    from torchstone.llm.allocation import allocate as allocate
    from torchstone.models.generate import generate as generate
    from torchstone.recipe.load import load_recipe as load_recipe
    from torchstone.recipe.registry import register as register
    from torchstone.recipe.schema import Recipe as Recipe
    from torchstone.train.run import load_run as load_run


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'torchstone' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module = importlib.import_module(_PUBLIC[name])
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
