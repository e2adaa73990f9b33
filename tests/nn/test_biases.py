"""Biases of positions: each against plain loops in double precision, then what a bias must keep to inside attention."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchstone.nn.attention import core
from torchstone.nn.attention.mask import CAUSAL
from torchstone.nn.attention.observe import observe
from torchstone.nn.context import BuildContext
from torchstone.nn.initialisation import generator_for
from torchstone.nn.position import reference
from torchstone.nn.position.alibi import alibi_slopes
from torchstone.nn.position.base import BiasedPosition, Offsets, Position, PositionContext
from torchstone.nn.span import Span
from torchstone.optim.groups import decay_rules, split_parameters
from torchstone.recipe.registry import kinds, parse_part

LENGTH, TRAINED, HEADS = 20, 16, 6


def offsets(length: int = LENGTH, position: Tensor | None = None) -> Offsets:
    index = torch.arange(length)
    return Offsets(index[:, None] - index, index if position is None else position)


def build(kind: str, heads: int = HEADS, processed: bool = False, seed: int = 0) -> Any:
    """A position with the starting values of its own."""
    position = parse_part("position", kind).build(PositionContext(8, heads, TRAINED, processed))  # type: ignore[attr-defined]
    return start(position, seed)


@torch.no_grad()
def start(module: torch.nn.Module, seed: int = 0) -> Any:
    """Starting values where a module declares them, and N(0, 0.3²) elsewhere."""
    own = {}
    for prefix, part in module.named_modules():
        for name, fill in getattr(part, "own_initialisation", dict)().items():
            own[f"{prefix}.{name}".lstrip(".")] = fill
    for name, parameter in module.named_parameters():
        fill = own.get(name, lambda value, generator: value.normal_(0.0, 0.3, generator=generator))
        fill(parameter, generator_for(seed, name))
    return module


BIASED = [kind for kind in kinds("position") if build(kind).biased]
every_bias = pytest.mark.parametrize("kind", BIASED)


def expected(position: Any, kind: str) -> Tensor:
    weights = {name: value.detach() for name, value in position.named_parameters()}
    if kind == "alibi":
        return reference.alibi(HEADS, LENGTH)
    if kind == "kerple":
        return reference.kerple(weights["p"].tolist(), weights["a"].tolist(), LENGTH)
    return reference.fire(weights, TRAINED // 2, position.network.leak, LENGTH)


@pytest.mark.parametrize("processed", [False, True])
@every_bias
def test_equals_the_plain_loops(kind: str, processed: bool) -> None:
    position = build(kind, processed=processed)
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    with torch.no_grad():
        if kind == "fire":
            position.m.fill_(-0.8)  # only its size counts
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12 if kind != "alibi" else 1e-6)):
        bias = position.to(dtype).bias(offsets())
        assert bias.shape == (HEADS, LENGTH, LENGTH) and isinstance(position, BiasedPosition)
        torch.testing.assert_close(
            bias.double()[:, visible], expected(position, kind)[:, visible], atol=tolerance, rtol=tolerance
        )
        hidden = bias.masked_fill(visible, 0.0)
        torch.testing.assert_close(hidden, bias[:, :1, :1].expand_as(hidden).masked_fill(visible, 0.0))


def test_slopes() -> None:
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    assert alibi_slopes(12) == alibi_slopes(8) + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]


@pytest.mark.parametrize("heads", [1, 3, 8, 12, 14])
def test_slopes_are_those_of_bloom(heads: int) -> None:
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]  # slope · 1
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs)


def test_kerple_projects_in_place_and_lets_the_gradient_through() -> None:
    position = build("kerple")
    with torch.no_grad():
        position.a[0], position.p[1] = -0.5, 0.001
    stored = position.a
    first = position.bias(offsets())
    assert position.a is stored
    assert position.a[0].item() == pytest.approx(0.01) and position.p[1].item() == pytest.approx(0.01)
    second = position.bias(offsets())  # between a forward and its backward pass
    (first + second).sum().backward()
    assert (position.a.grad != 0).all() and (position.p.grad != 0).all()
    assert position.a.grad[0] < 0  # a larger a makes the bias more negative
    with torch.inference_mode():
        position.bias(offsets())


def test_starting_values() -> None:
    kerple = build("kerple", heads=400)
    assert kerple.p.min() >= 0 and 1.8 < kerple.p.max() <= 2 and kerple.p.mean().item() == pytest.approx(1, abs=0.1)
    assert kerple.a.min() >= 0 and 0.9 < kerple.a.max() <= 1
    fire = build("fire", heads=400)
    assert fire.c.item() == pytest.approx(0.1) and fire.m.item() == 1 and fire.threshold == TRAINED // 2
    assert fire.network.hidden_weight.shape == (32, 1) and 0.5 < fire.network.hidden_weight.abs().max() <= 1
    assert fire.network.out_weight.abs().max() <= 32**-0.5


def test_a_processor_makes_fire_leak() -> None:
    assert build("fire").network.leak == 0 and build("fire", processed=True).network.leak == 0.01


def test_what_is_not_decayed() -> None:
    for kind, spared in (("kerple", {"p", "a"}), ("fire", {"c", "m", "network.hidden_bias", "network.out_bias"})):
        position = build(kind)
        free = {id(value) for value in split_parameters(position, decay_rules(position))["no_decay"]}
        assert {name for name, value in position.named_parameters() if id(value) in free} == spared


@every_bias
def test_half_precision_does_not_reach_the_bias(kind: str) -> None:
    position = build(kind)
    last = torch.tensor([2999])
    far = Offsets(last[:, None] - torch.arange(3000), last)
    exact = position.bias(far).detach()
    half = copy.deepcopy(position).to(torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in half.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = half.bias(far)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, exact)
    steps = exact[:, -1, :-1] != exact[:, -1, 1:]
    assert steps.float().mean() > 0.99  # neighbours are told apart, as they would not be in bf16


def test_fire_goes_by_position_in_the_document() -> None:
    position = build("fire")
    restarted_bt = torch.cat([torch.arange(12), torch.arange(8)])[None]
    packed = position.bias(offsets(20, restarted_bt))
    assert packed.shape == (1, HEADS, 20, 20)
    alone = position.bias(offsets(8))
    torch.testing.assert_close(packed[0, :, 12:, 12:], alone)
    straight = position.bias(offsets(20))
    torch.testing.assert_close(packed[0, :, :12, :12], straight[:, :12, :12])
    assert (packed[0, :, 19, 12:] - straight[:, 19, 12:]).abs().max() > 1e-4


@pytest.mark.parametrize("processed", [False, True])
def test_fire_for_given_positions_equals_the_network_of_every_score(processed: bool) -> None:
    """Documents of several lengths, windows of a long text, and rows that have nothing in common."""
    position = build("fire", processed=processed).double()
    packed = torch.stack([torch.cat([torch.arange(n) for n in parts]) for parts in ((12, 8), (3, 16, 1), (20,))])
    index = torch.arange(20)
    late = Offsets(torch.arange(12, 20)[:, None] - index, packed[:, 12:])
    ring = Offsets(torch.tensor([[3, 2, 1, 0, 4]]), torch.tensor([[1000], [3], [70]]))
    for given in (offsets(20, packed), offsets(20, 37 * torch.arange(60).view(3, 20)), late, ring):
        found = position.bias(given)
        direct = position._direct(given.distance_ts.clamp_min(0), given.position).transpose(0, 1)
        assert found.shape == (3, HEADS, *given.distance_ts.shape)
        torch.testing.assert_close(found, direct, atol=1e-12, rtol=1e-12)
        cotangent = torch.randn(found.shape, generator=generator_for(1, "cotangent"), dtype=torch.float64)
        gradients = [torch.autograd.grad(bias, list(position.parameters()), cotangent) for bias in (found, direct)]
        for left, right in zip(*gradients, strict=True):
            torch.testing.assert_close(left, right, atol=1e-10, rtol=1e-10)


def test_fire_runs_its_network_once_for_every_position_that_occurs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchstone.nn.position.fire import FIRENetwork

    seen = []
    original = FIRENetwork.forward
    monkeypatch.setattr(FIRENetwork, "forward", lambda self, u_n: seen.append(u_n.numel()) or original(self, u_n))
    restarted_bt = torch.cat([torch.arange(12), torch.arange(8)]).expand(50, -1)
    build("fire").bias(offsets(20, restarted_bt))
    assert seen == [12 * 20]


def test_distances_beyond_the_table_touch_no_key_that_is_seen() -> None:
    """A state may hold a key far behind a late query, which the window hides."""
    position = build("fire")
    far = torch.tensor([[4000, 3, 2, 1, 0]])
    found = position.bias(Offsets(far, torch.tensor([[4000]])))
    direct = position._direct(far, torch.tensor([[4000]])).transpose(0, 1)
    torch.testing.assert_close(found[..., 1:], direct[..., 1:])
    assert found.isfinite().all()


def test_fire_in_pieces_equals_fire_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchstone.nn.position import fire

    position = build("fire")
    whole = position.bias(offsets())
    monkeypatch.setattr(fire, "LARGEST_CHUNK", 32 * 7)
    with torch.no_grad():
        torch.testing.assert_close(position.bias(offsets()), whole)


MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"kind": "attention", "heads": 4, "kv_heads": 2},
    "window": {"kind": "attention", "heads": 4, "window": 5},
    "v1 flash": {"kind": "differential", "heads": 4, "kv_heads": 2, "head_dim": 8},
    "v1 naive": {"kind": "differential", "heads": 4, "kv_heads": 2, "head_dim": 8, "kv_pairing": "naive"},
    "v2": {"kind": "differential", "version": "v2", "heads": 4, "kv_heads": 2},
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


def mixer_of(name: str, kind: str) -> Any:
    part = parse_part("mixer", {**MIXERS[name], "position": kind})
    return start(part.build(BuildContext(32, 8, 2, 1, 10, TRAINED)))  # type: ignore[attr-defined]


def tokens(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(rows, length, 32, generator=generator_for(0, "tokens"))


@every_bias
@every_mixer
def test_both_maps_of_a_head_share_its_bias(name: str, kind: str) -> None:
    """What the scores hold beyond q·k is the bias of the head to which the map belongs."""
    mixer = mixer_of(name, kind)
    with observe(mixer) as record, torch.no_grad():
        mixer(tokens(), Span())
        bias = mixer.position.bias(offsets())
    seen = record[""]
    added = seen.scores - seen.q @ seen.k.mT * mixer.scale
    if mixer.maps == mixer.heads:
        heads = list(range(4))
    else:
        heads = [0, 1, 2, 3, 0, 1, 2, 3] if name == "v1 flash" else [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(added, bias[heads].expand_as(added), atol=1e-4, rtol=1e-4)


@every_bias
@every_mixer
def test_every_path_agrees(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocked, fused, eager: outputs and gradients, those of the bias included."""
    mixer, x_btd = mixer_of(name, kind), tokens().requires_grad_()
    found: dict[str, list[Tensor]] = {}
    for path in ("blocked", "fused", "eager"):
        monkeypatch.setattr(core, "_blocked", lambda *given, path=path: path == "blocked")
        if path == "eager":
            with observe(mixer):
                out = mixer(x_btd, Span())[0]
        else:
            out = mixer(x_btd, Span())[0]
        inputs = [x_btd, *mixer.parameters()]
        found[path] = [out.detach(), *torch.autograd.grad(out.pow(3).sum(), inputs)]
    largest = max(float(value.abs().max()) for value in found["eager"])
    for path in ("blocked", "fused"):
        for left, right in zip(found[path], found["eager"], strict=True):
            torch.testing.assert_close(left, right, atol=1e-6 * largest, rtol=1e-4)


@every_bias
@torch.no_grad()
def test_long_windows_decode_in_a_ring(kind: str) -> None:
    """Far beyond the window, one token and several at a time, in a cache of the window's size."""
    mixer, x_btd = mixer_of("window", kind), tokens(1, 40)
    whole = mixer(x_btd, Span())[0]
    for pieces in ([1] * 40, [11, 1, 1, 7, 1, 19]):
        state = mixer.new_state(1, 40, "cpu", torch.float32)
        steps = [mixer(part, Span(), state)[0] for part in x_btd.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layers_share_a_bias_without_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchstone.models.decoder import DecoderConfig
    from torchstone.nn.position.alibi import ALiBi

    made = []
    original = ALiBi.bias
    monkeypatch.setattr(ALiBi, "bias", lambda self, given: made.append(1) or original(self, given))
    block = {"mixer": {"kind": "attention", "position": "alibi"}}
    model = DecoderConfig.model_validate({"width": 32, "depth": 3, "head_dim": 8, "block": block}).build(11, 8, 0)
    model(torch.zeros(1, 8, dtype=torch.long))
    assert len(made) == 1


def test_positions_without_a_bias_cost_nothing() -> None:
    for kind in kinds("position"):
        if kind not in BIASED:
            assert build(kind).bias(offsets()) is None


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("kind", kinds("position"))
def test_every_position_builds_from_a_context(kind: str, processed: bool) -> None:
    position = build(kind, processed=processed)
    assert isinstance(position, Position)
    weight = torch.randn(2 * 8, 3, generator=generator_for(0, "weight"))
    assert torch.equal(position.arrange(weight).sort(0).values, weight.sort(0).values)
    bias = position.bias(offsets())
    assert (bias is not None) == position.biased and (bias is None or bias.shape == (HEADS, LENGTH, LENGTH))


# Half types --------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("given", ["autocast", "bf16"])
def test_the_fused_kernel_keeps_a_far_bias_fine(given: str, key_heads: int, learned: bool) -> None:
    """Around -512 neighbours in bf16 are 4 apart: a rounded bias would decide the maps."""
    length, bf16 = 40, torch.bfloat16
    q, k, v = (
        torch.randn(2, heads, length, 8, generator=generator_for(0, name)).to(bf16)
        for name, heads in (("q", 4), ("k", key_heads), ("v", key_heads))
    )
    far = torch.randn(1, 4, length, length, generator=generator_for(0, "bias")) - 512
    exact = far.double().requires_grad_()
    keys, values = (x.double().repeat_interleave(4 // key_heads, dim=1) for x in (k, v))
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = (q.double() @ keys.mT * 0.35 + exact).masked_fill(hidden, -torch.inf).softmax(-1) @ values
    bias: Any = SimpleNamespace(whole=lambda: far.requires_grad_(learned))
    with torch.autocast("cpu", dtype=bf16, enabled=given == "autocast"):
        inputs = (q, k, v) if given == "bf16" else (q.float(), k.float(), v.float())
        found = core.fused_attention(*inputs, CAUSAL, 0.35, 0.0, bias)
    assert found.dtype == bf16
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.01)
    if learned:
        cotangent = torch.randn(found.shape, generator=generator_for(0, "cotangent"))
        (ours,) = torch.autograd.grad(found.float(), far, cotangent)
        (theirs,) = torch.autograd.grad(expected, exact, cotangent.double())
        torch.testing.assert_close(ours.double(), theirs, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("kind", ["alibi", "kerple", "fire"])
@torch.no_grad()
def test_fp64_queries_agree_with_the_eager_core(kind: str) -> None:
    """Biases are fp32 whatever the queries are; a kernel that takes both as they come misreads the bias."""
    context = BuildContext(width=32, head_dim=8, depth=2, layer=1, vocab_size=10, length=16)
    mixer = parse_part("mixer", {"kind": "attention", "position": kind}).build(context).double().eval()  # type: ignore[attr-defined]
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_btd = torch.randn(2, 16, 32, dtype=torch.float64)
    fast, _ = mixer(x_btd, Span())
    with observe(mixer):
        eager, _ = mixer(x_btd, Span())
    torch.testing.assert_close(fast, eager, atol=1e-10, rtol=1e-10)
