"""`torchstone generate` and `infill` on runs whose model has ids beyond those of the text: drawn, they print nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_recipe

from torchstone.cli.generate import generate
from torchstone.cli.infill import infill
from torchstone.models.belief_generate import _Towards
from torchstone.models.decoder import Decoder
from torchstone.train.run import train

FIM = 257


@pytest.fixture
def rearranged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The data section of rearranged bytes of a small text."""
    monkeypatch.setenv("TORCHSTONE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the {number} cats sat.\n" for number in range(400)))
    text = {"kind": "text", "corpus": {"kind": "files", "paths": str(path)}, "tokenizer": "bytes", "length": 32}
    return {"kind": "fill-in-the-middle", "text": text, "piece": 20, "goal_min": 2, "goal_max": 6}


def favour(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Makes <fim> the most likely token at every place."""
    original = getattr(owner, name)

    def logits(self: Any, features: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = original(self, features)
        assert found.shape[-1] == FIM + 1
        return found.index_fill(-1, torch.tensor([FIM]), 100.0)

    monkeypatch.setattr(owner, name, logits)


def test_a_drawn_fim_token_prints_nothing(
    rearranged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"kind": "fill-in-the-middle", "fim_token": FIM, "end_token": 256}
    train(tiny_recipe(data=rearranged, objective=objective), tmp_path / "run", progress=lambda state: None)
    favour(monkeypatch, Decoder, "logits")
    generate(tmp_path / "run", prompt=["the", "sat"], max_new=5, greedy=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["completion"], line["tokens"], line["finish_reason"]) for line in lines] == [("", 5, "length")] * 2


@pytest.mark.parametrize("backward", [False, True])
def test_a_drawn_fim_token_fills_a_gap_with_nothing(
    rearranged: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    backward: bool,
) -> None:
    model = {"kind": "belief-state", "width": 16, "depth": 1, "head_dim": 8, "end_token": 256}
    given = tiny_recipe(model=model, data={**rearranged, "order": "as-written"}, objective={"kind": "belief-state"})
    train(given, tmp_path / "run", progress=lambda state: None)
    favour(monkeypatch, _Towards, "logits")
    infill(tmp_path / "run", prefix="the", goal="sat", backward=backward, max_new=5, greedy=True)
    assert capsys.readouterr().out == "\n"
