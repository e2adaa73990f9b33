"""LongPPL and LongCE equal the official code on a small deterministic model; every case and size is read from the vector file.

The model of the file: for ids x, logits at t are (U Wᵀ)[x_t] + s · seen, where seen[v] = 1 if the bigram (x_t, v) already stood
at positions (j, j+1), j+1 <= t, of what the model was given. Tolerances: losses 1e-4, masks and intervals exact, gradients 1e-5.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchstone.data.batch import Batch
from torchstone.errors import DataError
from torchstone.evals.longppl import longppl
from torchstone.evals.longppl_keys import inside, key_intervals, key_tokens
from torchstone.evals.longppl_scorer import full_losses, scorer_of, short_losses
from torchstone.nn.heads.base import Features
from torchstone.objectives.long_context import LongContextConfig, long_context_weights

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "longppl.npz"
LOSS, GRADIENT = 1e-4, 1e-5

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: list[dict[str, Any]] = json.loads(str(VECTORS["config"])) if VECTORS else []
CASES = range(len(CONFIG))


class Case:
    """One case of the file."""

    def __init__(self, number: int) -> None:
        self.settings = CONFIG[number]
        self.window = {"trunc_len": self.settings["trunc_len"], "stride": self.settings["sliding_window"]}
        self.number = number

    def __getattr__(self, name: str) -> Any:
        return VECTORS[f"c{self.number}_{name}"]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(VECTORS[f"c{self.number}_{name}"]))

    def base(self, which: str) -> Tensor:
        return self.tensor(f"{which}_U") @ self.tensor(f"{which}_W").T

    def spans(self, which: str) -> Any:
        """A tokenizer of this one text."""
        ids, offsets = (
            getattr(self, f"{which}_ids").tolist(),
            [tuple(pair) for pair in getattr(self, f"{which}_offsets")],
        )
        return SimpleNamespace(spans=lambda text, special=False: (ids, [(int(a), int(b)) for a, b in offsets]))


def seen_before(tokens_bt: Tensor, vocabulary: int) -> Tensor:
    """fp32 [b, t, v]: 1 where the bigram (token t, v) stood earlier in the row."""
    b, t = tokens_bt.shape
    seen_btv = torch.zeros(b, t, vocabulary)
    for row, tokens in enumerate(tokens_bt.tolist()):
        after: dict[int, set[int]] = {}
        for at, token in enumerate(tokens):
            if at:
                after.setdefault(tokens[at - 1], set()).add(token)
            seen_btv[row, at, sorted(after.get(token, ()))] = 1
    return seen_btv


def bigram_model(base_vv: Tensor, s: Tensor) -> Any:
    """ids [b, t] → logits [b, t, v]."""
    return lambda tokens_bt: base_vv[tokens_bt] + s * seen_before(tokens_bt, base_vv.shape[0])


class LogitsAsStates(nn.Module):
    """The bigram model as a decoder whose final hidden states are its logits and whose head is the identity."""

    def __init__(self, base_vv: Tensor, s: Tensor) -> None:
        super().__init__()
        self.base, self.s = nn.Parameter(base_vv.clone()), nn.Parameter(s.clone())
        identity = torch.eye(base_vv.shape[0])
        self.head = SimpleNamespace(features=lambda h: Features(h), weight_vd=identity, soft_cap=None)

    def forward(self, tokens_bt: Tensor, span: Any) -> tuple[Tensor, None, None]:
        return bigram_model(self.base, self.s)(tokens_bt), None, None


def _exact(ours: Any, theirs: Any) -> None:
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def _close(ours: Any, theirs: Any, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(ours, dtype=np.float64), theirs, atol=tolerance, rtol=tolerance)


def test_every_case_of_the_file_is_compared() -> None:
    found = {int(match[1]) for name in VECTORS if (match := re.match(r"c(\d+)_", name))}
    assert found == set(CASES)
    assert found


@pytest.mark.parametrize("number", CASES)
def test_windows_losses_key_tokens_and_intervals(number: int) -> None:
    case = Case(number)
    scorer = scorer_of(bigram_model(case.base("eval"), case.tensor("eval_s")), tokenizer=case.spans("eval"))
    ids = case.eval_ids.tolist()
    full_t, short_t = full_losses(scorer, ids), short_losses(scorer, ids, **case.window)
    _close(full_t, case.eval_loss_full, LOSS)
    _exact(np.isnan(short_t), np.isnan(case.eval_loss_short))
    _close(short_t, case.eval_loss_short, LOSS)
    key_t = key_tokens(full_t, short_t, case.settings["alpha"], case.settings["beta"])
    _exact(key_t, case.eval_key)
    offsets = [tuple(map(int, pair)) for pair in case.eval_offsets]
    _exact(np.array(key_intervals(key_t, offsets)).reshape(-1, 2), case.key_intervals)


@pytest.mark.parametrize("number", CASES)
def test_intervals_on_the_tokens_of_another_model(number: int) -> None:
    case = Case(number)
    intervals = [tuple(map(int, pair)) for pair in case.key_intervals]
    chosen_t = inside([tuple(map(int, pair)) for pair in case.model_offsets], intervals)
    _exact([at - 1 for at in np.flatnonzero(chosen_t) if at > 0], case.model_key_index)


@pytest.mark.parametrize("number", CASES)
def test_longppl_of_the_text(number: int) -> None:
    case = Case(number)
    text, alpha, beta = str(case.text), case.settings["alpha"], case.settings["beta"]
    evaluator = bigram_model(case.base("eval"), case.tensor("eval_s"))
    model = bigram_model(case.base("model"), case.tensor("model_s"))
    tokenizers = {"tokenizer": case.spans("model"), "evaluator_tokenizer": case.spans("eval")}
    if len(case.eval_ids) <= case.settings["trunc_len"]:
        with pytest.raises(DataError, match="needs more than trunc_len"):
            longppl(text, model, evaluator, **case.window, alpha=alpha, beta=beta, **tokenizers)
        assert int(case.n_key) == 0
        return
    found = longppl(text, model, evaluator, **case.window, alpha=alpha, beta=beta, **tokenizers)
    _close(found.documents[0].losses_t, case.model_loss, LOSS)
    _close(np.nan if found.longppl is None else found.longppl, case.longppl, LOSS)
    _close(found.ppl, case.ppl, LOSS)
    assert (found.key_tokens, found.tokens) == (int(case.n_key), int(case.n_token))


@pytest.mark.parametrize("number", CASES)
def test_weights_of_a_loop_of_ones_own(number: int) -> None:
    case = Case(number)
    ids_1t = case.tensor("eval_ids").long()[None]
    base_vv, s = case.base("eval").requires_grad_(), case.tensor("eval_s").requires_grad_()
    model = bigram_model(base_vv, s)
    weights_1t = long_context_weights(model, ids_1t, **case.window, gamma=case.settings["gamma"])
    _close(weights_1t[0], case.longce_weight, LOSS)
    losses_t = F.cross_entropy(model(ids_1t[:, :-1])[0], ids_1t[0, 1:], reduction="none")
    loss = (weights_1t[0] * losses_t).mean()
    loss.backward()
    assert base_vv.grad is not None
    assert s.grad is not None
    _close(losses_t.mean().item(), case.ce_loss, LOSS)
    _close(loss.item(), case.longce_loss, LOSS)
    _close(base_vv.grad, case.longce_grad_base, GRADIENT)
    _close(s.grad, case.longce_grad_s, GRADIENT)


@pytest.mark.parametrize("number", CASES)
def test_the_objective_of_recipes(number: int) -> None:
    case = Case(number)
    ids_1t = case.tensor("eval_ids").long()[None]
    model = LogitsAsStates(case.base("eval"), case.tensor("eval_s"))
    objective = LongContextConfig(**case.window, gamma=case.settings["gamma"]).build()
    found = objective(model, Batch(ids_1t[:, :-1], ids_1t[:, 1:]))
    found.loss.backward()
    assert found.weights_bt is not None
    _close(found.weights_bt[0], case.longce_weight, LOSS)
    _close(found.loss.item(), case.longce_loss, LOSS)
    _close(model.base.grad, case.longce_grad_base, GRADIENT)
    _close(model.s.grad, case.longce_grad_s, GRADIENT)
    with torch.no_grad():
        plain = objective(model, Batch(ids_1t[:, :-1], ids_1t[:, 1:]))
    _close(plain.loss.item(), case.ce_loss, LOSS)
