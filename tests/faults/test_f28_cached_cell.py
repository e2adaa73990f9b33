"""F28: a cached cell of the same name but another fingerprint is refused, never mixed in (P12)."""

from __future__ import annotations

import json

import pytest
from coin import Coin, options

from torchstone.errors import StudyError
from torchstone.lab.progress import Quiet
from torchstone.lab.runner import run_study


@pytest.fixture
def coin(monkeypatch):
    study = Coin()
    monkeypatch.setattr("torchstone.lab.worker.from_reference", lambda reference: study)
    return study


def test_f28_a_cell_of_another_configuration_is_refused(coin, tmp_path):
    run_study(coin, options(tmp_path), Quiet())
    path = tmp_path / "cells" / "a" / "seed-0" / "cell.json"
    data = json.loads(path.read_text())
    data["fingerprint"] = "0" * 32
    path.write_text(json.dumps(data))
    with pytest.raises(StudyError, match="never mixed"):
        run_study(coin, options(tmp_path), Quiet())


def test_f28_another_plan_in_the_directory_is_refused_before_anything_runs(coin, tmp_path):
    run_study(coin, options(tmp_path), Quiet())
    coin.runs.clear()
    with pytest.raises(StudyError, match="holds another study"):
        run_study(coin, options(tmp_path, scale="noise"), Quiet())
    assert coin.runs == []
