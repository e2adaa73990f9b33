"""Rank sweeps: the zero of the scale, ranks that lose nothing and ranks that do, resuming, and models that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import tiny_model
from tests.support.subjects import byte_subject, texts
from transformers import LlamaForCausalLM

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.bottleneck import rank_sweep as module
from torchstone.diagnose.bottleneck.rank_sweep import (
    HeadResult,
    Sweep,
    Training,
    default_ranks,
    rank_sweep,
    rank_sweep_finding,
)
from torchstone.diagnose.bottleneck.rank_sweep_states import cache_states, split_documents
from torchstone.errors import ConfigError, DataError

SETTINGS = {"tokens": 2000, "length": 16, "held_out": 0.5, "batch": 64, "learning_rate": 1e-3}
UNTIED = {"head": {"kind": "linear", "tied": False}}


def test_documents_are_held_out_whole() -> None:
    subject = byte_subject()
    documents = split_documents(subject, texts(), 16, 10_000, 0.25)
    sides = [{bytes(row) for _, row in rows} for rows in (documents.train, documents.held_out)]
    assert not sides[0] & sides[1]
    assert (
        len({number for number, _ in documents.held_out}) == 6 and len({number for number, _ in documents.train}) == 18
    )
    again = split_documents(subject, texts()[::-1] + texts()[:3], 16, 10_000, 0.25)
    assert again.fingerprint == documents.fingerprint  # neither order nor repetition matters


def test_cached_states_give_the_models_losses() -> None:
    subject = byte_subject(**UNTIED)
    documents = split_documents(subject, texts(6), 30, 10_000, 0.5)
    cached = cache_states(subject, documents.held_out, 30, subject.head_weight())
    assert cached.states_nd.dtype == torch.float16
    logits_nv = cached.states_nd.float() @ subject.head_weight().T
    loss = torch.nn.functional.cross_entropy(logits_nv, cached.targets_n)
    own = torch.cat([subject.losses(torch.tensor([row])).flatten() for _, row in documents.held_out])
    assert loss.item() == pytest.approx(own.mean().item(), rel=1e-3)
    assert torch.bincount(cached.document_n).tolist() == [79 - 2] * 3  # a last row of one token has no target


def test_the_full_rank_loses_nothing_and_low_ranks_do() -> None:
    subject = byte_subject(**UNTIED)
    with torch.no_grad():
        subject.model.head.project.weight.mul_(4)
    documents = split_documents(subject, texts(), 16, 2000, 0.5)
    sweep = rank_sweep(subject, documents, [16, 4, 1], Training(learning_rate=1e-9, batch=64))
    assert sweep.gaps[16] == 0.0 and abs(sweep.ranked[16].loss - sweep.untouched.loss) < 1e-4
    assert abs(sweep.change) < 1e-4
    assert sweep.full == 16 and list(sweep.gaps) == [1, 4, 16]


def planted_sweep(change: float, documents: int = 12) -> Sweep:
    """Ranks 4 and 8 lose 0.08 and 0.02 nats against the untouched head, and training changes that by `change`."""

    def head(name: str, loss: float) -> HeadResult:
        return HeadResult(name, tuple(10 * (loss + 0.01 * (n % 3)) for n in range(documents)), (10,) * documents)

    ranked = {rank: head(str(rank), 2 + gap) for rank, gap in ((4, 0.08), (8, 0.02))}
    return Sweep(head("untouched", 2.0), head("retrained", 2 + change), ranked, 16)


@pytest.mark.parametrize("change", [-0.03, 0.006])
def test_gaps_are_from_the_retrained_head_where_training_alone_moves_the_loss(change: float) -> None:
    sweep = planted_sweep(change)
    assert sweep.zero is sweep.retrained
    assert sweep.gaps == pytest.approx({4: 0.08 - change, 8: 0.02 - change, 16: 0.0})
    interval = sweep.interval()
    assert interval is not None and interval[1] - interval[0] < 0.1
    critical = module.critical_rank(list(sweep.gaps), list(sweep.gaps.values()))
    assert interval[0] == pytest.approx(critical)  # documents differ in their loss only, not in gaps
    answer = module._answer(sweep, None)
    assert answer.startswith(
        f"Training the full head in the same way changes its loss by {change:+.4f} nats, 0.005 or more"
    )
    assert "gaps are measured from the retrained full head" in answer and f"{critical:.1f}" in answer
    assert module._figure(sweep, None).note == "against the full head, retrained"
    rows = {row[0]: row[2:] for row in module._table(sweep).rows}
    assert rows[4] == pytest.approx((0.08, 0.08 - change)) and rows["16, untouched"] == pytest.approx((0.0, -change))


def test_gaps_are_from_the_untouched_head_where_training_alone_does_nothing() -> None:
    sweep = planted_sweep(0.004)
    assert sweep.zero is sweep.untouched and sweep.gaps == pytest.approx({4: 0.08, 8: 0.02, 16: 0.0})
    answer = module._answer(sweep, None)
    assert answer.startswith("The rank at which") and "retrained" not in answer and "+0.0040 nats." in answer


def test_few_documents_give_no_interval(tmp_path: Path) -> None:
    assert planted_sweep(0.0, documents=10).interval() is not None
    assert planted_sweep(0.0, documents=9).interval() is None
    found = rank_sweep_finding(byte_subject(), texts(10), ranks=[8, 2], **SETTINGS)
    assert "interval" not in found.answer
    assert any("5 held-out documents are too few" in note for note in found.notes)
    assert not any(
        "too few" in note for note in rank_sweep_finding(byte_subject(), texts(), ranks=[2], **SETTINGS).notes
    )


def test_training_lowers_the_loss_of_a_low_rank() -> None:
    subject = byte_subject(**UNTIED)
    documents = split_documents(subject, texts(), 16, 2000, 0.5)
    still, trained = (
        rank_sweep(subject, documents, [2], Training(learning_rate=rate, batch=64, epochs=4)).ranked[2].loss
        for rate in (1e-9, 1e-2)
    )
    assert trained < still - 0.1


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = byte_subject(**UNTIED)
    whole = rank_sweep_finding(subject, texts(), ranks=[8, 2], **SETTINGS)
    stopped = module.train_head
    calls = []

    def once(matrices, cached, training):
        calls.append(len(matrices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        stopped(matrices, cached, training)

    monkeypatch.setattr(module, "train_head", once)
    with pytest.raises(KeyboardInterrupt):
        rank_sweep_finding(subject, texts(), ranks=[8, 2], directory=tmp_path / "sweep", **SETTINGS)
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        "head-untouched.json",
        "head-retrained.json",
        "head-8.json",
    }
    again = rank_sweep_finding(subject, texts(), ranks=[8, 2], directory=tmp_path / "sweep", **SETTINGS)
    assert len(calls) == 4 and again.tables == whole.tables
    monkeypatch.setattr(module, "cache_states", None)  # a finished sweep runs no model
    assert (
        rank_sweep_finding(subject, texts(), ranks=[8, 2], directory=tmp_path / "sweep", **SETTINGS).tables
        == whole.tables
    )


def test_results_of_another_sweep_are_refused(tmp_path: Path) -> None:
    subject = byte_subject(**UNTIED)
    rank_sweep_finding(subject, texts(), ranks=[2], directory=tmp_path, **SETTINGS)
    with pytest.raises(ConfigError, match="another model"):
        rank_sweep_finding(byte_subject(1, **UNTIED), texts(), ranks=[2], directory=tmp_path, **SETTINGS)
    with pytest.raises(ConfigError, match="other settings"):
        rank_sweep_finding(subject, texts(), ranks=[2], directory=tmp_path, **SETTINGS | {"learning_rate": 2e-3})
    (tmp_path / "head-2.json").write_text(json.dumps({"head": "2"}))
    with pytest.raises(DataError, match=r"head-2\.json"):
        rank_sweep_finding(subject, texts(), ranks=[2], directory=tmp_path, **SETTINGS)


def test_a_head_that_diverged_is_refused_and_never_taken_up_again(tmp_path: Path) -> None:
    subject = byte_subject(**UNTIED)
    wild = SETTINGS | {"learning_rate": 3e37}
    for directory in (None, tmp_path / "wild"):
        with pytest.raises(DataError, match="'retrained' has a held-out loss of .*its training diverged"):
            rank_sweep_finding(subject, texts(), ranks=[2], directory=directory, **wild)
    assert [path.name for path in (tmp_path / "wild").iterdir()] == ["head-untouched.json"]
    good = rank_sweep_finding(subject, texts(), ranks=[2], directory=tmp_path / "good", **SETTINGS)
    path = tmp_path / "good" / "head-2.json"
    data = json.loads(path.read_text())
    data["sums"][0] = float("nan")
    path.write_text(json.dumps(data))
    again = rank_sweep_finding(subject, texts(), ranks=[2], directory=tmp_path / "good", **SETTINGS)
    assert again.tables == good.tables and "NaN" not in path.read_text()


def test_impossible_ranks_and_texts() -> None:
    subject = byte_subject(**UNTIED)
    with pytest.raises(ConfigError, match=r"rank 17 exceeds min\(vocab 257, width 16\)"):
        rank_sweep_finding(subject, texts(), ranks=[17], **SETTINGS)
    with pytest.raises(DataError, match="at least 2"):
        rank_sweep_finding(subject, ["one text only", "one text only"], **SETTINGS)
    with pytest.raises(ConfigError, match="held_out"):
        rank_sweep_finding(subject, texts(), **SETTINGS | {"held_out": 0.0})
    assert default_ranks(100) == (50, 25, 12, 6) and default_ranks(4) == (2,)


def test_a_head_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(ConfigError, match="mixture-of-softmaxes"):
        rank_sweep_finding(byte_subject(head="mixture-of-softmaxes"), texts(), ranks=[2], **SETTINGS)
    subject = byte_subject(**UNTIED)
    documents = split_documents(subject, texts(4), 16, 100, 0.5)
    with pytest.raises(ConfigError, match="more than a matrix"):
        cache_states(subject, documents.train, 16, 2 * subject.head_weight())
    with pytest.raises(DataError, match="the head knows 50"):
        cache_states(subject, documents.train, 16, subject.head_weight()[:50])


def llama(kind: type[LlamaForCausalLM] = LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A tiny model of 48 tokens, of which 40 are used, whose logits are as large as those of real models."""
    model = kind(tiny_model("Llama").config)
    model.load_state_dict(tiny_model("Llama").state_dict())
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
        model.lm_head.weight[40:] = 30  # padding that takes part in the model's own softmax
    return model.to(dtype)


class Biased(LlamaForCausalLM):
    """Half a nat more or less on every other token."""

    def forward(self, *inputs, **settings):
        output = super().forward(*inputs, **settings)
        output.logits = output.logits + 0.5 * (-1) ** torch.arange(48)
        return output


class Words:
    """Forty words: w0 to w39."""

    def encode(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def __len__(self) -> int:
        return 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_and_padded_rows_are_no_other_head_and_a_bias_is(dtype: torch.dtype) -> None:
    rows = [(0, torch.randint(0, 40, (30,), generator=torch.Generator().manual_seed(n)).tolist()) for n in range(3)]
    subject = open_subject(llama(dtype=dtype), tokenizer=Words())
    assert subject.head_weight().shape == (40, 32)
    cached = cache_states(subject, rows, 30, subject.head_weight().float())
    assert cached.states_nd.shape == (3 * 29, 32)
    with pytest.raises(ConfigError, match="more than a matrix"):
        cache_states(open_subject(llama(Biased, dtype), tokenizer=Words()), rows, 30, subject.head_weight().float())


def test_a_common_part_of_bf16_logits_is_rounding_too() -> None:
    """Logits around 100 are rounded by up to a quarter; the model and W h round alike or differ by no more than that."""
    model = llama(dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight[0] = 20.0
        model.lm_head.weight[:, 0] = 5.0
    subject = open_subject(model, tokenizer=Words())
    rows = [(0, list(range(1, 31)))]
    cache_states(subject, rows, 30, subject.head_weight().float())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: model.blocks[0].mixer.w_v.weight, "not finite first is the state after block 0"),
        (lambda model: model.norm.gain[None], "not finite first is the state after final norm"),
        (lambda model: model.head.project.weight, "row 0 of the output matrix is not finite"),
    ],
)
def test_models_whose_numbers_are_not_finite_are_refused_with_the_place(damage, message: str) -> None:
    subject = byte_subject(**UNTIED)
    with torch.no_grad():
        damage(subject.model)[0, 0] = torch.nan
    with pytest.raises(DataError, match=message):
        rank_sweep_finding(subject, texts(), ranks=[2], **SETTINGS)


def test_a_later_state_that_is_not_finite_is_named_as_such() -> None:
    subject = byte_subject(**UNTIED)
    with torch.no_grad():
        subject.model.embed.weight[ord("!")] = torch.inf  # in the second row only
    rows = [(0, list(b"abcdefgh")), (1, list(b"abcd!fgh"))]
    with pytest.raises(DataError, match="NaN or infinite; .* the state after embedding .token 4 of row 1"):
        cache_states(subject, rows, 8, subject.head_weight())


def test_rows_begin_with_the_models_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = byte_subject(**UNTIED)
    plain = split_documents(subject, ["abcdefg", "ABCDE"], 4, 10_000, 0.5)
    assert {bytes(row) for _, row in plain.train + plain.held_out} == {b"abcd", b"efg", b"ABCD"}
    monkeypatch.setattr(subject, "first_tokens", lambda: [256])
    documents = split_documents(subject, ["abcdefg", "ABCDE"], 4, 10_000, 0.5)
    rows = [row for _, row in documents.train + documents.held_out]
    assert all(row[0] == 256 for row in rows)
    assert {bytes(row[1:]) for row in rows} == {
        b"abc",
        b"def",
        b"g",
        b"ABC",
        b"DE",
    }  # now even a last token has a context
    assert "tokens to train heads on" in documents.describe()
    cached = cache_states(subject, documents.train + documents.held_out, 4, subject.head_weight())
    assert 256 not in cached.targets_n and len(cached.targets_n) == 12
    with pytest.raises(ConfigError, match="leave no room"):
        monkeypatch.setattr(subject, "first_tokens", lambda: [256] * 4)
        split_documents(subject, ["abcdefg", "ABCDE"], 4, 10_000, 0.5)


def test_states_that_fp16_cannot_hold_are_refused() -> None:
    subject = byte_subject(**UNTIED)
    with torch.no_grad():
        subject.model.norm.gain.mul_(1e6)
    with pytest.raises(DataError, match="65504"):
        rank_sweep_finding(subject, texts(), ranks=[2], **SETTINGS)


def test_finding() -> None:
    found = rank_sweep_finding(byte_subject(), texts(), ranks=[8, 4, 2], **SETTINGS)
    assert [row[0] for row in found.tables[0].rows] == [2, 4, 8, "16, retrained", "16, untouched"]
    assert "tied" in found.notes[1] and "held out in 12 documents" in found.notes[0]
