"""Shared by all tests: one thread per process, and where data and reference vectors of others are found."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
settings.register_profile("torchstone", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("torchstone")


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The project's folder."""
    return ROOT


def _outside(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or ROOT / default).resolve()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """$TORCHSTONE_DATA, or ../shared/data; skips where the folder is absent."""
    folder = _outside("TORCHSTONE_DATA", "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"published data of others is not at {folder}; set TORCHSTONE_DATA")
    return folder


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    """$TORCHSTONE_REFERENCE, or ../shared/reference; skips where the folder is absent."""
    folder = _outside("TORCHSTONE_REFERENCE", "../shared/reference")
    if not folder.is_dir():
        pytest.skip(f"reference vectors are not at {folder}; set TORCHSTONE_REFERENCE")
    return folder
