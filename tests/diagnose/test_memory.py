"""Memory: gates against their formulas, bounds, both encoders, bytes of the state, refusals, and the finding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subjects import byte_subject, texts

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters.text_codec import TextCodec
from torchstone.diagnose.adapters.torchstone import TorchstoneSubject
from torchstone.diagnose.memory import BINS, gate_memories, memory_finding, state_bytes
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError
from torchstone.models.belief_state import BeliefStateConfig
from torchstone.nn.recurrence.hgrn2 import memories
from torchstone.report.finding_write import write

HYBRID = {"depth": 3, "pattern": ["hgrn2", "rglru", {"kind": "local-attention", "window": 8}]}
TOKENS_BT = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))


def input_of(model: Any, module: torch.nn.Module) -> torch.Tensor:
    """What a module is given while the model reads."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(TOKENS_BT)
    hook.remove()
    return seen[0].double()


def belief_subject(**model: Any) -> Subject:
    config = BeliefStateConfig.model_validate({"width": 16, "depth": 1, "head_dim": 8, "end_token": 10, **model})
    return TorchstoneSubject(
        config.build(ByteTokenizer.vocab_size, 32, 0),  # type: ignore[arg-type]
        "belief",
        TextCodec(lambda: ByteTokenizer(), "belief"),
    )


def test_gates_of_hgrn2_are_those_of_the_formula() -> None:
    model: Any = byte_subject(block={"mixer": "hgrn2"}).model
    with torch.no_grad():
        model.shared.hgrn2_lower_bounds.gamma.normal_(generator=torch.Generator().manual_seed(2))
    found, own = gate_memories(model, TOKENS_BT), memories(model, TOKENS_BT)
    for layer, (one, same) in enumerate(zip(found, own, strict=True)):
        mixer = model.blocks[layer].mixer
        z_btd = F.linear(input_of(model, mixer), mixer.w_f.weight.detach().double())
        share_ld = model.shared.hgrn2_lower_bounds.gamma.detach().double().softmax(0)
        beta_d = share_ld[1 : layer + 1].sum(0)
        memory_btd = 1 / ((1 - beta_d) * (1 - z_btd.sigmoid()))
        assert (one.layer, one.kind) == (layer, "hgrn2")
        wanted = memory_btd.flatten().quantile(torch.tensor([0.1, 0.5, 0.9]).double(), interpolation="lower")
        assert one.quantiles == pytest.approx(wanted.tolist(), rel=1e-4)
        assert one.whole == pytest.approx(float((memory_btd >= 20).double().mean()), abs=2e-3)
        assert one.shares[1] == pytest.approx(float(((memory_btd >= 2) & (memory_btd < 4)).double().mean()), abs=2e-3)
        spectrum_d = (1 / (1 / memory_btd).mean((0, 1))).sort().values
        torch.testing.assert_close(one.spectrum_d, spectrum_d, rtol=1e-4, atol=0)
        if layer == 0:
            assert one.bound_d is None
        else:
            assert one.bound_d is not None
            torch.testing.assert_close(one.bound_d, beta_d, rtol=1e-5, atol=1e-7)
        assert one.quantiles[1] == pytest.approx(same.median, rel=1e-6)
        assert one.shares == pytest.approx(same.shares, abs=1e-6)


def test_gates_of_rglru_are_those_of_the_formula() -> None:
    model: Any = byte_subject(block={"mixer": "rglru"}).model
    for layer, one in enumerate(gate_memories(model, TOKENS_BT)):
        unit = model.blocks[layer].mixer.rg_lru
        z_btr, gate = input_of(model, unit), unit.recurrence_gate
        blocks = torch.einsum("bthi,hio->btho", z_btr.unflatten(-1, gate.bias.shape), gate.weight.detach().double())
        r_btr = (blocks + gate.bias.detach().double()).flatten(2).sigmoid()
        a_btr = (-8 * r_btr * F.softplus(unit.alpha.detach().double())).exp()
        memory_btr = 1 / (1 - a_btr)
        assert (one.layer, one.kind, one.bound_d) == (layer, "rglru", None)
        wanted = memory_btr.flatten().quantile(torch.tensor([0.1, 0.5, 0.9]).double(), interpolation="lower")
        assert one.quantiles == pytest.approx(wanted.tolist(), rel=1e-4)
        assert sum(one.shares) == pytest.approx(1)
        assert one.shares[-1] == pytest.approx(float((memory_btr >= 4096).double().mean()), abs=2e-3)
        decays_r = unit.decays().detach().double().sort().values
        torch.testing.assert_close(1 - 1 / one.spectrum_d, decays_r, rtol=1e-5, atol=1e-6)


def test_a_planted_gate_has_its_memory() -> None:
    """σ(z) = 1 − 1/100 in every channel; a gate that is open to the last digit counts among the longest."""
    model: Any = byte_subject(block={"mixer": {"kind": "hgrn2", "variant": "unit", "lower_bound": "none"}}).model
    with torch.no_grad():
        for block, memory in zip(model.blocks, (100.0, 1e9), strict=True):
            block.mixer.w_f.weight.zero_()
            block.mixer.w_f.bias.fill_(torch.tensor(memory - 1).log())
    short, long = gate_memories(model, TOKENS_BT)
    assert short.quantiles == pytest.approx((100.0,) * 3, rel=1e-4) and short.shares[BINS.index("64")] == 1
    assert long.quantiles == pytest.approx((1e9,) * 3, rel=1e-4) and long.shares[-1] == 1 == long.whole
    assert not any(block.mixer._forward_pre_hooks for block in model.blocks)


def test_both_encoders_of_a_belief_state_model() -> None:
    subject = belief_subject(pattern=["hgrn2"])
    model: Any = subject.model
    forward, backward = gate_memories(model, TOKENS_BT)
    assert (forward.layer, backward.layer) == (0, "backward 0")
    mixer, seen = model.backward_encoder.blocks[0].mixer, list[torch.Tensor]()
    mixer.register_forward_pre_hook(lambda _, given: seen.append(mixer.gates(given[0])[2]))
    with torch.no_grad():
        model.backwards(TOKENS_BT.flip(1))
    assert backward.quantiles[1] == pytest.approx(float((1 / seen[0]).median()), rel=1e-5)
    finding = memory_finding(subject, texts(), length=32, sequences=4, contexts=(16,))
    assert [row[0] for row in finding.tables[0].rows] == [0, "backward 0"]
    assert any("backward encoder" in note for note in finding.notes)


def test_bytes_of_the_state_are_those_of_decoding() -> None:
    model: Any = byte_subject(**HYBRID).model
    for context, sizes in zip((4, 64), state_bytes(model, (4, 64)), strict=True):
        state = model.new_state(1, context)
        recurrent = sum(layer.nbytes() for layer in state.layers[:2])
        assert sizes == (state.nbytes(), recurrent, 2 * 3 * context * 16 * 4)


def test_the_finding_of_a_hybrid(tmp_path: Path) -> None:
    subject = byte_subject(**HYBRID)
    finding = memory_finding(subject, texts(), sequences=4, contexts=(256, 16), seed=1)
    layers, shares, state = finding.tables  # hgrn2 in layer 0 has no lower bound
    assert [row[:2] for row in layers.rows] == [(0, "hgrn2"), (1, "rglru")]
    own, fresh = (layers.columns.index(name) for name in ("median", "median, untrained"))
    assert all(row[own] != row[fresh] for row in layers.rows)
    assert [row[:2] for row in shares.rows] == [(layer, who) for layer in (0, 1) for who in ("model", "untrained")]
    assert all(sum(row[2:]) == pytest.approx(1, abs=1e-4) for row in shares.rows)  # type: ignore[arg-type]
    assert [row[0] for row in state.rows] == [16, 256]
    assert [figure.title for figure in finding.figures] == [
        "Decay spectrum of hgrn2", "Decay spectrum of rglru", "State size"
    ]  # fmt: skip
    assert "untrained" in finding.answer and "row of 32 tokens" in finding.answer
    assert "Decay spectrum of rglru" in write(finding, tmp_path).read_text(encoding="utf-8")


def test_bounds_of_the_finding_and_a_state_of_one_size() -> None:
    subject = byte_subject(block={"mixer": "hgrn2"})
    model: Any = subject.model
    with torch.no_grad():
        model.shared.hgrn2_lower_bounds.gamma[1].fill_(3.0)
    finding = memory_finding(subject, texts(), sequences=4, contexts=(16, 256))
    (bounds,) = (table for table in finding.tables if table.title == "Lower bounds")
    beta = float(torch.tensor(3.0).sigmoid())
    assert bounds.rows == (pytest.approx((1, beta, 0.5, beta, beta, 1 / (1 - beta)), rel=1e-5),)
    assert "at 16 tokens of context and the same at 256" in finding.answer
    assert [line.name for line in finding.figures[-1].lines] == ["this model", "full attention of this width"]


def test_models_without_gates_are_refused(family_subject: Callable[[str], Subject]) -> None:
    with pytest.raises(ConfigError, match="decoder has no hgrn2 or rglru layer.*`mixer: hgrn2`"):
        memory_finding(byte_subject(), texts())
    with pytest.raises(ConfigError, match="is a LlamaForCausalLM, whose gates .* give a torchstone run"):
        memory_finding(family_subject("Llama"), texts())
    with pytest.raises(ConfigError, match=r"contexts were given as \[0, 16\]; give lengths of 1"):
        memory_finding(byte_subject(block={"mixer": "hgrn2"}), texts(), contexts=(0, 16))
