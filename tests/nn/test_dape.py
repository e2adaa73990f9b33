"""DAPE: what a score may depend on, and that every way of computing it computes the same."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchstone.errors import ConfigError
from torchstone.models.counts import count, memory_estimate
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.attention import dape as dape_part
from torchstone.nn.attention import dape_blocked, processed
from torchstone.nn.attention.dape import DAPE, DAPEConfig
from torchstone.nn.attention.mask import Mask
from torchstone.nn.attention.observe import observe
from torchstone.nn.initialisation import generator_for
from torchstone.nn.span import Span

VOCABULARY, WIDTH, LENGTH, CLOSE = 31, 32, 14, 1e-5
PROCESSOR: dict[str, Any] = {"kind": "dape", "width": 8}
MIXERS: dict[str, dict[str, Any]] = {
    "v2 kerple": {"position": "kerple"},
    "v2 alibi, gqa": {"position": "alibi", "heads": 4, "kv_heads": 2},
    "v2 fire, window": {"position": "fire", "window": 5},
    "v2 rope": {},
    "v2 nope, kernel 5": {"position": "none", "score_processor": {**PROCESSOR, "kernel": 5}},
    "v1 kerple": {"position": "kerple", "score_processor": {**PROCESSOR, "version": "v1"}},
    "v2 on differential v1": {"kind": "differential", "position": "kerple"},
    "v2 on differential v2": {"kind": "differential", "version": "v2", "position": "kerple"},
}
PARITY = {"kind": "attention", "position": "kerple", "score_processor": {**PROCESSOR, "mask_hidden": False}}

every_mixer = pytest.mark.parametrize("name", MIXERS)
both_masks = pytest.mark.parametrize("mask_hidden", [True, False])


def build(mixer: str | dict[str, Any], depth: int = 2, length: int = LENGTH) -> Decoder:
    """A small decoder whose attention is far from uniform."""
    given = MIXERS[mixer] if isinstance(mixer, str) else mixer
    block = {"mixer": {"kind": "attention", "score_processor": PROCESSOR, **given}}
    initial = {"kind": "normal", "std": 0.3, "scale_residual": False}
    config = {"width": WIDTH, "depth": depth, "head_dim": 8, "block": block, "initialisation": initial}
    return DecoderConfig.model_validate(config).build(VOCABULARY, length, 0).eval()


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator_for(1, "tokens"))


def draw(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=generator_for(2, name))


def close(left: Tensor, right: Tensor, tolerance: float = CLOSE) -> None:
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


def dape(maps: int = 3, biased: bool = True, **settings: Any) -> DAPE:
    """A processor in fp64 with its own initial values, larger than they come."""
    processor = DAPE(maps, biased, **{"width": 6, **settings}).double()
    for name, fill in processor.own_initialisation().items():
        fill(processor.get_parameter(name).data, generator_for(3, name))
        processor.get_parameter(name).data.mul_(3)
    return processor


def lower(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


# What a score may depend on -----------------------------------------------------------------------


@both_masks
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_scores_do_not_read_later_keys(kernel: int, mask_hidden: bool) -> None:
    processor = dape(kernel=kernel, mask_hidden=mask_hidden)
    scores, bias = (draw(name, 1, 3, 9, 9).requires_grad_() for name in ("scores", "bias"))
    visible = lower(9)
    out = processor(scores, bias, visible).masked_fill(~visible, 0.0)
    for gradient in torch.autograd.grad((out * draw("cotangent", *out.shape)).sum(), [scores, bias]):
        assert not gradient.triu(1).any()
        assert gradient.tril().count_nonzero() == 3 * 45
    changed = processor(scores + draw("noise", 9, 9).triu(1), bias, visible)
    assert torch.equal(changed.masked_fill(~visible, 0.0), out)


def test_one_score_sees_the_keys_within_reach_of_both_convolutions() -> None:
    processor = dape(kernel=3)
    scores = draw("scores", 1, 3, 12, 12).requires_grad_()
    out = processor(scores, draw("bias", 1, 3, 12, 12), lower(12))
    (gradient,) = torch.autograd.grad(out[0, 0, 11, 5], scores)
    read = gradient.abs().sum((0, 1)).nonzero()
    assert read.tolist() == [[11, key] for key in range(3, 8)]


@pytest.mark.parametrize("name", ["v2 kerple", "v2 rope", "v2 on differential v1"])
@both_masks
def test_model_is_causal(name: str, mask_hidden: bool) -> None:
    model = build({**MIXERS[name], "score_processor": {**PROCESSOR, "mask_hidden": mask_hidden}})
    before = tokens(1)
    after = before.clone()
    after[0, 9] = (after[0, 9] + 1) % VOCABULARY
    left, right = model(before).hidden_btd, model(after).hidden_btd
    close(left[:, :9], right[:, :9], 1e-6)
    assert (left[:, 9:] - right[:, 9:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("kernel", [3, 5])
def test_longer_text_changes_only_the_documented_scores(kernel: int) -> None:
    length, reach = 10, kernel // 2
    scores, bias = draw("scores", 1, 3, 16, 16), draw("bias", 1, 3, 16, 16)
    for mask_hidden in (True, False):
        processor = dape(kernel=kernel, mask_hidden=mask_hidden)
        longer = processor(scores, bias, lower(16))[..., :length, :length]
        shorter = processor(scores[..., :length, :length], bias[..., :length, :length], lower(length))
        differs = ((longer - shorter).abs() > 1e-9).any(1)[0] & lower(length)[0, 0]
        if mask_hidden:
            assert not differs.any()
        else:  # a row reads spilt hidden cells up to `reach` keys beyond its diagonal; only some are in the short text
            changed = {(row, key) for row, key in differs.nonzero().tolist()}
            allowed = {(row, key) for row in range(length) for key in range(row + 1) if key + reach >= length}
            assert changed and changed <= allowed
            assert {key for row, key in changed if row == length - 1} == set(range(length - reach, length))


# Every way of computing it ------------------------------------------------------------------------


@every_mixer
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 4, 1, 3]], ids=["one by one", "pieces"])
@torch.no_grad()
def test_cached_equals_full(name: str, pieces: list[int]) -> None:
    model, tokens_bt = build(name), tokens()
    state = model.new_state(2, LENGTH)
    parts = [model(part, state=state).hidden_btd for part in tokens_bt.split(pieces, dim=1)]
    close(torch.cat(parts, dim=1), model(tokens_bt).hidden_btd)


@every_mixer
def test_packed_equals_separate(name: str) -> None:
    model, tokens_bt = build(name), tokens(1)
    parts = [model(part).hidden_btd for part in tokens_bt.split([6, 1, 7], dim=1)]
    documents_bt = torch.tensor([[0] * 6 + [1] + [2] * 7])
    positions_bt = torch.cat([torch.arange(n) for n in (6, 1, 7)])[None]
    packed = model(tokens_bt, Span(positions_bt=positions_bt, documents_bt=documents_bt)).hidden_btd
    close(packed, torch.cat(parts, dim=1))


@every_mixer
def test_padding_changes_nothing(name: str) -> None:
    model, tokens_bt = build(name), tokens()
    valid_bt = torch.ones(2, LENGTH, dtype=torch.bool)
    valid_bt[1, :4] = False
    positions_bt = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) - 4]).clamp(min=0)
    padded = model(tokens_bt, Span(positions_bt=positions_bt, valid_bt=valid_bt)).hidden_btd
    close(padded[1, 4:], model(tokens_bt[1:, 4:]).hidden_btd[0])
    close(padded[0], model(tokens_bt[:1]).hidden_btd[0])
    padded.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_mixer
def test_rows_of_the_batch_do_not_matter_to_each_other(name: str) -> None:
    model, tokens_bt = build(name), tokens(5)
    close(model(tokens_bt).hidden_btd[3:4], model(tokens_bt[3:4]).hidden_btd, 1e-6)


@every_mixer
def test_fast_equals_meaning(name: str) -> None:
    model, tokens_bt = build(name), tokens()
    for span in (None, Span(documents_bt=torch.arange(LENGTH)[None].expand(2, -1) // 5)):
        with observe(model) as record:
            meaning = model(tokens_bt, span).hidden_btd
        fast = model(tokens_bt, span).hidden_btd
        close(fast, meaning)
        seen = record["blocks.1.mixer"]
        assert seen.maps is not None and seen.scores is not None
        close(seen.maps.sum(-1), torch.ones_like(seen.maps[..., 0]))
        hidden = lower(LENGTH) if name != "v2 fire, window" else lower(LENGTH).triu(-4)
        if span is None:
            close(seen.maps, seen.scores.masked_fill(~hidden, -torch.inf).softmax(-1))
        parameters = list(model.parameters())
        gradients = [torch.autograd.grad(hidden.pow(3).sum(), parameters) for hidden in (fast, meaning)]
        for left, right in zip(*gradients, strict=True):
            close(left, right, 1e-4 * max(float(right.abs().max()), 1.0))


OPERATOR_CASES = {  # batch, maps, queries, keys, rows of the bias (0: none), visibility
    "one token": (2, 3, 1, 1, 1, None),
    "several blocks": (3, 2, 70, 70, 1, None),
    "last queries": (2, 2, 40, 90, 1, None),
    "a bias for every row": (2, 2, 33, 33, 2, None),
    "no bias": (2, 2, 70, 70, 0, None),
    "window": (2, 2, 70, 70, 1, "all alike"),
    "documents": (2, 2, 70, 70, 1, "rows"),
    "many rows": (40, 2, 20, 20, 1, "rows"),
}


@both_masks
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_operator_equals_meaning(case: str, kernel: int, mask_hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dape_blocked, "BLOCK_CELLS", 1 << 10)
    b, u, t, s, rows, pattern = OPERATOR_CASES[case]
    processor = dape(u, rows > 0, kernel=kernel, mask_hidden=mask_hidden)
    q, k, v = draw("q", b, u, t, 4), draw("k", b, u, s, 4), draw("v", b, u, s, 5)
    bias = draw("bias", rows, u, t, s) if rows else None
    visible = torch.ones(t, s, dtype=torch.bool).tril(s - t)[None, None]
    allowed = None
    if pattern is not None:
        width = torch.arange(7, 7 + (b if pattern == "rows" else 1))[:, None, None, None]
        visible = allowed = visible & (torch.arange(t)[:, None] + s - t - torch.arange(s) < width)
    inputs = [x.requires_grad_() for x in (q, k, v, bias) if x is not None] + list(processor.parameters())
    scores = processor(0.4 * q @ k.mT, bias, visible)
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
    found = processor.blocked(q, k, v, bias, allowed, 0.4)
    assert found is not None
    close(found, expected, 1e-10)
    cotangent = draw("cotangent", *found.shape)
    for left, right in zip(
        torch.autograd.grad(found, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        close(left, right, 1e-10)


def test_operator_in_fp32_is_close() -> None:
    processor = dape(4, width=32).float()
    q, k, v = (draw(name, 2, 4, 150, 16, dtype=torch.float32).requires_grad_() for name in "qkv")
    bias = draw("bias", 1, 4, 150, 150, dtype=torch.float32).requires_grad_()
    found = processor.blocked(q, k, v, bias, None, 0.25)
    visible = lower(150)
    expected = processor(0.25 * q @ k.mT, bias, visible).masked_fill(~visible, -torch.inf).softmax(-1) @ v
    assert found is not None
    close(found, expected)
    inputs = [q, k, v, bias, *processor.parameters()]
    cotangent = draw("cotangent", *found.shape, dtype=torch.float32) / 150
    for left, right in zip(
        torch.autograd.grad(found, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        close(left, right)


@both_masks
def test_operator_is_declared_correctly(mask_hidden: bool) -> None:
    q, k, v = (draw(name, 2, 2, 40, 4, dtype=torch.float32).requires_grad_() for name in "qkv")
    bias = draw("bias", 1, 2, 40, 40, dtype=torch.float32).requires_grad_()
    conv = [parameter.float() for parameter in dape(2).parameters()]
    torch.library.opcheck(dape_blocked._attention, (q, k, v, bias, None, *conv, 0.5, mask_hidden, True))


@every_mixer
@both_masks
@torch.no_grad()
def test_rows_in_chunks_equal_the_whole(name: str, mask_hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = MIXERS[name].get("score_processor", PROCESSOR)
    if not mask_hidden and processor.get("version") != "v1":
        processor = {**processor, "mask_hidden": False}
    model, tokens_bt = build({**MIXERS[name], "score_processor": processor}).double(), tokens()
    spans = None, Span(documents_bt=torch.arange(LENGTH)[None].expand(2, -1) // 5)
    patterns = Span(allowed_bts=lower(LENGTH)[0, 0])
    for span in (*spans, patterns):
        monkeypatch.undo()
        whole = model(tokens_bt, span).hidden_btd
        monkeypatch.setattr(processed, "CHUNK_SCORES", 2 * 4 * LENGTH * 3)
        monkeypatch.setattr(dape_part, "LARGEST_BLOCK", 3)
        close(model(tokens_bt, span).hidden_btd, whole, 1e-9)
        monkeypatch.setattr(DAPE, "block_rows", lambda *_: None)
        close(model(tokens_bt, span).hidden_btd, whole, 1e-9)


@pytest.mark.parametrize(
    ("position", "batch", "scores", "expected"),
    [
        ("kerple", 1, 1, [32, 32, 6]),  # the operator's own blocks, however little may exist at once
        ("kerple", 5, 4 * 70 * 40, [40, 30]),  # one bias for all rows of the batch
        ("kerple", 5, 4 * 70 * 70, [70]),
        ("none", 5, 1, [70]),  # nothing but blocks is held
    ],
)
@torch.no_grad()
def test_rows_of_the_operator_are_limited_by_the_bias_alone(
    position: str, batch: int, scores: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = build({"position": position}, depth=1, length=70), []
    original = DAPE.blocked
    monkeypatch.setattr(DAPE, "blocked", lambda self, q, *rest: seen.append(q.shape[2]) or original(self, q, *rest))
    monkeypatch.setattr(processed, "CHUNK_SCORES", scores)
    model(tokens(batch, 70))
    assert seen == expected


@torch.no_grad()
def test_a_bias_for_every_row_of_the_batch_counts_as_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build("v2 fire, window", depth=1, length=70), []
    original = DAPE.blocked
    monkeypatch.setattr(DAPE, "blocked", lambda self, q, *rest: seen.append(q.shape[2]) or original(self, q, *rest))
    monkeypatch.setattr(processed, "CHUNK_SCORES", 2 * 4 * 70 * 40)
    model(tokens(2, 70), Span(positions_bt=torch.arange(70).expand(2, -1)))
    assert seen == [40, 30]


@pytest.mark.parametrize("name", ["v2 kerple", "v2 on differential v2"])
def test_compiled_gives_the_same(name: str) -> None:
    model, tokens_bt = build(name, depth=1), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        found = []
        for net in (
            compiled,
            model,
        ):  # one after the other: Kerple bounds its parameters in place at every forward pass
            with context:
                hidden = net(tokens_bt).hidden_btd.float()
            found.append((hidden, *torch.autograd.grad(hidden.pow(2).sum(), list(model.parameters()))))
        for left, right in zip(*found, strict=True):
            close(left, right, 1e-4 * max(float(right.detach().abs().max()), 0.1))


def test_scores_stay_fp32_in_half_precision() -> None:
    model, tokens_bt = build("v2 alibi, gqa", depth=1, length=600), tokens(1, 600)
    exact = model(tokens_bt).hidden_btd
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = model(tokens_bt).hidden_btd
        with observe(model) as record:
            meaning = model(tokens_bt).hidden_btd
    for rough in (fast, meaning, model.to(torch.bfloat16)(tokens_bt).hidden_btd):
        assert (rough - exact).pow(2).mean() < 1e-3 * exact.pow(2).mean()
    scores = record["blocks.0.mixer"].scores
    assert scores is not None and scores.dtype == torch.float32


def test_dropout_acts_in_training() -> None:
    model, tokens_bt = build({"dropout": 0.5, "position": "kerple"}), tokens()
    close(model(tokens_bt).hidden_btd, model(tokens_bt).hidden_btd, 0)
    model.train()
    assert (model(tokens_bt).hidden_btd - model(tokens_bt).hidden_btd).abs().max() > 1e-3


def test_version_1_is_version_2_with_a_kernel_of_1() -> None:
    first = DAPEConfig(version="v1").build(3, True)
    second = DAPEConfig(version="v2", kernel=1).build(3, True)
    second.load_state_dict(first.state_dict())
    scores, bias = (draw(name, 2, 3, 9, 9, dtype=torch.float32) for name in ("scores", "bias"))
    assert torch.equal(first(scores, bias, lower(9)), second(scores, bias, lower(9)))
    x = torch.cat([scores, bias], dim=1).movedim(1, -1)
    hidden = F.leaky_relu(F.linear(x, first.conv1.weight.flatten(1), first.conv1.bias), 0.01)
    residual = F.linear(hidden, first.conv2.weight.flatten(1), first.conv2.bias).movedim(-1, 1)
    close(first(scores, bias, None), scores + bias + residual)


# Settings, initial values, costs ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": 2}, "odd number"),
        ({"kernel": 0}, "odd number"),
        ({"kernel": -3}, "odd number"),
        ({"version": "v1", "kernel": 3}, "version v2"),
        ({"version": "v1", "mask_hidden": False}, "changes nothing"),
        ({"version": "v2", "kernel": 1, "mask_hidden": False}, "changes nothing with kernel 1"),
        ({"width": 0}, "greater than 0"),
        ({"kernel_size": 3}, "kernel_size"),
    ],
    ids=str,
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DAPEConfig.model_validate(settings)


def test_training_beyond_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_bt = build("v2 kerple"), tokens()
    monkeypatch.setattr(processed, "device_bytes", lambda device: 1000)
    with pytest.raises(ConfigError, match=r"materialised scores.*keeps 12,544 bytes"):
        model(tokens_bt)
    with torch.no_grad():
        model(tokens_bt)


def test_all_maps_at_once_need_more_memory_than_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """2·4 maps, 2·8 hidden values and 2·4 inputs for every key, not half of 2·4 + 8."""
    model, tokens_bt = build({"position": "kerple", "dropout": 0.5}), tokens()
    monkeypatch.setattr(processed, "device_bytes", lambda device: 20_000)
    model(tokens_bt)
    message = r"keeps 50,176 bytes"
    with pytest.raises(ConfigError, match=message):
        model(tokens_bt, Span(allowed_bts=lower(LENGTH)[0, 0]))
    with pytest.raises(ConfigError, match=message), observe(model):
        model(tokens_bt)
    with pytest.raises(ConfigError, match=message):
        model.train()(tokens_bt)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_all_maps_at_once_keep_what_the_estimate_says(dropout: float, biased: bool) -> None:
    processor, length, kept = DAPE(4, biased), 64, {}
    q = torch.zeros(2, 4, length, 8)

    def remember(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() >= 2 * length * length:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel(), tensor  # held, so that no address comes twice
        return tensor

    bias = (lambda rows: torch.zeros(1, 4, length, length)[:, :, rows]) if biased else None
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        processed.processed_attention(
            q, q, q, Mask(lower(length), None, causal=False), scale=1.0, difference=None, dropout=dropout,
            observation=None, bias=bias, processor=processor,
        )  # fmt: skip
    total = sum(count for count, _ in kept.values())
    assert total == pytest.approx(2 * length * processor.kept_at_once(length), rel=0.1)


def test_initial_values_are_those_of_torch_convolutions() -> None:
    model = build("v2 kerple", depth=1)
    again = build("v2 kerple", depth=1)
    processor = model.blocks[0].mixer.score_processor
    for conv in (processor.conv1, processor.conv2):
        theirs = torch.nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size)
        bound = (conv.in_channels * 3) ** -0.5
        for parameter in (conv.weight, conv.bias):
            assert float(parameter.detach().abs().max()) <= bound
        assert conv.weight.shape == theirs.weight.shape
        assert float(conv.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)
        assert float(theirs.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    for left, right in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("biased", "kernel", "parameters"), [(True, 3, 3500), (False, 3, 2348), (True, 1, 1196)])
def test_parameters_are_as_published(biased: bool, kernel: int, parameters: int) -> None:
    processor = DAPE(12, biased, kernel=kernel)
    assert sum(parameter.numel() for parameter in processor.parameters()) == parameters
    inputs = 24 if biased else 12
    assert processor.flops(512) == 2 * 512 * kernel * (inputs * 32 + 32 * 12)


@pytest.mark.parametrize("name", [name for name in MIXERS if "fire" not in name])  # whose own network counts as nothing
def test_flops_agree_with_torch(name: str) -> None:
    model, tokens_bt = build(name), tokens()
    with observe(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.logits(model(tokens_bt).hidden_btd)
    assert counter.get_total_flops() == model.flops(LENGTH) * tokens_bt.numel()


@pytest.mark.parametrize("name", [name for name in MIXERS if "differential" not in name and "fire" not in name])
def test_training_flops_of_the_operator_agree_with_torch(name: str) -> None:
    model, tokens_bt = build(name), tokens()
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens_bt).hidden_btd).sum().backward()
    assert counter.get_total_flops() == 3 * model.flops(LENGTH) * tokens_bt.numel()


def test_maps_are_part_of_the_memory_estimate() -> None:
    def estimate(processor: Any, length: int) -> Any:
        block = {"mixer": {"kind": "attention", "position": "kerple", "score_processor": processor}}
        config = DecoderConfig.model_validate({"width": 64, "depth": 3, "head_dim": 16, "block": block})
        return memory_estimate(count(config, 256, length), sequences=2, precision="bf16").activations

    for length in (64, 256):
        maps = estimate("dape", length) - estimate(None, length)
        assert maps == 4 * 3 * 2 * length * ((2 * 4 + 32) * length // 2)


def test_the_operator_keeps_what_the_estimate_says() -> None:
    processor = DAPE(4, True)
    q = torch.zeros(2, 4, 512, 8)
    conv = [parameter.detach() for parameter in processor.parameters()]
    kept = dape_blocked._attention(q, q, q, torch.zeros(1, 4, 512, 512), None, *conv, 1.0, True, True)[1:]
    assert sum(tensor.numel() for tensor in kept) == pytest.approx(2 * 512 * processor.kept_values(512), rel=0.1)
