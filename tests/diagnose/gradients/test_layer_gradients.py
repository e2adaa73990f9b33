"""Gradients by example and in factored form against autograd's own, on models of several families."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.gradients.capture import Capture, select_matrices
from torchstone.diagnose.gradients.comparison import compare_curves, mean_curve, thirds, variation
from torchstone.diagnose.gradients.layer_gradients import layer_gradients_finding
from torchstone.diagnose.gradients.pairs import Example, Pair, tokenise
from torchstone.diagnose.gradients.profile import gradient_profile, mean_losses
from torchstone.diagnose.gradients.ratio import ratio_of
from torchstone.diagnose.gradients.spectra import STATS, Factors, gradient_singular_values
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.recipe.registry import parse_part

VOCAB, WIDTH = 40, 16


class Characters:
    """A tokenizer: one id per character, and `=1` is a token of its own, so that texts may join across a boundary."""

    vocab_size = VOCAB
    end_of_document = VOCAB - 1

    def encode(self, text: str) -> list[int]:
        ids, place = [], 0
        while place < len(text):
            joined = text.startswith("=1", place)
            ids.append(38 if joined else "abcdefghijklmnopqrstuvwxyz0123456789=. "[:38].find(text[place]) % 38)
            place += 2 if joined else 1
        return ids

    def decode(self, tokens: Any) -> str:
        return "".join("=1" if token == 38 else "abcdefghijklmnopqrstuvwxyz0123456789=."[token] for token in tokens)


def _decoder(**mixer: Any) -> nn.Module:
    block = {"mixer": {"kind": "attention", "heads": 4, **mixer}}
    part = {"kind": "decoder", "width": WIDTH, "depth": 2, "block": block, "head": {"kind": "linear", "tied": False}}
    model = parse_part("model", part).build(VOCAB, 64, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def _transformers(family: str) -> nn.Module:
    import transformers

    sizes = {
        "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "gpt_neox": {
            "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
            "max_position_embeddings": 64,
        },
        "llama": {
            "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 24, "max_position_embeddings": 64,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=VOCAB, initializer_range=0.3, **sizes[family])
    return transformers.AutoModelForCausalLM.from_config(config)


MODELS = {
    "plain": lambda: _decoder(position={"kind": "rotary", "layout": "interleaved"}),
    "grouped": lambda: _decoder(kv_heads=2, qk_norm=True),
    "partial": lambda: _decoder(position={"kind": "rotary", "variant": "partial", "p": 0.5}),
    "differential": lambda: _decoder(kind="differential", heads=2),
    "gpt2": lambda: _transformers("gpt2"),
    "gpt_neox": lambda: _transformers("gpt_neox"),
    "llama": lambda: _transformers("llama"),
}


@pytest.fixture(scope="module", params=MODELS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return open_subject(MODELS[request.param](), tokenizer=Characters() if request.param == "plain" else None)


@pytest.fixture
def plain() -> Subject:
    return open_subject(MODELS["plain"](), tokenizer=Characters())


def _examples(count: int = 5) -> list[Example]:
    draw = np.random.default_rng(3)
    lengths = [int(n) for n in draw.integers(4, 24, count)]
    return [Example.of(draw.integers(0, VOCAB, n).tolist(), max(1, n // 2), str(i)) for i, n in enumerate(lengths)]


def _weight_gradients(subject: Subject, example: Example) -> dict[tuple[int, str], Tensor]:
    """Every wanted matrix's gradient from autograd, example by example; the meaning of the whole module."""
    subject.model.zero_grad(set_to_none=True)
    logits = subject.logits(torch.tensor([example.tokens]))[0]
    losses = [-logits[place - 1].log_softmax(-1)[example.tokens[place]] for place in example.scored]
    torch.stack(losses).mean().backward()
    found = {}
    for matrix in select_matrices(subject, "all"):
        gradient = matrix.module.weight.grad
        gradient = gradient.T if matrix.transposed else gradient
        found[matrix.layer, matrix.name] = gradient if matrix.rows is None else gradient[matrix.rows]
    subject.model.zero_grad(set_to_none=True)
    return found


def _naive(gradient: Tensor) -> dict[str, float]:
    sigma = torch.linalg.svdvals(gradient.double())
    share = sigma / sigma.sum()
    return {
        "nuclear": float(sigma.sum()), "sigma1": float(sigma[0]), "sigma_min": float(sigma[-1]),
        "ratio": float(share[0]), "frobenius": float(gradient.double().norm()),
        "effective_rank": float(torch.exp(torch.special.entr(share).sum())),
        "mean": float(gradient.double().mean()), "max": float(gradient.max()), "min": float(gradient.min()),
    }  # fmt: skip


def test_statistics_are_those_of_autograd(subject: Subject) -> None:
    examples = _examples()
    profile = gradient_profile(subject, examples, modules="all", stats=STATS, batch_size=3)
    assert profile.matrices[:4] == ("q", "k", "v", "o") and len(profile.matrices) > 4
    for n, example in enumerate(examples):
        for (layer, name), gradient in _weight_gradients(subject, example).items():
            largest = float(gradient.abs().max())
            for statistic, value in _naive(gradient).items():
                ours = float(profile.statistic(statistic)[n, layer, profile.matrices.index(name)])
                sizes = statistic in ("sigma_min", "mean", "max", "min")
                assert ours == pytest.approx(value, rel=1e-4, abs=2e-5 * largest if sizes else 0), (
                    statistic,
                    layer,
                    name,
                )
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def test_gradients_are_rebuilt_entry_by_entry(subject: Subject) -> None:
    """Also the order of rows: in fused layers, and where a rotary layout rearranges them."""
    example, found = _examples(1)[0], {}
    matrices = select_matrices(subject, "all")
    tokens = torch.tensor([example.tokens])
    with Capture(subject, matrices, tuple(tokens.shape), lambda i, factors: found.update({i: factors})) as capture:
        capture.backward(mean_losses(subject.logits(tokens), [example]).sum())
    wanted = _weight_gradients(subject, example)
    for i, matrix in enumerate(matrices):
        ours = found[i].delta_bto[0].T @ found[i].x_bti[0]
        theirs = wanted[matrix.layer, matrix.name]
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)


def test_a_batch_is_its_examples_one_by_one(subject: Subject) -> None:
    examples = _examples(6)
    together, alone = (gradient_profile(subject, examples, batch_size=size) for size in (4, 1))
    for name in together.values:
        torch.testing.assert_close(together.statistic(name), alone.statistic(name), rtol=2e-4, atol=1e-9)
    torch.testing.assert_close(together.losses_n, alone.losses_n, rtol=1e-5, atol=0)
    assert together.ids == alone.ids == tuple(example.id for example in examples)


def test_frozen_weights_give_the_same(plain: Subject) -> None:
    before = gradient_profile(plain, _examples())
    for parameter in plain.model.parameters():
        parameter.requires_grad_(False)
    after = gradient_profile(plain, _examples())
    assert torch.equal(before.statistic(), after.statistic())


def test_bf16_weights_are_reduced_in_fp32(plain: Subject) -> None:
    fine = gradient_profile(plain, _examples())
    coarse = gradient_profile(open_subject(plain.model.bfloat16()), _examples())
    assert coarse.statistic().dtype == torch.float64
    assert float((coarse.statistic() / fine.statistic()).log().abs().max()) < 0.2


@given(
    tokens=st.integers(1, 40), outputs=st.integers(1, 30), inputs=st.integers(1, 30), rank=st.integers(0, 40),
    double=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_factored_values_are_those_of_the_product(
    tokens: int, outputs: int, inputs: int, rank: int, double: bool, seed: int
) -> None:
    """Any shape, any rank of the factors (repeated inputs make X singular), in fp32 and fp64."""
    draw = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    x = torch.randn(tokens, inputs, generator=draw, dtype=dtype)
    delta = torch.randn(tokens, outputs, generator=draw, dtype=dtype)
    if rank < tokens:
        x[rank:] = x[:1] if rank else 0
    ours = gradient_singular_values(x, delta).double()
    theirs = torch.linalg.svdvals(delta.double().T @ x.double())
    assert ours.shape == theirs.shape
    tolerance = (1e-8 if double else 2e-6) * float(x.norm() * delta.norm())  # sums in a product may cancel
    torch.testing.assert_close(ours, theirs, atol=tolerance + 1e-30, rtol=0)
    assert float(ours.sum()) == pytest.approx(float(theirs.sum()), rel=1e-5, abs=tolerance + 1e-30)
    batch = gradient_singular_values(torch.stack([x, x]), torch.stack([delta, 0 * delta])).double()
    torch.testing.assert_close(batch[0], ours, atol=tolerance + 1e-30, rtol=0)
    assert not batch[1].any()


def test_beyond_the_rank_values_are_exactly_zero() -> None:
    values = gradient_singular_values(torch.randn(3, 20), torch.randn(3, 12))
    assert values.shape == (12,) and not values[3:].any() and bool((values[:3] > 0).all())


def test_zero_and_not_finite_gradients() -> None:
    x, delta = torch.randn(3, 4, 6), torch.randn(3, 4, 5)
    delta[0], delta[1, 2, 2] = 0, torch.inf
    found = Factors(x, delta).statistics(STATS)
    assert [float(found[name][0]) for name in ("nuclear", "ratio", "effective_rank")] == [0, 0, 0]
    assert all(value[1].isnan() and value[2].isfinite() for value in found.values())


def test_entries_of_large_products_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, delta = torch.randn(2, 7, 9), torch.randn(2, 7, 11)
    whole = Factors(x, delta).statistics(STATS)
    monkeypatch.setattr("torchstone.diagnose.gradients.spectra.BLOCK_NUMBERS", 40)
    torch.testing.assert_close(Factors(x, delta).statistics(STATS), whole)
    tall, wide = torch.randn(3, 12, 5), torch.randn(3, 12, 6)
    monkeypatch.undo()
    values = gradient_singular_values(tall, wide)
    monkeypatch.setattr("torchstone.diagnose.gradients.spectra.BLOCK_NUMBERS", 1)
    torch.testing.assert_close(gradient_singular_values(tall, wide), values)


def test_not_finite_gradients_are_named_and_left_out(plain: Subject) -> None:
    """One token's embedding is infinite: only examples that hold it are lost."""
    plain.embedding().weight.data[7] = torch.inf
    examples = [Example.of([1, 2, 3, 4], 2, "good"), Example.of([1, 7, 3, 4], 2, "bad")]
    profile = gradient_profile(plain, examples)
    assert profile.not_finite and all(text.startswith("example bad, blocks.") for text in profile.not_finite)
    assert profile.curve().isfinite().all()
    torch.testing.assert_close(profile.curve(), profile.statistic()[0])


def test_normalisation(plain: Subject) -> None:
    examples = _examples()
    raw, loss, tokens = (gradient_profile(plain, examples, normalize=n) for n in (None, "loss", "tokens"))
    scale = raw.losses_n[:, None, None]
    torch.testing.assert_close(loss.statistic("frobenius"), raw.statistic("frobenius") / scale)
    scale = torch.tensor([len(e.scored) for e in examples]).double().sqrt()[:, None, None]
    torch.testing.assert_close(tokens.statistic(), raw.statistic() * scale)
    assert torch.equal(tokens.statistic("effective_rank"), raw.statistic("effective_rank"))


def test_truncated_responses_are_skipped_and_listed(plain: Subject) -> None:
    examples = [
        Example.of(list(range(20)), 15, "long"),
        Example.of(list(range(20)), 4, "kept"),
        Example.of([1], 0, "one"),
    ]
    profile = gradient_profile(plain, examples, max_length=12)
    assert profile.ids == ("kept",) and profile.skipped == ("long", "one") and profile.targets_n.tolist() == [8]
    with pytest.raises(
        DataError, match=r"none of the 1 examples has a response token within 12 tokens \(skipped: long\)"
    ):
        gradient_profile(plain, examples[:1], max_length=12)
    with pytest.raises(DataError, match="none of the 0 examples"):
        gradient_profile(plain, [])


def test_modules_are_chosen_by_pattern(plain: Subject) -> None:
    down = gradient_profile(plain, _examples(), modules="w_down")
    assert down.matrices == ("feedforward.w_down",) and down.layers == (0, 1)
    one = gradient_profile(plain, _examples(), modules=r"blocks\.0\.mixer\.w_q|feedforward")
    assert one.matrices == ("q", "feedforward.w_gate", "feedforward.w_up", "feedforward.w_down")
    assert one.statistic()[:, 1, 0].isnan().all() and not one.not_finite
    assert one.curve().isnan().sum() == 1 and not one.overall().isnan().any()
    with pytest.raises(ConfigError, match=r"matches none of the 14 matrices .* candidates are .*blocks\.0"):
        gradient_profile(plain, _examples(), modules="self_attn")
    with pytest.raises(ConfigError, match="no regular expression"):
        gradient_profile(plain, _examples(), modules="(")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stats": ("nuclear", "rank")}, "at least one of nuclear"),
        ({"stats": ()}, "at least one of nuclear"),
        ({"normalize": "length"}, "give None, 'loss' or 'tokens'"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"max_length": 1}, "max_length at least 2"),
    ],
)
def test_bad_settings(plain: Subject, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gradient_profile(plain, _examples(), **settings)


def test_curves_and_comparisons() -> None:
    values = torch.tensor([[1.0, 4.0, 2.0, 2.0], [3.0, 6.0, torch.nan, 2.0], [1.0, 4.0, 4.0, 0.0]], dtype=torch.float64)
    curve = mean_curve(values[:, :, None])[:, 0]
    assert curve.tolist() == [1.0, 4.0, 3.0, 1.0]  # the second example is left out
    assert variation(curve) == 2.0 and thirds(curve) == (3.0, 1.0, 2.0)
    first, second = torch.rand(12, 7, 2) + 1, torch.rand(12, 7, 2) + 2
    first[:, 3] = 0
    found = compare_curves(first.double(), second.double(), tuple(range(7)), ("q", "k"), paired=True)
    a, b = first.double().mean(0), second.double().mean(0)
    a[3] = 1e-10
    relative = (a - b).abs() / a
    assert found.rd["k"] == pytest.approx(float(relative[:, 1].mean()))
    assert (
        found.top_layers["q"] == tuple(relative[:, 0].argsort(descending=True)[:5].tolist())
        and found.top_layers["q"][0] == 3
    )
    low, signed, high = found.low_lm, found.signed_lm, found.high_lm
    assert low is not None and high is not None and bool((low <= signed).all() and (signed <= high).all())
    few = compare_curves(first[:9].double(), second[:9].double(), tuple(range(7)), ("q", "k"), paired=True)
    assert few.low_lm is None
    assert len(found.table("t").rows) == 14


def test_intervals_of_the_comparison_cover(plain: Subject) -> None:
    """Two samples of one distribution: the true difference is 0; of 200 intervals some 95 % hold it."""
    draw, inside = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        a, b = (torch.randn(40, 1, 1, generator=draw).double().exp() for _ in range(2))
        found = compare_curves(a, b, (0,), ("q",), paired=False, seed=seed)
        assert found.low_lm is not None and found.high_lm is not None
        inside += int(found.low_lm <= 0 <= found.high_lm)
    assert 178 <= inside <= 199


def test_only_like_profiles_compare(plain: Subject) -> None:
    one, other = gradient_profile(plain, _examples()), gradient_profile(plain, _examples(), normalize="loss")
    with pytest.raises(ConfigError, match="same layers, matrices and normalisation"):
        one.compare(other)
    with pytest.raises(ConfigError, match="ask for it with stats"):
        one.curve("mean")


def test_boundaries(plain: Subject) -> None:
    """`=1` is one token, so the prompt's own `=` is not among the text's tokens."""
    pair = Pair("2+2=", "1b")
    joint, apart, official = (tokenise(plain, pair, boundary) for boundary in ("joint", "apart", "official"))
    assert plain.decode(joint.tokens[joint.start :]) == "=1b"  # the token that holds the response's first character
    assert plain.decode(apart.tokens[apart.start :]) == "1b" and len(apart.tokens) == len(joint.tokens) + 1
    assert official.tokens == joint.tokens and official.start == joint.start + 1
    clean = Pair("ab=", "cd")
    assert {tokenise(plain, clean, boundary).scored for boundary in ("joint", "apart", "official")} == {(3, 4)}
    with pytest.raises(ConfigError, match="boundary='offsets' is unknown"):
        tokenise(plain, pair, "offsets")  # type: ignore[arg-type]


CONTROLS = (", untrained model", ", divided by loss")


def _pairs() -> list[Pair]:
    rows = [("fast", "x{0}."), ("slow", "w{0}e{0}l{0}l then x{0}.")]
    return [Pair(f"say{i % 10}{i}=", text.format(i), str(i), style) for style, text in rows for i in range(12)]


def test_the_finding_stands_next_to_its_controls(plain: Subject) -> None:
    finding = layer_gradients_finding(plain, pairs=_pairs())
    rows = {row[:2]: row for row in finding.tables[0].rows}
    variants = ("own", "irrelevant", "own, untrained model", "irrelevant, untrained model")
    assert {key[1] for key in rows} == set(variants) and len(rows) == 8
    ratios = {row[0]: row for row in finding.tables[1].rows}
    assert ratios["slow / fast"][1] < 0.8 and ratios["slow / fast"][5] == "yes"
    assert abs(ratios["slow / fast, matched tokens"][1] - 1) < abs(ratios["slow / fast"][1] - 1)
    assert {
        "slow / fast, untrained model",
        "slow / fast, untrained model, matched tokens",
        "slow / fast, matched tokens, divided by loss",
        *(f"{name}: irrelevant / own{control}" for name in ("fast", "slow") for control in ("", *CONTROLS)),
    } == set(ratios) - {"slow / fast", "slow / fast, matched tokens"}
    assert any(note.startswith("Warning: slow has") for note in finding.notes)
    assert finding.figures and finding.paper[0].ours
    ranking = next(table for table in finding.tables if table.title == "Examples by gradient: slow")
    assert [row[2] for row in ranking.rows] == sorted((row[2] for row in ranking.rows), reverse=True)
    assert finding.model_dump_json() == layer_gradients_finding(plain, pairs=_pairs()).model_dump_json()


FACTOR = r"×([\d.]+) \[[^]]*\]"


def test_the_answer_has_every_control_beside_its_number(plain: Subject) -> None:
    """The untrained model is matched where the number beside it is, and divided by the loss stands there too."""
    third = [Pair(p.prompt, f"z{p.id}.", p.id, "third") for p in _pairs() if p.condition == "fast"]
    finding = layer_gradients_finding(plain, pairs=[*_pairs(), *third])
    ratios = {row[0]: row[1] for row in finding.tables[1].rows}

    def answered(words: str, names: list[str]) -> bool:
        found = re.search(words, finding.answer)
        return found is not None and [float(x) for x in found.groups()] == pytest.approx(
            [ratios[n] for n in names], 1e-2
        )

    first = (
        rf"^Gradients of slow are {FACTOR} those of fast \(untrained model: {FACTOR}\); with as many scored tokens {FACTOR} "
        rf"\(untrained model: {FACTOR}\), and divided by the loss besides, {FACTOR}\. 1 more contrast is in the table"
    )
    controls = (", untrained model", ", matched tokens", ", untrained model, matched tokens")
    assert answered(first, [f"slow / fast{x}" for x in ("", *controls, ", matched tokens, divided by loss")])
    foreign = rf"fast: {FACTOR} \(untrained model: {FACTOR}; divided by the loss: {FACTOR}\)"
    assert answered(foreign, [f"fast: irrelevant / own{control}" for control in ("", *CONTROLS)])
    alike = "third / fast, divided by loss"
    assert alike in ratios and "third / fast, matched tokens" not in ratios
    finding = layer_gradients_finding(plain, pairs=[p for p in [*_pairs(), *third] if p.condition != "slow"])
    assert answered(
        rf"\(untrained model: {FACTOR}\); divided by the loss, {FACTOR}\.", ["third / fast, untrained model", alike]
    )
    assert "more contrast" not in finding.answer


def test_ratios_divided_by_the_loss_are_those_of_normalised_profiles(plain: Subject) -> None:
    raw, loss = (gradient_profile(plain, _examples(12), normalize=n) for n in (None, "loss"))
    tokens = gradient_profile(plain, _examples(12), normalize="tokens")
    for profile in (raw, tokens, loss):
        found = profile.normalised("loss")
        assert found.normalize == "loss"
        torch.testing.assert_close(found.statistic(), loss.statistic())
    assert torch.equal(raw.normalised("loss").statistic("effective_rank"), raw.statistic("effective_rank"))
    with pytest.raises(ConfigError, match="divided by the loss already"):
        loss.normalised(None)


def test_examples_are_cut_at_the_length_of_training(plain: Subject) -> None:
    """The decoder was trained on 64 tokens; a 65th is only predicted."""
    long = Example.of([i % VOCAB for i in range(90)], 60, "long")
    assert gradient_profile(plain, [long]).targets_n.tolist() == [5]
    assert gradient_profile(plain, [long], max_length=80).targets_n.tolist() == [20]
    pairs = [Pair("a" * 60, "bcd" * 10, "1"), Pair("a" * 50, "cd", "2")]
    assert not any("longer than the" in note for note in layer_gradients_finding(plain, pairs=pairs).notes)
    beyond = layer_gradients_finding(plain, pairs=pairs, max_length=70)
    assert "Examples longer than the 64 tokens that the model was trained on: 1." in beyond.notes


def test_a_model_without_finite_gradients_has_a_finding_that_says_so(plain: Subject) -> None:
    plain.embedding().weight.data.fill_(torch.nan)
    finding = layer_gradients_finding(plain, pairs=_pairs())
    assert any(
        "gradients are not finite and were left out: example 0, blocks.0.mixer.w_q" in note for note in finding.notes
    )
    assert finding.tables[1].rows[0][1] is None and "no gradient to compare" in finding.answer


def test_equal_lengths_need_no_matching(plain: Subject) -> None:
    pairs = [
        Pair(p.prompt, p.response if p.condition == "fast" else p.response[::-1], p.id, p.condition) for p in _pairs()
    ]
    pairs = [p if p.condition == "fast" else Pair(p.prompt, f"y{p.id}.", p.id, "other") for p in pairs]
    finding = layer_gradients_finding(plain, pairs=pairs)
    assert not any("matched" in str(row[0]) for row in finding.tables[1].rows)
    assert not any(note.startswith("Warning") for note in finding.notes)


def test_the_finding_reads_files_and_texts(plain: Subject, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": p.prompt, "response": p.response, "kind": p.condition}) + "\n" for p in _pairs())
    )
    finding = layer_gradients_finding(plain, pairs=path, conditions="kind", modules="all", normalize="tokens")
    ratios = {row[0]: row for row in finding.tables[1].rows}
    assert ratios["slow / fast"][5] == "no"  # without ids of their own, rows are told apart by their lines
    assert any("normalised by tokens" in note for note in finding.notes)
    alone = layer_gradients_finding(plain, ["some words to part", "and some more of them"])
    assert [row[0] for row in alone.tables[0].rows] == ["all pairs"] * 4
    with pytest.raises(DataError, match="needs pairs"):
        layer_gradients_finding(plain)
    with pytest.raises(DataError, match="some pairs have no condition"):
        layer_gradients_finding(plain, pairs=[Pair("a", "bc", "1", "x"), Pair("a", "bc", "2")])


def test_ratios(plain: Subject) -> None:
    profile = gradient_profile(plain, _examples(12))
    same = ratio_of(profile, profile)
    assert (same.value, same.low, same.high, same.n, same.paired) == (1.0, 1.0, 1.0, 12, True)
    few = gradient_profile(plain, _examples(3))
    assert ratio_of(few, few).low is None
