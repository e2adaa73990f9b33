"""Token usage: shares against the output itself, planted tokens, both encoders, refusals, and the finding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import byte_subject, texts

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters.text_codec import TextCodec
from torchstone.diagnose.adapters.torchstone import TorchstoneSubject
from torchstone.diagnose.subject import Subject
from torchstone.diagnose.token_usage import LayerUsage, token_usage_finding, usages
from torchstone.errors import ConfigError
from torchstone.models.belief_state import BeliefStateConfig
from torchstone.report.finding_write import write

BLOCK: dict[str, Any] = {"projection": "pattention", "feedforward": {"kind": "pattention", "tokens": 24}}
TOKENS_BT = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))


def test_usage_is_what_each_token_adds_to_the_output() -> None:
    model: Any = byte_subject(block=BLOCK).model
    layer, seen = model.blocks[1].feedforward.memory, list[torch.Tensor]()
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(TOKENS_BT)
    hook.remove()
    x_bd = seen[0].double().flatten(0, 1)
    scores_bn = x_bd @ layer.keys().detach().double().T
    normed_bn = 24**0.5 * scores_bn / (scores_bn.square().sum(-1, keepdim=True) + 1e-8).sqrt()
    parts_bne = torch.nn.functional.gelu(normed_bn)[..., None] * layer.values().detach().double()
    wanted_n = parts_bne.norm(dim=-1).sum(0)
    (found,) = (one for one in usages(model, TOKENS_BT) if one.name == "blocks.1.feedforward.memory")
    torch.testing.assert_close(found.usage_n.double(), wanted_n / wanted_n.mean(), rtol=1e-4, atol=1e-5)
    ordered_n = (wanted_n / wanted_n.sum()).sort().values
    assert found.lower_half == pytest.approx(float(ordered_n[:12].sum()), rel=1e-4)
    assert found.little == float((wanted_n < 0.1 * wanted_n.mean()).double().mean())
    assert (found.layer, found.map, found.use) == ("1", "memory", "feedforward")


def test_tokens_that_do_nothing_are_found() -> None:
    subject = byte_subject(block=BLOCK)
    model: Any = subject.model
    with torch.no_grad():
        model.blocks[0].mixer.w_o.values_ne[4:].zero_()
    finding = token_usage_finding(subject, texts(), sequences=4)
    table, shares = finding.tables
    (row,) = (row for row in table.rows if row[:2] == (0, "w_o"))
    named = dict(zip(table.columns, row, strict=True))
    assert (named["little"], named["least"], named["half"]) == (0.75, 0.0, 0.0)
    assert named["little, untrained"] < 0.5  # type: ignore[operator]
    (bins,) = (row for row in shares.rows if row[:2] == (0, "w_o") and row[3] == "model")
    assert bins[shares.columns.index("< 0.01")] == 0.75


def test_shares_of_even_and_dead_layers() -> None:
    even = LayerUsage("blocks.0.mixer.w_q", "input", torch.ones(8), 0)
    assert (even.lower_half, even.little) == (0.5, 0.0)
    dead = LayerUsage("blocks.0.mixer.w_q", "input", torch.zeros(8), 0)
    assert (dead.lower_half, dead.little) == (0.0, 1.0)


def test_both_encoders_of_a_belief_state_model() -> None:
    config = {"width": 16, "depth": 1, "head_dim": 8, "end_token": 10, "block": BLOCK}
    model: Any = BeliefStateConfig.model_validate(config).build(ByteTokenizer.vocab_size, 32, 0)
    found = {one.name: one for one in usages(model, TOKENS_BT)}
    assert len(found) == 10
    backward = found["backward_encoder.blocks.0.mixer.w_q"]
    assert backward.layer == "backward 0" and float(backward.usage_n.mean()) == pytest.approx(1, rel=1e-4)
    subject = TorchstoneSubject(model, "belief", TextCodec(lambda: ByteTokenizer(), "belief"))
    finding = token_usage_finding(subject, texts(), sequences=4)
    assert {row[0] for row in finding.tables[0].rows} == {0, "backward 0"}


def test_the_finding_has_uses_controls_and_frozen_tokens(tmp_path: Path) -> None:
    block = {**BLOCK, "feedforward": {"kind": "pattention", "tokens": 24, "frozen_tokens": 8}}
    finding = token_usage_finding(byte_subject(block=block), texts(), length=16, sequences=4, seed=1)
    table = finding.tables[0]
    assert [row[:4] for row in table.rows][:5] == [
        (0, "w_q", "in", 16), (0, "w_k", "in", 16), (0, "w_v", "in", 16), (0, "w_o", "out", 16), (0, "memory", "ffn", 24)
    ]  # fmt: skip
    frozen = table.columns.index("frozen")
    assert table.rows[4][frozen] == 8 and table.rows[4][frozen + 1] > 0  # type: ignore[operator]
    assert table.rows[0][frozen:] == (0, None)
    own, fresh = (table.columns.index(name) for name in ("least", "least, untrained"))
    assert any(row[own] != row[fresh] for row in table.rows)
    assert len(finding.heatmaps) == 6 and len(finding.figures) == 3
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for one in finding.heatmaps for row in one.values)  # type: ignore[arg-type]
    assert finding.notes[0] == "4 rows of 16 tokens of text." and "Feedforward: the least used half" in finding.answer
    assert "Usage of output tokens" in write(finding, tmp_path).read_text(encoding="utf-8")


def test_models_without_parameter_tokens_are_refused(family_subject: Callable[[str], Subject]) -> None:
    for subject in (byte_subject(), family_subject("Llama")):
        with pytest.raises(ConfigError, match="has no parameter tokens; give a torchstone model with `projection: pat"):
            token_usage_finding(subject, texts())
