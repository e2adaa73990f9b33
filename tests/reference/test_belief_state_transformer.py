"""The belief-state model and objective equal their authors' code: masks, positions, pairs, states, logits, loss, gradients,
decoding, the fill-in-the-middle mask and star graphs.

Rows, sizes and numbered cases are read from the vector file. Masks, positions, pairs and token ids are exact; numbers are
within 2e-5 + 1e-4 of the value.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchstone.data.batch import Batch
from torchstone.data.synthetic.star_graph import star_line
from torchstone.models.belief_generate import infill
from torchstone.models.belief_state import BeliefState, BeliefStateConfig, reading_span
from torchstone.objectives.belief_pairs import PairRule, pairs_of
from torchstone.objectives.belief_reference import equally_batched_loss
from torchstone.objectives.belief_state import BeliefStateObjective, BeliefStateObjectiveConfig
from torchstone.objectives.fill_in_the_middle import middle_mask

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "belief-state-transformer.npz"
ATOL, RTOL = 2e-5, 1e-4

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, Any] = json.loads(str(VECTORS["config"])) if VECTORS else {}
END = CONFIG.get("eos_token_id", 0)
STARS: list[dict[str, Any]] = json.loads(str(VECTORS["star.lines"])) if VECTORS else []


def _tensor(name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[name]))


def _close(ours: Tensor, theirs: str) -> None:
    torch.testing.assert_close(
        ours.detach(), _tensor(theirs).view(ours.shape), atol=ATOL, rtol=RTOL, msg=lambda text: f"{theirs}: {text}"
    )


def _rule() -> PairRule:
    gap_max = None if CONFIG["max_gap"] < 0 else CONFIG["max_gap"]
    mode = CONFIG["single_gap_mode"].replace("_", "-")
    return PairRule(CONFIG["min_gap"], gap_max, CONFIG["context_length"], mode)


def _their_parameters(model: BeliefState) -> dict[str, list[Any]]:
    """Their name of a parameter → ours that make it up, one above the other."""
    found: dict[str, list[Any]] = {"encoder.token_embedding.weight": [model.embed.weight]}
    for letter, encoder in (("f", model), ("b", model.backward_encoder)):
        start = f"encoder.transformer_{letter}"
        blocks: list[Any] = list(encoder.blocks)
        for number, block in enumerate(blocks):
            mixer, forward, name = block.mixer, block.feedforward, f"{start}.blocks.{number}"
            found |= {
                f"{name}.ln_1.weight": [block.mixer_norm.gain],
                f"{name}.attn.c_attn.weight": [mixer.w_q.weight, mixer.w_k.weight, mixer.w_v.weight],
                f"{name}.attn.c_proj.weight": [mixer.w_o.weight],
                f"{name}.ln_2.weight": [block.feedforward_norm.gain],
                f"{name}.mlp.up.gate_up.weight": [forward.w_gate.weight, forward.w_up.weight],
                f"{name}.mlp.down.weight": [forward.w_down.weight],
            }
        norm: Any = encoder.norm
        found[f"{start}.norm.weight"] = [norm.gain]
    head = model.head
    return found | {
        "text_head.mlp.0.gate_up.weight": [head.w_gate.weight, head.w_up.weight],
        "text_head.mlp.2.weight": [head.w_down.weight],
        "text_head.norm.weight": [head.norm.gain],
        "text_head.lm_head.weight": [head.project.weight],
    }


@torch.no_grad()
def _model() -> BeliefState:
    width, heads = CONFIG["n_embd"], CONFIG["n_head"]
    depths = {letter: _layers(letter) for letter in "fb"}
    hidden = VECTORS["param.encoder.transformer_f.blocks.0.mlp.down.weight"].shape[1]
    config = BeliefStateConfig.model_validate(
        {
            "width": width,
            "depth": depths["f"],
            "backward_depth": depths["b"],
            "head_dim": width // heads,
            "block": {
                "mixer": {
                    "kind": "attention",
                    "position": {"kind": "rotary", "layout": "half", "base": CONFIG["rope_base"]},
                },
                "feedforward": {"kind": "swiglu", "hidden": hidden},
                "norm": {"kind": "rmsnorm", "eps": CONFIG["rms_eps"]},
            },
            "pair": {"eps": CONFIG["rms_eps"]},
            "end_token": END,
        }
    )
    model = config.build(CONFIG["vocab_size"], VECTORS["tokens"].shape[1], 0).eval()
    theirs = _their_parameters(model)
    assert {f"param.{name}" for name in theirs} == {name for name in VECTORS if name.startswith("param.")}
    assert sum(p.numel() for p in model.parameters()) == sum(VECTORS[f"param.{name}"].size for name in theirs)
    for name, ours in theirs.items():
        parts = _tensor(f"param.{name}").split([parameter.shape[0] for parameter in ours])
        for parameter, part in zip(ours, parts, strict=True):
            parameter.copy_(part)
    return model


def _layers(letter: str) -> int:
    start = f"param.encoder.transformer_{letter}.blocks."
    return 1 + max(int(name.removeprefix(start).split(".")[0]) for name in VECTORS if name.startswith(start))


def _visible(tokens_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and positions of tokens in reading order."""
    span = reading_span(tokens_bt, END)
    assert span.positions_bt is not None
    length = tokens_bt.shape[1]
    causal_tt = torch.ones(length, length, dtype=torch.bool).tril()
    if span.documents_bt is None:
        return causal_tt.expand(len(tokens_bt), -1, -1), span.positions_bt
    return causal_tt & (span.documents_bt[:, :, None] == span.documents_bt[:, None, :]), span.positions_bt


def test_masks_and_positions() -> None:
    tokens_bt = _tensor("tokens")
    mask_bts, positions_bt = _visible(tokens_bt)
    assert torch.equal(mask_bts, _tensor("mask_forward"))
    assert torch.equal(positions_bt, _tensor("pos_forward"))
    mask_bts, positions_bt = _visible(tokens_bt.flip(1))
    assert torch.equal(mask_bts.flip(1, 2), _tensor("mask_backward"))
    assert torch.equal(positions_bt.flip(1), _tensor("pos_backward"))


def test_pairs_and_targets() -> None:
    tokens_bt = _tensor("tokens")
    pairs = pairs_of(tokens_bt, END, _rule())
    rows = [name for name in VECTORS if name.startswith("pairs.")]
    assert sorted(rows) == sorted(f"pairs.{row}" for row in range(len(tokens_bt)))
    for row in range(len(tokens_bt)):
        own_n = pairs.row_n == row
        ours_n2 = torch.stack([pairs.prefix_n[own_n], pairs.suffix_n[own_n]], dim=1)
        assert torch.equal(ours_n2, _tensor(f"pairs.{row}"))
        assert torch.equal(pairs.targets_n2[own_n, 0], _tensor(f"targets_next.{row}"))
        assert torch.equal(pairs.targets_n2[own_n, 1], _tensor(f"targets_prev.{row}"))


def test_states_and_logits_of_pairs() -> None:
    model, tokens_bt = _model(), _tensor("tokens")
    prefix_btd, suffix_btd = model(tokens_bt).hidden_btd, model.suffixes(tokens_bt).hidden_btd
    _close(prefix_btd, "emb_forward")
    _close(suffix_btd, "emb_backward")
    rows = [int(name.removeprefix("logits_pairs.")) for name in VECTORS if name.startswith("logits_pairs.")]
    assert rows
    for row in rows:
        prefix_n, suffix_n = _tensor(f"pairs.{row}").unbind(1)
        logits = model.head.pair_logits(prefix_btd[row, prefix_n], suffix_btd[row, suffix_n])
        _close(torch.stack(logits, dim=1), f"logits_pairs.{row}")


@pytest.mark.parametrize("chunk", [None, 5])
def test_loss_and_gradients(chunk: int | None) -> None:
    model, tokens_bt = _model(), _tensor("tokens")
    output = BeliefStateObjective(_rule(), chunk=chunk)(model, Batch(tokens_bt, tokens_bt))
    _close(output.loss.view(1), "loss")
    output.loss.backward()
    norms = {name for name in VECTORS if name.startswith("gradnorm.")}
    theirs = _their_parameters(model)
    assert norms == {f"gradnorm.{name}" for name in theirs}
    for name, ours in theirs.items():
        gradient = torch.cat([parameter.grad for parameter in ours])
        _close(gradient.norm(), f"gradnorm.{name}")
        if f"grad.{name}" in VECTORS:
            _close(gradient, f"grad.{name}")


def test_evaluation_gives_the_loss_too() -> None:
    tokens_bt = _tensor("tokens")
    mode = CONFIG["single_gap_mode"].replace("_", "-")
    part = BeliefStateObjectiveConfig(
        gap_min=CONFIG["min_gap"], single_gap=mode, context_length=CONFIG["context_length"]
    )
    with torch.no_grad():
        _close(part.build()(_model(), Batch(tokens_bt, tokens_bt)).loss.view(1), "loss")


def test_the_published_average_over_pair_batches() -> None:
    loss = equally_batched_loss(_model(), _tensor("tokens"), _rule(), CONFIG["pair_batch_size"])
    _close(loss.view(1), "loss_pair_batched")


def test_infill() -> None:
    model, prompts_bt, goals_bt = _model(), _tensor("infill.prompt"), _tensor("infill.goal")
    sequences_bt = _tensor("infill.sequence")
    new = sequences_bt.shape[1] - prompts_bt.shape[1]
    found = infill(model, prompts_bt.tolist(), goals_bt.tolist(), max_new=new, greedy=True)
    wanted = sequences_bt[:, prompts_bt.shape[1] :].tolist()
    for completion, tokens in zip(found, wanted, strict=True):
        stop = tokens.index(END) if END in tokens else len(tokens)
        assert completion.tokens == tokens[:stop]
    with torch.no_grad():
        suffix_bd = model.suffixes(goals_bt).hidden_btd[:, :1]
        prefix_btd = model(sequences_bt[:, :-1]).hidden_btd[:, -new:]
        _close(model.head.pair_logits(prefix_btd, suffix_bd)[0], "infill.logits_next")


def test_the_empty_suffix() -> None:
    model = _model()
    with torch.no_grad():
        _close(model.logits(model(_tensor("infill.prompt")).hidden_btd[:, -1]), "free.logits_next")


def test_the_mask_of_fill_in_the_middle() -> None:
    targets_bt = _tensor("fim.targets")
    assert torch.equal(middle_mask(targets_bt, fim_token=CONFIG["vocab_size"], end_token=END), _tensor("fim.mask"))


@pytest.mark.parametrize("number", range(len(STARS)))
def test_star_graphs(number: int) -> None:
    given = STARS[number]
    star = star_line(random.Random(given["seed"]), given["num_paths"], given["path_length"], given["max_nodes"])
    assert star.text() == given["line"]
    assert star.tokens(given["max_nodes"]) == _tensor(f"star.ids.{number}").tolist()


def test_every_star_is_compared() -> None:
    assert {name for name in VECTORS if name.startswith("star.ids.")} == {f"star.ids.{n}" for n in range(len(STARS))}
