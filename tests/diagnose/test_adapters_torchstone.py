"""torchstone decoders of every kind of attention: what a subject shows and does is what the decoder computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_recipe
from torch import Tensor

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.adapters.rotation import rotate
from torchstone.diagnose.subject import Activations, AttentionLayer, Subject
from torchstone.errors import ConfigError, DataError
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.attention.observe import observe
from torchstone.train.run import train

V1 = {"kind": "differential", "version": "v1", "heads": 4, "kv_heads": 2, "head_dim": 8}
MIXERS: dict[str, dict[str, Any]] = {
    "plain": {"kind": "attention"},
    "half": {"kind": "attention", "position": {"kind": "rotary", "layout": "half", "base": 100.0}},
    "grouped, normed": {"kind": "attention", "heads": 4, "kv_heads": 2, "qk_norm": True},
    "window": {"kind": "attention", "window": 5},
    "output norm": {"kind": "attention", "output_norm": True},
    "partial": {"kind": "attention", "position": {"kind": "rotary", "variant": "partial", "p": 0.5, "layout": "half"}},
    "p": {"kind": "attention", "position": {"kind": "rotary", "variant": "p", "p": 0.5}},
    "none": {"kind": "attention", "position": {"kind": "none"}},
    "alibi": {"kind": "attention", "position": {"kind": "alibi"}},
    "dape": {"kind": "attention", "position": {"kind": "alibi"}, "score_processor": {"kind": "dape"}},
    "differential v1": V1,
    "differential v1 naive": {**V1, "kv_pairing": "naive"},
    "differential v2": {**V1, "version": "v2"},
}
mixers = pytest.mark.parametrize("mixer", MIXERS)


def decoder(mixer: dict[str, Any], **changes: Any) -> Decoder:
    """A decoder whose gains and other vectors are not 1 and 0."""
    config = DecoderConfig(width=32, depth=2, head_dim=8, block={"mixer": mixer}, **changes)
    model = config.build(48, 64, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise
    return model


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    """One subject a mixer."""
    return {name: open_subject(decoder(mixer)) for name, mixer in MIXERS.items()}


def looked(subject: Subject, tokens_bt: Tensor, **options: Any) -> list[tuple[AttentionLayer, Activations]]:
    """All that a visit shows."""
    seen: list[tuple[AttentionLayer, Activations]] = []
    subject.visit(tokens_bt, lambda layer, activations: seen.append((layer, activations)), **options)
    return seen


@mixers
def test_a_visit_shows_what_observation_records_and_changes_nothing(
    mixer: str, subjects: dict[str, Subject], tokens_bt: Tensor
) -> None:
    subject = subjects[mixer]
    before = subject.logits(tokens_bt)
    seen, without = looked(subject, tokens_bt, weights=True), looked(subject, tokens_bt)
    with torch.no_grad(), observe(subject.model) as record:
        subject.model(tokens_bt)
    assert len(seen) == len(without) == 2
    for (layer, maps), (same, plain) in zip(seen, without, strict=True):
        expected = record[layer.name]
        assert same is layer and plain.weights_bhts is None
        torch.testing.assert_close(maps.weights_bhts, expected.weights)
        for activations in (maps, plain):
            torch.testing.assert_close(activations.q_bhtd, expected.q)
            torch.testing.assert_close(activations.k_bhsd, expected.k)
            torch.testing.assert_close(activations.v_bhse, expected.v)
            torch.testing.assert_close(activations.heads_bthe, expected.heads, rtol=1e-4, atol=1e-5)
            assert activations.scale == 8**-0.5
            assert activations.maps_per_head == (2 if "differential" in mixer else 1)
            assert activations.q_bhtd.shape[1] == activations.maps_per_head * layer.heads
    torch.testing.assert_close(subject.logits(tokens_bt), before, rtol=0, atol=0)
    assert all(not vars(layer.mixer).get("_attend") and layer.mixer.observation is None for layer, _ in seen)


@mixers
def test_heads_through_the_output_projection_are_the_mixers_output(
    mixer: str, subjects: dict[str, Subject], tokens_bt: Tensor
) -> None:
    subject = subjects[mixer]
    outputs: list[Tensor] = []
    modules = [subject.model.get_submodule(layer.name) for layer in subject.layers]
    handles = [m.register_forward_hook(lambda m, a, y: outputs.append(y[0])) for m in modules]
    seen = looked(subject, tokens_bt)
    for handle in handles:
        handle.remove()
    for (layer, activations), output_btw in zip(seen, outputs, strict=True):
        projection = layer.projection("o")
        assert dict(subject.model.named_parameters())[projection.parameter] is projection.module.weight
        torch.testing.assert_close(activations.heads_bthe.flatten(2) @ projection.weight().T, output_btw)
        by_head = torch.einsum("hwe,bthe->btw", layer.weights().o_hwe, activations.heads_bthe.double())
        torch.testing.assert_close(by_head.float(), output_btw, rtol=1e-5, atol=1e-5)


@mixers
def test_weights_and_rotation_give_the_recorded_queries_keys_and_values(
    mixer: str, subjects: dict[str, Subject], tokens_bt: Tensor
) -> None:
    subject = subjects[mixer]
    streams = subject.hidden_states(tokens_bt)
    for layer, activations in looked(subject, tokens_bt, layers=[0]):
        weights = layer.weights()
        x_btw = streams[0].double()
        x_btw = x_btw / (x_btw.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        repeats = activations.q_bhtd.shape[1] // weights.k_gdw.shape[0]
        turned = layer.rotation is not None
        assert turned == (mixer not in ("none", "alibi", "dape"))
        for rows, recorded in (
            (weights.q_hdw, activations.q_bhtd),
            (weights.k_gdw.repeat_interleave(repeats, dim=0), activations.k_bhsd),
        ):
            expected = torch.einsum("hdw,btw->bhtd", rows, x_btw)
            if turned:
                expected = rotate(expected, layer.rotation.frequencies_m, torch.arange(20))
            if weights.normalised_qk:
                scale = (recorded.norm(dim=-1) / expected.norm(dim=-1)).unsqueeze(-1)
                expected = expected * scale
            torch.testing.assert_close(expected, recorded.double(), rtol=1e-4, atol=1e-4)
        v_bhte = torch.einsum("gew,btw->bgte", weights.v_gew, x_btw)
        v_bhte = v_bhte[:, [layer.kv_of(head) for head in range(layer.heads)]]
        torch.testing.assert_close(v_bhte, activations.v_bhse.double(), rtol=1e-4, atol=1e-4)
        assert weights.normalised_qk == (mixer == "grouped, normed")


def test_rotation_is_read_from_the_position_part(subjects: dict[str, Subject]) -> None:
    ladder = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    rotation = subjects["plain"].layers[0].rotation
    assert rotation is not None and rotation.base == 10000.0 and "interleaved" in rotation.description
    torch.testing.assert_close(rotation.frequencies_m, ladder)
    kept = subjects["p"].layers[0].rotation
    assert kept is not None
    torch.testing.assert_close(kept.frequencies_m, torch.cat([ladder[:2], torch.zeros(2, dtype=torch.float64)]))
    assert subjects["window"].layers[0].window == 5 and subjects["plain"].layers[0].window is None


@mixers
def test_zero_ablation_of_all_heads_takes_attention_away(
    mixer: str, subjects: dict[str, Subject], tokens_bt: Tensor
) -> None:
    subject = subjects[mixer]
    before, state = subject.logits(tokens_bt), {n: p.clone() for n, p in subject.model.state_dict().items()}
    every = [(layer.index, head) for layer in subject.layers for head in range(layer.heads)]
    with subject.ablate(every, "zero"):
        ablated = subject.logits(tokens_bt)
        assert all(not a.heads_bthe.any() for _, a in looked(subject, tokens_bt))
    without = {name: torch.zeros_like(p) if "w_o" in name else p for name, p in state.items()}
    torch.testing.assert_close(ablated, _functional(subject.model, without, tokens_bt))
    torch.testing.assert_close(subject.logits(tokens_bt), before, rtol=0, atol=0)


def _functional(model: Any, state: dict[str, Tensor], tokens_bt: Tensor) -> Tensor:
    kept = {name: p.clone() for name, p in model.state_dict().items()}
    model.load_state_dict(state)
    try:
        return model.logits(model(tokens_bt).hidden_btd)
    finally:
        model.load_state_dict(kept)


@mixers
@pytest.mark.parametrize("mode", ["mean", "window"])
def test_ablated_heads_are_those_computed_by_hand(
    mixer: str, mode: Any, subjects: dict[str, Subject], tokens_bt: Tensor
) -> None:
    subject = subjects[mixer]
    options = {"window": 3} if mode == "window" else {}
    (layer, plain), *_ = looked(subject, tokens_bt, weights=True)
    with subject.ablate([(0, 1), (0, 3)], mode, **options):
        (_, ablated), *_ = looked(subject, tokens_bt)
        (_, with_maps), *_ = looked(subject, tokens_bt, weights=True)
    torch.testing.assert_close(ablated.heads_bthe, with_maps.heads_bthe, rtol=1e-4, atol=1e-6)
    others = [0, 2]
    torch.testing.assert_close(ablated.heads_bthe[:, :, others], plain.heads_bthe[:, :, others], rtol=1e-4, atol=1e-6)
    if mode == "mean":
        for head in (1, 3):
            expected = plain.heads_bthe[:, :, head].mean((0, 1)).expand(2, 20, -1)
            torch.testing.assert_close(ablated.heads_bthe[:, :, head], expected)
        return
    narrow = decoder({**MIXERS[mixer], "window": 3})
    (_, expected_all), *_ = looked(open_subject(narrow), tokens_bt, weights=True)
    for head in (1, 3):
        torch.testing.assert_close(
            ablated.heads_bthe[:, :, head], expected_all.heads_bthe[:, :, head], rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            with_maps.weights_bhts[:, head], expected_all.weights_bhts[:, head], rtol=1e-4, atol=1e-6
        )
        assert not torch.allclose(ablated.heads_bthe[:, :, head], plain.heads_bthe[:, :, head], atol=1e-3)
    torch.testing.assert_close(with_maps.weights_bhts[:, others], plain.weights_bhts[:, others])


def test_a_window_wider_than_the_layers_own_changes_nothing(subjects: dict[str, Subject], tokens_bt: Tensor) -> None:
    subject = subjects["window"]
    before = subject.logits(tokens_bt)
    with subject.ablate([(0, 1), (1, 1)], "window", window=9):
        torch.testing.assert_close(subject.logits(tokens_bt), before, rtol=1e-5, atol=1e-5)


def test_decoding_with_a_state_is_ablated_but_not_under_a_window(
    subjects: dict[str, Subject], tokens_bt: Tensor
) -> None:
    subject = subjects["plain"]
    with torch.no_grad(), subject.ablate([(0, 1)], "zero"):
        state = subject.model.new_state(2, 20)
        steps = [subject.model(tokens_bt[:, [t]], state=state).hidden_btd for t in range(20)]
        torch.testing.assert_close(torch.cat(steps, 1), subject.hidden_states(tokens_bt)[-1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="met a decoding state"), subject.ablate([(0, 1)], "window", window=3):
        subject.model(tokens_bt, state=subject.model.new_state(2, 20))


def test_ablations_nest_and_end_on_errors(subjects: dict[str, Subject], tokens_bt: Tensor) -> None:
    subject = subjects["differential v1"]
    before = subject.logits(tokens_bt)
    with subject.ablate([(0, 1), (1, 2)], "window", window=4):
        both = subject.logits(tokens_bt)
    with subject.ablate([(0, 1)], "window", window=4), subject.ablate([(1, 2)], "window", window=4):
        torch.testing.assert_close(subject.logits(tokens_bt), both, rtol=0, atol=0)

    def stop(layer: AttentionLayer, activations: Activations) -> None:
        raise RuntimeError("stop")

    for weights in (False, True):
        with pytest.raises(RuntimeError, match="stop"), subject.ablate([(0, 1)], "window", window=4):
            subject.visit(tokens_bt, stop, weights=weights)
    torch.testing.assert_close(subject.logits(tokens_bt), before, rtol=0, atol=0)
    mixer = subject.layers[0].mixer
    assert mixer.window is None and mixer.observation is None and "_attend" not in vars(mixer)
    assert not mixer.w_o._forward_pre_hooks and not mixer._forward_pre_hooks


def test_looking_may_run_the_model_again(subjects: dict[str, Subject], tokens_bt: Tensor) -> None:
    subject = subjects["grouped, normed"]
    losses: list[Tensor] = []
    for weights in (False, True):
        subject.visit(tokens_bt, lambda layer, activations: losses.append(subject.losses(tokens_bt)), weights=weights)
    assert len(losses) == 4
    torch.testing.assert_close(losses, [subject.losses(tokens_bt)] * 4)


@mixers
def test_losses_hidden_states_and_head_belong_together(
    mixer: str, subjects: dict[str, Subject], tokens_bt: Tensor, monkeypatch: Any
) -> None:
    subject = subjects[mixer]
    logits, states = subject.logits(tokens_bt), subject.hidden_states(tokens_bt)
    assert len(states) == 4 and logits.requires_grad and not states[0].requires_grad
    torch.testing.assert_close(states[0], subject.embedding()(tokens_bt))
    torch.testing.assert_close(states[-1] @ subject.head_weight().T, logits)
    monkeypatch.setattr("torchstone.diagnose.adapters.losses.CHUNK_LOGITS", 48 * 7)
    expected = F.cross_entropy(logits[:, :-1].mT, tokens_bt[:, 1:], reduction="none")
    torch.testing.assert_close(subject.losses(tokens_bt), expected)
    torch.testing.assert_close(subject.losses(tokens_bt, last=5), expected[:, -5:])


def test_untrained_decoders_are_fresh_and_repeatable(subjects: dict[str, Subject]) -> None:
    subject = subjects["plain"]
    state = torch.random.get_rng_state()
    one, same, other = subject.untrained(1), subject.untrained(1), subject.untrained(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    trained, *fresh = (s.layers[0].projection("q").weight() for s in (subject, one, same, other))
    assert (
        torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2]) and not torch.equal(fresh[0], trained)
    )


def test_tied_and_own_heads(tokens_bt: Tensor) -> None:
    for tied in (True, False):
        subject = open_subject(decoder({"kind": "attention"}, head={"kind": "linear", "tied": tied}))
        assert subject.tied is tied
        assert torch.equal(subject.head_weight(), subject.embedding().weight) is tied


def test_a_head_that_is_not_linear_has_no_matrix(tokens_bt: Tensor) -> None:
    subject = open_subject(decoder({"kind": "attention"}, head={"kind": "mixture-of-softmaxes"}))
    assert subject.losses(tokens_bt).isfinite().all()
    with pytest.raises(ConfigError, match="mixture.* is not linear"):
        subject.head_weight()


def test_activations_that_are_not_finite_are_reported_with_their_place(tokens_bt: Tensor) -> None:
    model = decoder({"kind": "attention"})
    model.blocks[1].mixer.w_v.weight.data[9, 0] = torch.nan
    with pytest.raises(DataError, match=r"layer 1 \(blocks.1.mixer\) has values .*token 0 of row 0, head 1"):
        open_subject(model).visit(tokens_bt, lambda layer, activations: None)


@pytest.mark.parametrize(
    ("damage", "place", "origin"),
    [
        (lambda model: model.embed.weight[7:8], "token 1 of row 1", r"the state after embedding \(token 4 of row 1\)"),
        (lambda model: model.blocks[1].mixer.w_v.weight, "token 1 of row 0", "the state after block 1"),
        (lambda model: model.norm.gain[None], "token 1 of row 0", "the state after final norm"),
        (lambda model: model.head.project.weight, "token 1 of row 0", "the output of the output head"),
    ],
)
def test_losses_that_are_not_finite_are_reported_with_their_place(damage: Any, place: str, origin: str) -> None:
    subject = open_subject(decoder({"kind": "attention"}, head={"kind": "linear", "tied": False}))
    tokens = torch.full((2, 8), 3)
    tokens[1, 4] = 7
    damage(subject.model).data[0, 0] = torch.nan
    with pytest.raises(DataError, match=f"loss of nan at {place} of the batch .*not finite first is {origin}"):
        subject.losses(tokens)
    with pytest.raises(DataError, match="at token 6 of row"):  # of those that are asked for
        subject.losses(tokens, last=2)


def test_torchstone_decoders_put_nothing_before_a_text(subjects: dict[str, Subject]) -> None:
    assert subjects["plain"].first_tokens() == []


def test_bad_ablations_are_refused(subjects: dict[str, Subject]) -> None:
    with pytest.raises(ConfigError, match=r"head \(0, 4\) does not exist"), subjects["plain"].ablate([(0, 4)]):
        pass


def test_a_run_directory_is_a_subject(tmp_path: Path) -> None:
    train(tiny_recipe(), tmp_path / "run", progress=lambda state: None)
    subject = open_subject(tmp_path / "run")
    assert subject.architecture == "torchstone decoder" and subject.name == str(tmp_path / "run")
    assert torch.equal(open_subject(tmp_path / "run", step=3).head_weight(), subject.head_weight())
    assert "M parameters" in subject.describe()
    with pytest.raises(ConfigError, match="no tokenizer"):
        subject.encode("text")
    assert subject.decode([1, 2]) == "1 2"
    assert open_subject(tmp_path / "run", dtype=torch.float64).head_weight().dtype == torch.float64
