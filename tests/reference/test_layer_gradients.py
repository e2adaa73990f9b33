"""Gradient statistics equal the authors' functions on their tiny model, once as transformers' Llama, once as our decoder.

Examples, sizes and the layers with full gradients are read from the vector file; nothing here knows how many there are. Planned
tolerances: loss 2e-5, spectral statistics 1e-4 relative, smallest singular values below full rank ≤ 1e-6, curve metrics 1e-4.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.gradients.capture import Capture, select_matrices
from torchstone.diagnose.gradients.pairs import Example
from torchstone.diagnose.gradients.profile import Profile, gradient_profile, mean_losses
from torchstone.diagnose.gradients.spectra import STATS
from torchstone.diagnose.subject import Subject
from torchstone.recipe.registry import parse_part

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "layer-gradients.npz"
LOSS, RELATIVE, BELOW_RANK, METRIC = 2e-5, 1e-4, 1e-6, 1e-4

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")

OUR_NAMES = {
    "S_sum": "nuclear",
    "S_max": "sigma1",
    "S_min": "sigma_min",
    "frobenius_norm": "frobenius",
    "M_mean": "mean",
    "M_max": "max",
    "M_min": "min",
}
OUR_WEIGHTS = (
    (r"^model\.embed_tokens\.weight", "embed.weight"),
    (r"^model\.norm\.weight", "norm.gain"),
    (r"^lm_head\.weight", "head.project.weight"),
    (r"^model\.layers\.", "blocks."),
    (r"self_attn\.(\w)_proj", r"mixer.w_\1"),
    (r"mlp\.(\w+)_proj", r"feedforward.w_\1"),
    (r"input_layernorm\.weight", "mixer_norm.gain"),
    (r"post_attention_layernorm\.weight", "feedforward_norm.gain"),
)
MODELS = ("transformers", "torchstone")


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, Any] = json.loads(str(VECTORS["config"])) if VECTORS else {}
CASES = sorted({found[1] for name in VECTORS if (found := re.match(r"(ex\d+)/", name))}, key=lambda case: int(case[2:]))
VALUES = sorted(name for name in VECTORS if re.fullmatch(r"ex\d+/\w/\w+", name))
GRADIENTS = sorted(name for name in VECTORS if re.fullmatch(r"ex\d+/grad/layers\.\d+\.\w", name))
METRICS = sorted(name for name in VECTORS if name.startswith("metrics/"))


def _weights() -> dict[str, Tensor]:
    return {n.removeprefix("weights/"): torch.from_numpy(v) for n, v in VECTORS.items() if n.startswith("weights/")}


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=CONFIG["hidden"],
        num_hidden_layers=CONFIG["layers"],
        num_attention_heads=CONFIG["heads"],
        num_key_value_heads=CONFIG["kv_heads"],
        intermediate_size=CONFIG["intermediate"],
        vocab_size=CONFIG["vocab"],
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG["rope_theta"]},
        rms_norm_eps=CONFIG["rms_eps"],
        max_position_embeddings=CONFIG["max_length"],
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(_weights())
    return model


def _decoder() -> Any:
    position = {"kind": "rotary", "layout": "half", "base": CONFIG["rope_theta"]}
    mixer = {"kind": "attention", "heads": CONFIG["heads"], "kv_heads": CONFIG["kv_heads"], "position": position}
    part = {
        "kind": "decoder",
        "width": CONFIG["hidden"],
        "depth": CONFIG["layers"],
        "block": {
            "mixer": mixer,
            "feedforward": {"kind": "swiglu", "hidden": CONFIG["intermediate"]},
            "norm": {"kind": "rmsnorm", "eps": CONFIG["rms_eps"]},
        },
        "head": {"kind": "linear", "tied": False},
    }
    model = parse_part("model", part).build(CONFIG["vocab"], CONFIG["max_length"], 0)
    model.load_state_dict({_our_weight(name): weight for name, weight in _weights().items()})
    return model


def _our_weight(name: str) -> str:
    for theirs, ours in OUR_WEIGHTS:
        name = re.sub(theirs, ours, name)
    return name


@cache
def _subject(model: str) -> Subject:
    return open_subject(_llama() if model == "transformers" else _decoder())


def _example(case: str) -> Example:
    return Example.of(VECTORS[f"{case}/input_ids"].tolist(), int(VECTORS[f"{case}/start_token"]), case)


@cache
def _profile(model: str) -> Profile:
    examples = [_example(case) for case in CASES]
    return gradient_profile(_subject(model), examples, stats=STATS, max_length=CONFIG["max_length"])


def _scored() -> list[str]:
    """Cases with a target; the others have no loss."""
    return [case for case in CASES if _example(case).scored]


def _part(profile: Profile, rows: list[int]) -> Profile:
    ids = tuple(profile.ids[row] for row in rows)
    return dataclasses.replace(profile, ids=ids, values={name: v[rows] for name, v in profile.values.items()})


def test_the_file_is_read_whole() -> None:
    assert CASES and VALUES and GRADIENTS and METRICS
    assert {name.split("/")[2] for name in VALUES} <= set(OUR_NAMES)
    read = {*VALUES, *GRADIENTS, *METRICS, "config", *(n for n in VECTORS if n.startswith("weights/"))}
    read |= {f"{case}/{name}" for case in CASES for name in ("input_ids", "start_token", "loss")}
    assert set(VECTORS) == read


@pytest.mark.parametrize("model", MODELS)
def test_losses(model: str) -> None:
    theirs = np.array([VECTORS[f"{case}/loss"] for case in _scored()])
    assert set(_profile(model).skipped) == set(CASES) - set(_scored())
    np.testing.assert_allclose(_profile(model).losses_n.numpy(), theirs, atol=LOSS, rtol=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", VALUES)
def test_statistics(name: str, model: str) -> None:
    case, matrix, statistic = name.split("/")
    profile, theirs = _profile(model), VECTORS[name].astype(np.float64)
    assert profile.layers == tuple(range(len(theirs)))
    if case in profile.skipped:
        assert not np.isfinite(theirs).any()
        return
    column = profile.matrices.index(matrix)
    ours = profile.statistic(OUR_NAMES[statistic])[profile.ids.index(case), :, column].numpy()
    if statistic == "S_min":
        width = CONFIG["hidden"]
        outputs = width if matrix in "qo" else width // CONFIG["heads"] * CONFIG["kv_heads"]
        if len(VECTORS[f"{case}/input_ids"]) - 1 < min(outputs, width):
            assert np.abs(ours).max() <= BELOW_RANK and np.abs(theirs).max() <= BELOW_RANK
            return
        largest = VECTORS[f"{case}/{matrix}/S_max"]
        assert (np.abs(ours - theirs) <= np.maximum(RELATIVE * theirs, BELOW_RANK * largest)).all()
        return
    scale = np.abs(theirs)
    if statistic.startswith("M_"):  # entries cancel in a mean: what counts is the size of the entries
        scale = np.maximum(np.abs(VECTORS[f"{case}/{matrix}/M_max"]), np.abs(VECTORS[f"{case}/{matrix}/M_min"]))
    assert (np.abs(ours - theirs) <= RELATIVE * scale).all(), f"{name}: {ours} against {theirs}"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_full_gradients(name: str, model: str) -> None:
    case, _, place = name.split("/")
    _, layer, matrix = place.split(".")
    subject, example, found = _subject(model), _example(case), {}
    matrices = [m for m in select_matrices(subject) if (m.layer, m.name) == (int(layer), matrix)]
    tokens = torch.tensor([example.tokens[:-1]])
    with Capture(subject, matrices, (1, tokens.shape[1]), lambda i, factors: found.update({i: factors})) as capture:
        capture.backward(mean_losses(subject.logits(tokens), [example]).sum())
    ours, theirs = found[0].delta_bto[0].T @ found[0].x_bti[0], torch.from_numpy(VECTORS[name])
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= RELATIVE * float(theirs.abs().max())


@cache
def _groups() -> tuple[list[int], list[int]]:
    """Which examples are A and B: the first two and next two, or the two halves, where there are more; whichever
    fits A's first curve. All other metrics then test the reading."""
    rows, half = list(range(len(_scored()))), len(_scored()) // 2
    readings = [(rows[:2], rows[2:4]), (rows[:half], rows[half:])]
    matrix = METRICS[0].split("/")[1]
    wanted = float(VECTORS[f"metrics/{matrix}/mad_A"])
    profile = _profile(MODELS[0])
    return min(readings, key=lambda reading: abs(_part(profile, reading[0]).mad()[matrix] - wanted))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METRICS)
def test_curve_metrics(name: str, model: str) -> None:
    _, matrix, metric = name.split("/")
    first, second = (_part(_profile(model), rows) for rows in _groups())
    comparison = first.compare(second)
    if metric == "rd_top5":
        assert list(comparison.top_layers[matrix]) == VECTORS[name].tolist()
        return
    ours = {"mad_A": first.mad()[matrix], "mad_B": second.mad()[matrix], "rd_AB": comparison.rd[matrix]}[metric]
    assert ours == pytest.approx(float(VECTORS[name]), rel=METRIC)
