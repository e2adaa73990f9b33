"""Output heads: what they compute, how they start, what they cost, and that every caller of a head takes all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from torchstone.errors import ConfigError
from torchstone.models.counts import count
from torchstone.models.decoder import DecoderConfig
from torchstone.models.generate import generate
from torchstone.nn.heads.factored import FactoredHead, from_truncated_svd, truncated_factors
from torchstone.optim.groups import decay_groups
from torchstone.optim.weight_decay import WeightDecay
from torchstone.recipe.load import load_recipe

WIDTH, VOCAB, LENGTH = 16, 23, 8
HEADS = [
    {"kind": "linear", "tied": False, "soft_cap": 3.0},
    {"kind": "factored", "rank": 5},
    {"kind": "factored", "rank": 5, "soft_cap": 2.0},
    {"kind": "mixture-of-softmaxes", "components": 3, "tied": True},
    {"kind": "mixture-of-softmaxes", "components": 3, "tied": False},
]


def model_of(head: object, seed: int = 0) -> torch.nn.Module:
    config = {"width": WIDTH, "depth": 1, "head_dim": 8, "head": head, "initialisation": {"kind": "normal", "std": 0.3}}
    return DecoderConfig.model_validate(config).build(VOCAB, LENGTH, seed)


def states(rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))


def test_factored_head_is_two_products() -> None:
    head = model_of({"kind": "factored", "rank": 5}).head
    expected = states() @ head.b_rd.T @ head.a_vr.T
    torch.testing.assert_close(head.logits(states()), expected)
    torch.testing.assert_close(states() @ head.full_matrix().T, expected)
    assert not head.tied


def test_mixture_mixes_probabilities() -> None:
    model = model_of({"kind": "mixture-of-softmaxes", "components": 3})
    head, hidden = model.head, states()
    prior = (hidden @ head.w_prior.weight.T).softmax(-1)
    latent = torch.tanh(hidden @ head.w_latent.weight.T).view(-1, 3, WIDTH)
    expected = sum(prior[:, k, None] * (latent[:, k] @ model.embed.weight.T).softmax(-1) for k in range(3))
    torch.testing.assert_close(head.logits(hidden).exp(), expected)
    torch.testing.assert_close(head.logits(hidden).softmax(-1), expected)  # log-probabilities are logits
    assert head.full_matrix() is None and head.weight_vd is model.embed.weight
    centred = head.logits(states(400)).double()
    centred = centred - centred.mean(1, keepdim=True)
    assert int(torch.linalg.matrix_rank(centred, rtol=1e-5)) > WIDTH  # what no linear head of this width can do


def test_soft_cap_bounds_logits_and_hides_the_matrix() -> None:
    head = model_of({"kind": "linear", "tied": False, "soft_cap": 3.0}).head
    plain = 1e3 * states() @ head.weight_vd.T
    torch.testing.assert_close(head.logits(1e3 * states()), 3.0 * torch.tanh(plain / 3.0))
    assert float(head.logits(1e6 * states()).detach().abs().max()) <= 3.0
    assert head.full_matrix() is None


def test_factors_start_by_fan_in() -> None:
    config = DecoderConfig.model_validate({"width": 256, "depth": 1, "head": {"kind": "factored", "rank": 64}})
    head = config.build(512, LENGTH, 0).head
    assert head.a_vr.std().item() == pytest.approx(64**-0.5, rel=0.03)
    assert head.b_rd.std().item() == pytest.approx(256**-0.5, rel=0.03)
    fixed = DecoderConfig.model_validate(
        {"width": 256, "depth": 1, "head": {"kind": "factored", "rank": 64, "std": 0.5}}
    )
    assert fixed.build(512, LENGTH, 0).head.b_rd.std().item() == pytest.approx(0.5, rel=0.03)
    halved = DecoderConfig.model_validate({"width": 32, "depth": 1, "head_dim": 8, "head": "factored"})
    assert halved.build(20, LENGTH, 0).head.rank == 10


@pytest.mark.parametrize(("rows", "columns"), [(23, 9), (7, 16)])
def test_truncated_svd_is_the_nearest_matrix_and_shares_the_norm(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in (1, 4, min(rows, columns)):
        a, b = truncated_factors(weight, rank)
        torch.testing.assert_close(a @ b, (u[:, :rank] * s[:rank]) @ v[:rank])
        torch.testing.assert_close(a.norm(), b.norm())
        head = from_truncated_svd(weight, rank)
        torch.testing.assert_close(head.full_matrix(), ((u[:, :rank] * s[:rank]) @ v[:rank]).float())
    hidden = torch.randn(3, columns)
    torch.testing.assert_close(head.logits(hidden), hidden @ weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank}"):
        FactoredHead(16, 23, rank)
    with pytest.raises(ConfigError, match=r"rank 1024 exceeds min\(vocab 50304, width 512\)"):
        FactoredHead(512, 50304, 1024)


def test_a_factored_head_has_no_tied_form() -> None:
    with pytest.raises(ConfigError, match="tied"):
        load_recipe({"model": {"kind": "decoder", "head": {"kind": "factored", "tied": True}}, "data": "recall"})


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_counts_agree_with_the_model(head: dict[str, object]) -> None:
    config = DecoderConfig.model_validate({"width": WIDTH, "depth": 1, "head_dim": 8, "head": head})
    counts, model = count(config, VOCAB, LENGTH), config.build(VOCAB, LENGTH, 0)
    assert counts.parameters == sum(parameter.numel() for parameter in model.parameters())
    own = {id(weight): weight.numel() for weight in (model.embed.weight, model.head.weight_vd)}
    assert counts.non_embedding == counts.parameters - sum(own.values())
    with FlopCounterMode(display=False) as counter:
        model.logits(states())
    assert counter.get_total_flops() == model.head.flops() * 6


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_every_matrix_of_a_head_is_decayed_with_the_embeddings(head: dict[str, object]) -> None:
    model = model_of(head)
    decayed = next(
        group for group in decay_groups(model, WeightDecay(default=0.1, embeddings=0.5)) if group.name == "embeddings"
    )
    matrices = {id(parameter) for parameter in (*model.head.parameters(), model.embed.weight)}
    assert {id(parameter) for parameter in decayed.parameters.values()} == matrices


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_generation_follows_the_logits(head: dict[str, object]) -> None:
    model = model_of(head).eval()
    prompt = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        expected = int(F.log_softmax(model.logits(model(prompt).hidden_btd)[0, -1].float(), -1).argmax())
    assert generate(model, [[3, 1, 4]], max_new=1, greedy=True)[0].tokens == [expected]


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_state_dicts_hold_shared_weights_once_and_load(head: dict[str, object]) -> None:
    first, second = model_of(head, 0), model_of(head, 1)
    names = list(first.state_dict())
    assert sum(value.shape == (VOCAB, WIDTH) for value in first.state_dict().values()) == 1 + (
        "head.project.weight" in names
    )
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.logits(states()), second.logits(states()))
