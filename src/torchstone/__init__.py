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
    "UpdateMeter": "torchstone.diagnose.updates",
    "allocate": "torchstone.llm.allocation",
    "branch_run": "torchstone.train.branch",
    "compare": "torchstone.lab.compare",
    "generate": "torchstone.models.generate",
    "learning_rates": "torchstone.lab.rates.find",
    "load_recipe": "torchstone.recipe.load",
    "load_run": "torchstone.train.run",
    "methods": "torchstone.methods",
    "register": "torchstone.recipe.registry",
    "suggest_warmup": "torchstone.diagnose.updates",
    "studies": "torchstone.studies",
    "train": "torchstone.train",
}

# Public names that are modules themselves: a table, and mappings or functions with a module behind them.
_MODULES = {"methods", "studies", "train"}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from torchstone.diagnose.updates import UpdateMeter as UpdateMeter
    from torchstone.diagnose.updates import suggest_warmup as suggest_warmup
    from torchstone.lab.compare import compare as compare
    from torchstone.lab.rates.find import learning_rates as learning_rates
    from torchstone.llm.allocation import allocate as allocate
    from torchstone.models.generate import generate as generate
    from torchstone.recipe.load import load_recipe as load_recipe
    from torchstone.recipe.registry import register as register
    from torchstone.recipe.schema import Recipe as Recipe
    from torchstone.train.branch import branch_run as branch_run
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
