"""Subjects of tiny models, each saved to a folder and loaded from it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import tiny_model
from torch import Tensor

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.subject import Subject


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, without a tokenizer."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            tiny_model(family).save_pretrained(folders[family])
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def family_subject(family_folder: Callable[[str], Path]) -> Callable[[str], Subject]:
    """The subject of a family's folder."""
    subjects: dict[str, Subject] = {}

    def subject(family: str) -> Subject:
        if family not in subjects:
            subjects[family] = open_subject(family_folder(family))
        return subjects[family]

    return subject


@pytest.fixture(scope="session")
def tokens_bt() -> Tensor:
    """Two rows of 20 tokens of a vocabulary of 48."""
    return torch.randint(3, 48, (2, 20), generator=torch.Generator().manual_seed(0))
