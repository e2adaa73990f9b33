"""Expert load: planted routers are found, classes of tokens, counts against the routers' own, refusals, and the finding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import byte_subject, texts

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.expert_load import (
    CLASSES,
    _dead_table,
    _heatmaps,
    _router_table,
    expert_load_finding,
    information,
    parameters_of,
    router_loads,
    token_class,
)
from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import token_rows
from torchstone.errors import ConfigError
from torchstone.models.counts import count
from torchstone.nn.experts.load import RouterLoad, expert_load, routers_of
from torchstone.report.finding_write import write

BLOCK = {
    "mixer": {"kind": "moa", "num_experts": 4, "top_k": 2},
    "feedforward": {"kind": "smoe", "num_experts": 4, "hidden": 8},
}
MIXED = [f"def f{i}(x):\n    return x * {i} + {i + 1}  # twice, or more\n" * 4 for i in range(12)]


def subject(**model: Any) -> Subject:
    return byte_subject(block=BLOCK, **model)


def test_counts_are_those_of_the_routers() -> None:
    model = subject().model
    tokens_bt = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    classes_bt = tokens_bt % 3
    found = expert_load(model, [(tokens_bt[:1], classes_bt[:1]), (tokens_bt[1:], classes_bt[1:])], classes=3)
    whole = expert_load(model, [(tokens_bt, classes_bt)], classes=3)
    for load, at_once, (name, router) in zip(found, whole, routers_of(model).items(), strict=True):
        assert load.name == name and load.tokens == 64 and load.counts_ce.sum() == 128
        torch.testing.assert_close(load.counts_ce, at_once.counts_ce)
        assert router.statistics is not None
        torch.testing.assert_close(at_once.load().float(), router.statistics.load_e)
        assert at_once.mean_entropy() == pytest.approx(float(router.statistics.entropy), rel=1e-5)
        per_class = load.counts_ce.sum(1) / 2
        assert per_class.tolist() == [int((classes_bt == number).sum()) for number in range(3)]
        assert float((load.mean_gates() * load.counts_ce.sum(0)).sum()) == pytest.approx(64, rel=1e-5)
    assert not any(router._forward_hooks for router in routers_of(model).values())


def test_experts_that_get_no_token_are_found() -> None:
    planted = subject()
    with torch.no_grad():
        routers_of(planted.model)["blocks.0.feedforward"].weight.zero_()  # ties: experts 0 and 1, always
    tokens_nt = token_rows(planted, MIXED, 32, 8)
    load = next(load for load in router_loads(planted, tokens_nt) if load.name == "blocks.0.feedforward")
    assert load.dead() == [2, 3] and load.load().tolist() == [2.0, 2.0, 0.0, 0.0]
    assert load.mean_gates().tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0])
    assert load.mean_entropy() == pytest.approx(math.log(4), rel=1e-5)
    assert information(load) == pytest.approx(0.0, abs=1e-12)


def test_information_is_that_of_the_joint_distribution() -> None:
    def of(counts: list[list[float]]) -> float:
        return information(RouterLoad("blocks.0.mixer", torch.tensor(counts).double(), torch.zeros(2), 1))

    assert of([[5, 0], [0, 5]]) == pytest.approx(math.log(2))
    assert of([[2, 4], [3, 6]]) == pytest.approx(0.0, abs=1e-12)
    assert of([[0, 0], [3, 5]]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("the", "letters"), (" the", "letters"), ("é", "letters"), ("42", "digits"), (" \n", "whitespace"), ("", "other"),
     ("();", "punctuation"), ("_", "punctuation"), ("=", "punctuation"), ("x1", "other"), ("\ufffd", "other")],
)  # fmt: skip
def test_classes_of_tokens(text: str, kind: str) -> None:
    assert token_class(text) == kind


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no experts that this analysis knows; give a torchstone model with"):
        expert_load_finding(byte_subject(), texts())


def test_parameters_are_those_of_the_counts() -> None:
    model: Any = subject().model
    counts = count(model.config, ByteTokenizer.vocab_size, 32)
    assert parameters_of(subject()) == (counts.parameters, counts.active_parameters)


def test_the_finding_has_load_controls_classes_and_sizes(tmp_path: Path) -> None:
    planted = subject()
    with torch.no_grad():
        routers_of(planted.model)["blocks.1.mixer"].weight.zero_()
    finding = expert_load_finding(planted, MIXED, length=32, sequences=8)
    tables = {table.title: table for table in finding.tables}
    assert [row[:2] for row in tables["Routers"].rows] == [
        (layer, part) for layer in (0, 1) for part in ("heads", "ffn")
    ]
    assert tables["Dead experts"].rows == ((1, "heads", 2), (1, "heads", 3))
    assert len(tables["Load of every expert"].rows) == 16
    assert tables["Load of every expert"].columns[-len(CLASSES) :] == CLASSES
    column = tables["Routers"].columns.index("dead, untrained")
    assert all(row[column] == 0 for row in tables["Routers"].rows)
    maps = {heatmap.title: heatmap for heatmap in finding.heatmaps}
    assert maps["Load of attention experts"].values[1] == (2.0, 2.0, 0.0, 0.0)
    assert len(maps["Load of feed-forward experts by class of token"].y) == 2 * len(CLASSES)
    assert "2 of 8 experts dead" in finding.answer and "untrained" in finding.answer
    page = write(finding, tmp_path)
    assert "Load of attention experts" in page.read_text(encoding="utf-8")


def test_only_the_part_with_experts_is_shown() -> None:
    finding = expert_load_finding(
        byte_subject(block={"feedforward": BLOCK["feedforward"]}), MIXED, length=32, sequences=4
    )
    assert [heatmap.title for heatmap in finding.heatmaps][0] == "Load of feed-forward experts"
    assert len(finding.heatmaps) == 2 and "Attention" not in finding.answer


def test_the_encoders_of_a_model_are_kept_apart() -> None:
    """Routers of equal layers in two encoders, one of them with a dead expert."""
    dead, even = torch.tensor([[4.0, 0.0]] * len(CLASSES)).double(), torch.ones(len(CLASSES), 2).double()
    found = [
        RouterLoad(f"{encoder}blocks.{layer}.feedforward", counts_ce, torch.ones(2).double(), 1, 1.0, 20)
        for encoder, counts_ce in (("", even), ("backward_encoder.", dead))
        for layer in (0, 1)
    ]
    layers = [0, 1, "backward_encoder 0", "backward_encoder 1"]
    assert [row[:2] for row in _router_table(found, found).rows] == [(layer, "ffn") for layer in layers]
    assert _dead_table(found).rows == tuple((layer, "ffn", 1) for layer in layers[2:])
    by_layer, by_class = _heatmaps(found, "feedforward")
    assert by_layer.y == tuple(map(str, layers)) and len(set(by_class.y)) == 4 * len(CLASSES)
