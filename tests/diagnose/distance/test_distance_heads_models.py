"""Distance heads of whole models: Hugging Face families and our own, attention computed again or read, and the finding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import byte_subject, texts
from torch import Tensor

from torchstone.diagnose.distance.heads import DistanceSettings, distance_heads
from torchstone.diagnose.distance.positional_heads import positional_heads_finding
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.report.finding import Finding

Subjects = Callable[[str], Subject]


@pytest.fixture(scope="module")
def rows_bt() -> Tensor:
    return torch.randint(3, 48, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["Llama", "Llama-3", "Mistral", "Qwen3", "GPTNeoX", "Phi", "Cohere"])
def test_recomputed_attention_scores_like_the_models_own(
    family: str, family_subject: Subjects, rows_bt: Tensor
) -> None:
    subject = family_subject(family)
    again, own = (
        distance_heads(subject, rows_bt, DistanceSettings(keys=None, maps=maps)) for maps in ("recompute", "model")
    )
    assert again.heads() == [(layer, head) for layer in (0, 1) for head in range(4)] and again.skipped == ()
    for name in ("shift", "far", "mean_distance", "share_beyond", "z"):
        torch.testing.assert_close(again.column(name), own.column(name), rtol=1e-3, atol=1e-3, equal_nan=True)
    assert float(again.column("shift").abs().max()) < 0.6  # random weights


def test_layers_that_do_not_turn_are_skipped_and_named(family_subject: Subjects, rows_bt: Tensor) -> None:
    subject = family_subject("SmolLM3")
    table = distance_heads(subject, rows_bt)
    turning = [layer.index for layer in subject.layers if layer.rotation is not None]
    assert [scored.layer for scored in table.layers] == turning and len(turning) == 1
    assert set(table.skipped) == {0, 1} - set(turning)


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
def test_models_without_rotary_positions_are_refused(family: str, family_subject: Subjects, rows_bt: Tensor) -> None:
    with pytest.raises(ConfigError, match="no rotary positions"):
        distance_heads(family_subject(family), rows_bt)


def test_attention_sinks_of_a_model_need_its_own_maps(family_subject: Subjects, rows_bt: Tensor) -> None:
    subject = family_subject("GptOss")
    with pytest.raises(ConfigError, match="maps='model'"):
        distance_heads(subject, rows_bt)
    assert len(distance_heads(subject, rows_bt, DistanceSettings(maps="model")).heads()) == 8


def test_sequences_add_up(family_subject: Subjects, rows_bt: Tensor) -> None:
    subject = family_subject("Llama")
    both, first, second = (distance_heads(subject, rows) for rows in (rows_bt, rows_bt[:1], rows_bt[1:]))
    assert (both.sequences, both.length) == (2, 48)
    mean_h, one_h, two_h = (table.column("mean_distance") for table in (both, first, second))
    assert bool(((mean_h - one_h) * (mean_h - two_h) <= 1e-9).all())


def numbers(finding: Finding, title: str) -> list[list[object]]:
    return [list(row) for row in next(table for table in finding.tables if table.title == title).rows]


def test_the_finding_stands_beside_its_controls() -> None:
    subject = byte_subject(seed=3)
    finding = positional_heads_finding(subject, texts(length=80), max_length=64, sequences=4, top=0.25, ablate="mean")
    heads = numbers(finding, "heads")
    assert len(heads) == sum(layer.heads for layer in subject.layers)
    assert all(isinstance(row[-1], float) and isinstance(row[3], float) for row in heads)  # untrained, z
    assert "untrained" in finding.answer and "reassignments" in finding.control
    ablation = numbers(finding, "ablation")
    assert [row[0] for row in ablation] == ["first quarter", "last quarter"]
    assert all(math.isfinite(float(str(value))) for row in ablation for value in row[1:])
    assert finding.heatmaps[0].diverging and len(finding.heatmaps[0].values) == len(subject.layers)
    assert {line.name for line in finding.figures[0].lines} >= {"all heads", "all heads, untrained"}
    assert Finding.model_validate_json(finding.model_dump_json()) == finding


def test_random_pairs_give_a_finding_too() -> None:
    finding = positional_heads_finding(byte_subject(), texts(length=80), max_length=64, sequences=2, pairs="random")
    assert any("drawn evenly" in note for note in finding.notes)


def test_a_finding_refuses_what_it_cannot_honour() -> None:
    subject = byte_subject()
    with pytest.raises(ConfigError, match="at least 200"):
        positional_heads_finding(subject, texts(), null=50)
    with pytest.raises(ConfigError, match="window is for ablate='window'"):
        positional_heads_finding(subject, texts(), max_length=64, ablate="mean", window=4)
    with pytest.raises(DataError, match="text too short"):
        positional_heads_finding(subject, texts(length=30), max_length=64)
    with pytest.raises(DataError, match="rows have 6 tokens"):
        positional_heads_finding(subject, texts(), max_length=6)
    with pytest.raises(ConfigError, match="allowed: attended, random"):
        positional_heads_finding(subject, texts(), max_length=64, pairs="all")  # type: ignore[arg-type]


def test_rows_have_the_length_of_training_at_most_and_a_note_beyond() -> None:
    subject = byte_subject()  # trained on 32 tokens, reads more
    finding = positional_heads_finding(subject, texts(length=80), sequences=2)
    assert finding.notes[0].startswith("2 rows of 32 tokens") and not any("Rows are longer" in n for n in finding.notes)
    beyond = positional_heads_finding(subject, texts(length=80), sequences=2, max_length=64)
    assert "Rows are longer than the 32 tokens that the model was trained on." in beyond.notes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 0.0}, "top is 0; give a share of the heads above 0 and at most 1"),
        ({"top": 1.5}, "top is 1.5"),
        ({"ablate": "window"}, "ablation mode 'window' needs `window`"),
        ({"ablate": "window", "window": 0}, "window was given as 0"),
        ({"ablate": "half"}, "ablation mode 'half' does not exist"),
        ({"window": 4}, "a window is for ablate='window'"),
    ],
)
def test_settings_are_checked_before_a_text_is_read(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, read = byte_subject(), []
    monkeypatch.setattr(subject, "encode", read.append)
    with pytest.raises(ConfigError, match=message):
        positional_heads_finding(subject, texts(), **settings)
    assert read == []


def test_heads_without_a_shift_are_left_out_and_counted() -> None:
    subject = byte_subject(width=32)  # 4 heads in each of 2 layers
    mixer: Any = subject.model.get_submodule("blocks.0.mixer")
    with torch.no_grad():
        mixer.w_q.weight[:8] = 0  # queries of head 0
    finding = positional_heads_finding(subject, texts(length=80), sequences=2)
    heads = numbers(finding, "heads")
    assert heads[0][2] is None and all(isinstance(row[2], float) for row in heads[1:])
    assert any(note.startswith("Heads without a shift, left out: 1 ") for note in finding.notes)


def test_a_loss_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = byte_subject(width=32)
    own = subject.losses
    monkeypatch.setattr(subject, "losses", lambda rows_bt: own(rows_bt) + torch.nan)
    with pytest.raises(DataError, match="'early' is nan without any ablation"):
        positional_heads_finding(subject, texts(length=80), sequences=2, top=1.0, ablate="mean")
