"""The builders of `results.py` as a fixture (test folders are not packages)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def results() -> ModuleType:
    """Builders of realistic, extreme and hostile results."""
    spec = importlib.util.spec_from_file_location("report_results", Path(__file__).with_name("results.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
