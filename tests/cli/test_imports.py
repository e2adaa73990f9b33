"""What light commands import: no torch, numpy or scipy, and no verb before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "scipy", "transformers", "datasets", "tokenizers", "pandas")
LIGHT_COMMANDS = (
    ["--help"],
    ["--version"],
    ["methods"],
    ["methods", "--json"],
    ["where", "osca"],
    ["compare", "--help"],
    ["study", "--help"],
    ["train", "--help"],
    ["recipe", "--help"],
    ["recipe", "kinds"],
    ["nonsense"],
)
LIGHT_MODULES = (
    "torchstone",
    "torchstone.errors",
    "torchstone.kinds",
    "torchstone.methods",
    "torchstone.cli",
    "torchstone.cli.main",
    "torchstone.recipe.arms",
    "torchstone.recipe.catalogue",
    "torchstone.recipe.diff",
    "torchstone.recipe.fingerprint",
    "torchstone.recipe.load",
    "torchstone.recipe.overrides",
    "torchstone.recipe.part",
    "torchstone.recipe.problems",
    "torchstone.recipe.registry",
    "torchstone.recipe.schema",
    "torchstone.recipe.structure",
    "torchstone.recipe.yaml",
)


def heavy_after(script: str) -> list[str]:
    """Which heavy modules a child Python has loaded after a script."""
    report = f"import sys; sys.stderr.write('@' + ','.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{script}\n{report}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [name for name in done.stderr.rpartition("@")[2].split(",") if name]


@pytest.mark.parametrize("words", LIGHT_COMMANDS, ids=" ".join)
def test_light_commands_import_nothing_heavy(words: list[str]) -> None:
    script = f"from torchstone.cli.main import main\ntry:\n    main({words!r})\nexcept SystemExit:\n    pass"
    assert heavy_after(script) == []


def test_light_modules_import_nothing_heavy() -> None:
    assert heavy_after("\n".join(f"import {name}" for name in LIGHT_MODULES)) == []


def test_help_imports_no_verb() -> None:
    script = (
        "import sys\nfrom torchstone.cli.main import VERBS, main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not [v for v in VERBS if f'torchstone.cli.{v}' in sys.modules]"
    )
    assert heavy_after(script) == []
