"""What every mixer promises, checked for every mixer: a new kind adds one line to MIXERS and receives all of it.

What only attention can promise (maps, patterns of visibility, windows) is checked for ATTENTION, the first part of the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.attention.observe import observe
from torchstone.nn.span import Span
from torchstone.optim.groups import decay_rules, split_parameters

ATTENTION: dict[str, dict[str, Any]] = {
    "mha": {"kind": "attention"},
    "gqa": {"kind": "attention", "heads": 4, "kv_heads": 2},
    "mqa window": {"kind": "attention", "kv_heads": 1, "window": 4},
    "mqa window plus one": {
        "kind": "local-attention",
        "window": 3,
        "window_convention": "plus-one",
    },
    "all biases, window": {"kind": "attention", "qkv_bias": True, "output_bias": True, "window": 5},
    "qk norm, half layout": {"kind": "attention", "qk_norm": True, "position": {"kind": "rotary", "layout": "half"}},
    "no position": {"kind": "attention", "position": "none"},
    "output norm, wide": {"kind": "attention", "heads": 6, "head_dim": 8, "output_norm": True},
    "diff v1": {"kind": "differential"},
    "diff v1 gqa flash window": {"kind": "differential", "heads": 4, "kv_heads": 2, "window": 5},
    "diff v1 gqa naive": {"kind": "differential", "heads": 4, "kv_heads": 2, "kv_pairing": "naive"},
    "diff v1 no norm": {"kind": "differential", "head_norm": False, "lambda_init": 0.5},
    "diff v2": {"kind": "differential", "version": "v2"},
    "diff v2 gqa window": {"kind": "differential", "version": "v2", "heads": 4, "kv_heads": 2, "window": 3},
    "p-rope": {"kind": "attention", "position": {"kind": "rotary", "variant": "p", "p": 0.5}},
    "partial rope, half": {
        "kind": "attention",
        "qk_norm": True,
        "position": {"kind": "rotary", "variant": "partial", "p": 0.5, "layout": "half"},
    },
    "alibi gqa": {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "alibi"},
    "kerple window": {"kind": "attention", "window": 5, "position": "kerple"},
    "fire": {"kind": "attention", "position": "fire"},
    "diff v1 kerple": {"kind": "differential", "position": "kerple"},
    "diff v2 fire window": {"kind": "differential", "version": "v2", "position": "fire", "window": 4},
    "dape kerple window": {"kind": "attention", "window": 5, "position": "kerple", "score_processor": "dape"},
    "diff v1 dape": {"kind": "differential", "score_processor": {"kind": "dape", "version": "v1"}},
    "diff v2 gqa dape fire": {
        "kind": "differential",
        "version": "v2",
        "heads": 4,
        "kv_heads": 2,
        "position": "fire",
        "score_processor": "dape",
    },
}
MIXERS: dict[str, dict[str, Any]] = {
    **ATTENTION,
    "moa": {"kind": "moa", "num_experts": 4},
    "moa window": {"kind": "moa", "num_experts": 3, "top_k": 3, "kv_heads": 2, "window": 4},
    "hgrn2": {"kind": "hgrn2"},
    "hgrn2 wide state, no bound": {"kind": "hgrn2", "expand_ratio": 16, "lower_bound": "none", "chunk_size": 4},
    "hgrn2 no state expansion": {"kind": "hgrn2", "expand_ratio": 1},
    "hgrn2 unit": {"kind": "hgrn2", "variant": "unit", "lower_bound": 0.5},
    "hgrn2 recurrent": {"kind": "hgrn2", "mode": "recurrent"},
    "rglru": {"kind": "rglru"},
    "rglru wide": {"kind": "rglru", "lru_width": 48, "num_blocks": 3, "conv_width": 2, "decay_init": "paper"},
}
PATTERNS: dict[str, list[str]] = {
    "RRA": ["rglru", "mqa window plus one", "rglru wide"],
    "H and G": ["hgrn2", "mha"],
}
VOCABULARY, WIDTH, LENGTH, CLOSE = 31, 32, 12, 1e-5

every_attention = pytest.mark.parametrize("name", ATTENTION)
every_mixer = pytest.mark.parametrize("name", MIXERS)
every_model = pytest.mark.parametrize("name", [*MIXERS, *PATTERNS])


def build(name: str, depth: int = 2, seed: int = 0) -> Decoder:
    """A small decoder with the mixer, with weights large enough for attention to be far from uniform."""
    config = DecoderConfig.model_validate(
        {
            "width": WIDTH,
            "depth": max(depth, len(PATTERNS.get(name, []))),
            "head_dim": 8,
            "block": {"mixer": MIXERS.get(name, "attention")},
            "pattern": [MIXERS[part] for part in PATTERNS.get(name, [])],
            "initialisation": {"kind": "normal", "std": 0.3, "scale_residual": False},
        }
    )
    return config.build(VOCABULARY, LENGTH, seed).eval()


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(left: Tensor, right: Tensor, tolerance: float = CLOSE) -> None:
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


@every_model
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [7, 1, 1, 1, 1, 1], [2, 5, 1, 4], [LENGTH]], ids=str)
@torch.no_grad()
def test_parallel_equals_steps(name: str, pieces: list[int]) -> None:
    model, tokens_bt = build(name), tokens()
    state = model.new_state(2, LENGTH)
    parts = [model(piece, state=state).hidden_btd for piece in tokens_bt.split(pieces, dim=1)]
    close(torch.cat(parts, dim=1), model(tokens_bt).hidden_btd)
    assert state.length == LENGTH


@every_model
@torch.no_grad()
def test_causality(name: str) -> None:
    model, tokens_bt = build(name), tokens(batch=1)
    before = model(tokens_bt).hidden_btd
    for index in (0, 5, LENGTH - 1):
        changed = tokens_bt.clone()
        changed[:, index] = (changed[:, index] + 1) % VOCABULARY
        after = model(changed).hidden_btd
        close(after[:, :index], before[:, :index])
        assert (after[:, index] - before[:, index]).abs().max() > 1e-3


@every_model
@torch.no_grad()
def test_documents_are_separate(name: str) -> None:
    model, tokens_bt = build(name), tokens()
    documents_bt = torch.tensor([[0] * 3 + [1] * 5 + [2] * 4, [7] * 9 + [0] * 3])
    positions_bt = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3], [*range(9), 0, 1, 2]])
    packed = model(tokens_bt, Span(positions_bt=positions_bt, documents_bt=documents_bt)).hidden_btd
    for row, cuts in ((0, (0, 3, 8, 12)), (1, (0, 9, 12))):
        for start, stop in zip(cuts, cuts[1:], strict=False):
            alone = model(tokens_bt[row : row + 1, start:stop]).hidden_btd
            close(packed[row : row + 1, start:stop], alone)


@every_model
@torch.no_grad()
def test_documents_step_by_step(name: str) -> None:
    model, tokens_bt = build(name), tokens(batch=1)
    documents_bt = torch.tensor([[4] * 5 + [9] * 7])
    whole = model(tokens_bt, Span(documents_bt=documents_bt)).hidden_btd
    state = model.new_state(1, LENGTH)
    steps = [
        model(tokens_bt[:, t : t + 1], Span(documents_bt=documents_bt[:, t : t + 1]), state).hidden_btd
        for t in range(LENGTH)
    ]
    close(torch.cat(steps, dim=1), whole)


def _left_padded(lengths: list[int]) -> tuple[Tensor, Span]:
    longest = max(lengths)
    index_t, padding_b1 = torch.arange(longest), longest - torch.tensor(lengths)[:, None]
    span = Span(positions_bt=(index_t - padding_b1).clamp_min(0), valid_bt=index_t >= padding_b1)
    return tokens(len(lengths), longest), span


@pytest.mark.parametrize("name", [name for name in MIXERS if "dape" not in name])
def test_left_padded_batch_equals_rows_alone(name: str) -> None:
    _left_padded_equals_alone(build(name), CLOSE)


@every_model
def test_left_padded_batch_equals_rows_alone_in_fp64(name: str) -> None:
    """Where a norm follows processed scores, fp32 rounding is larger than any tolerance that would find a fault."""
    _left_padded_equals_alone(build(name).double(), 1e-10)


@torch.no_grad()
def _left_padded_equals_alone(model: Decoder, tolerance: float) -> None:
    lengths, extra = [3, 8, 1], 4
    tokens_bt, span = _left_padded(lengths)
    more_bt = tokens(3, extra, seed=2)
    state = model.new_state(3, 8 + extra)
    hidden = [model(tokens_bt, span, state).hidden_btd]
    for step in range(extra):
        positions_b1 = torch.tensor(lengths)[:, None] + step
        hidden.append(model(more_bt[:, step : step + 1], Span(positions_bt=positions_b1), state).hidden_btd)
    together = torch.cat(hidden, dim=1)
    for row, length in enumerate(lengths):
        alone = torch.cat([tokens_bt[row : row + 1, 8 - length :], more_bt[row : row + 1]], dim=1)
        close(together[row : row + 1, 8 - length :], model(alone).hidden_btd, tolerance)


@every_attention
@pytest.mark.parametrize("observed", [False, True], ids=["fast", "eager"])
def test_rows_that_see_nothing_are_zero(name: str, observed: bool) -> None:
    model = build(name, depth=1)
    mixer = model.blocks[0].mixer
    x_btd = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    valid_bt = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    if observed:
        with observe(mixer):
            out_btd, _ = mixer(x_btd, Span(valid_bt=valid_bt))
    else:
        out_btd, _ = mixer(x_btd, Span(valid_bt=valid_bt))
    assert torch.equal(out_btd[0, :2], torch.zeros(2, WIDTH))
    assert (out_btd[0, 2:].abs().amax(-1) > 0).all()
    out_btd.pow(2).sum().backward()
    gradients = [x_btd.grad, *(parameter.grad for parameter in mixer.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@every_attention
@torch.no_grad()
def test_pattern_given_explicitly_equals_causal(name: str) -> None:
    model, tokens_bt = build(name), tokens()
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    close(model(tokens_bt, Span(allowed_bts=causal)).hidden_btd, model(tokens_bt).hidden_btd)
    rows_bts = causal.expand(2, LENGTH, LENGTH)
    close(model(tokens_bt, Span(allowed_bts=rows_bts)).hidden_btd, model(tokens_bt).hidden_btd)


@every_attention
@torch.no_grad()
def test_window_equals_masked_pattern(name: str) -> None:
    window = MIXERS[name].get("window", 4)
    model, tokens_bt = build(name), tokens()
    index = torch.arange(LENGTH)
    distance = index[:, None] - index[None, :]
    for block in model.blocks:
        block.mixer.window = None
    expected = model(tokens_bt, Span(allowed_bts=(distance >= 0) & (distance < window))).hidden_btd
    for block in model.blocks:
        block.mixer.window = window
    close(model(tokens_bt).hidden_btd, expected)


@every_attention
def test_observed_equals_fast(name: str) -> None:
    model, tokens_bt = build(name), tokens()
    fast = model(tokens_bt).hidden_btd
    with observe(model) as record:
        eager = model(tokens_bt).hidden_btd
    close(eager, fast)
    assert list(record) == ["blocks.0.mixer", "blocks.1.mixer"]
    seen = record["blocks.0.mixer"]
    assert seen.maps is not None and seen.weights is not None and seen.heads is not None
    close(seen.maps.sum(-1), torch.ones_like(seen.maps[..., 0]))
    assert seen.weights.shape[1] == seen.heads.shape[2]
    gradients = []
    for hidden_btd in (fast, eager):
        gradients.append(torch.autograd.grad(hidden_btd.pow(3).sum(), list(model.parameters())))
    largest = max(float(gradient.abs().max()) for gradient in gradients[1])
    for (parameter, _), left, right in zip(model.named_parameters(), *gradients, strict=True):
        # softmax does not see a constant in the scores: these gradients are 0 but for rounding
        constant = parameter.endswith(("position.network.out_bias", "score_processor.conv2.bias"))
        close(left, right, 1e-6 * largest if constant else 1e-4 * float(right.abs().max()))
    assert model.blocks[0].mixer.observation is None


@every_model
@torch.no_grad()
def test_bf16(name: str) -> None:
    model, tokens_bt = build(name), tokens()
    exact = model(tokens_bt).hidden_btd
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(tokens_bt).hidden_btd
    half = copy.deepcopy(model).to(torch.bfloat16)
    state = half.new_state(2, LENGTH)
    steps = torch.cat([half(tokens_bt[:, t : t + 1], state=state).hidden_btd for t in range(LENGTH)], dim=1)
    for rough in (mixed, half(tokens_bt).hidden_btd, steps):
        assert (rough - exact).pow(2).mean() < 0.01 * exact.pow(2).mean()


@every_attention
def test_flops_agree_with_torch(name: str) -> None:
    model, tokens_bt = build(name), tokens()
    with observe(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.logits(model(tokens_bt).hidden_btd)
    by_module = counter.get_flop_counts()
    biases = sum(sum(found.values()) for module, found in by_module.items() if module.endswith(".position.network"))
    assert counter.get_total_flops() - biases == model.flops(LENGTH) * tokens_bt.numel()
    assert (biases > 0) == any(type(block.mixer.position).__name__ == "FIRE" for block in model.blocks)


@every_model
@torch.no_grad()
def test_copies_and_state_dicts(name: str) -> None:
    model, tokens_bt = build(name), tokens()
    expected = model(tokens_bt).hidden_btd
    close(copy.deepcopy(model)(tokens_bt).hidden_btd, expected, 0)
    other = build(name, seed=5)
    assert (other(tokens_bt).hidden_btd - expected).abs().max() > 1e-3
    other.load_state_dict(model.state_dict())
    close(other(tokens_bt).hidden_btd, expected, 0)


@every_model
@torch.no_grad()
def test_states_branch_by_copying(name: str) -> None:
    model, tokens_bt = build(name), tokens()
    state = model.new_state(2, LENGTH)
    model(tokens_bt[:, :8], state=state)
    branch = copy.deepcopy(state)
    first = model(tokens_bt[:, 8:9], state=state).hidden_btd
    model(tokens_bt[:, 9:10], state=state)
    close(model(tokens_bt[:, 8:9], state=branch).hidden_btd, first)


@every_model
@torch.no_grad()
def test_state_says_when_it_is_full(name: str) -> None:
    model = build(name)
    state = model.new_state(1, 4)
    model(tokens(1, 4), state=state)
    with pytest.raises(ConfigError, match="holds 4 of 4 tokens"):
        model(tokens(1, 1), state=state)


@every_attention
def test_windowed_state_has_constant_size(name: str) -> None:
    model = build(name)
    sizes = [model.new_state(1, capacity).nbytes() for capacity in (100, 200)]
    assert sizes[1] == (sizes[0] if "window" in MIXERS[name] else 2 * sizes[0])


@every_mixer
def test_diagnostics_are_finite(name: str) -> None:
    model = build(name)
    model(tokens())
    found = model.diagnostics()
    assert all(torch.tensor(value).isfinite() for value in found.values())
    if MIXERS[name]["kind"] == "differential":
        assert set(found) == {"layer00/lambda", "layer01/lambda"}


@every_mixer
def test_declared_parameters_exist(name: str) -> None:
    model = build(name)
    for module in model.modules():
        own = dict(module.named_parameters())
        for declare in ("no_decay_parameters", "residual_parameters", "own_initialisation"):
            declared: Callable[[], Any] = getattr(module, declare, tuple)
            assert set(declared()) <= set(own)


@every_mixer
def test_gains_lambdas_and_gates_of_the_rglru_are_not_decayed(name: str) -> None:
    model = build(name)
    decayed = {id(parameter) for parameter in split_parameters(model, decay_rules(model))["decay"]}
    for full, parameter in model.named_parameters():
        special = ("lambda_" in full and not full.endswith("w_lambda.weight")) or ".rg_lru." in full
        assert (id(parameter) in decayed) == (parameter.dim() >= 2 and not special)


@every_mixer
def test_building_leaves_global_random_numbers_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    first, second = build(name), build(name)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    "name", ["gqa", "diff v1", "diff v2 gqa window", "partial rope, half", "alibi gqa", "diff v1 kerple", "fire"]
)
def test_compiles_without_graph_breaks(name: str) -> None:
    model, tokens_bt = build(name, depth=1), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for span in (None, Span(documents_bt=torch.zeros_like(tokens_bt))):
        hidden = [net(tokens_bt, span).hidden_btd for net in (compiled, model)]
        close(*hidden)
        gradients = [torch.autograd.grad(h.pow(2).sum(), list(model.parameters())) for h in hidden]
        for left, right in zip(*gradients, strict=True):
            close(left, right, 1e-4 * float(right.abs().max()))


@every_mixer
def test_gradient_reaches_every_parameter(name: str) -> None:
    model = build(name)
    model.logits(model(tokens()).hidden_btd).pow(2).sum().backward()
    missing = [full for full, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
