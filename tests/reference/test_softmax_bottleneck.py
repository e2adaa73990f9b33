"""Anisotropy, spectra, the factored head under the chunked loss, and n-gram ranks equal their definitions in fp64.

Cases are found by name in the vector file (an0, an1, … sp0 … head0 … ng0 …); nothing here knows how many there are or how
large. Planned tolerances: 1e-5 relative, 1e-4 of the largest entry on gradients.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchstone.diagnose.bottleneck.anisotropy import anisotropy
from torchstone.diagnose.bottleneck.head_spectrum import spectrum
from torchstone.diagnose.bottleneck.ngram_rank import ngram_matrix
from torchstone.nn.heads.factored import FactoredHead
from torchstone.objectives.next_token import head_cross_entropy, head_scores

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "softmax-bottleneck.npz"
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
ROUNDING = 1e-6  # absolute: what fp32 inputs of unit size leave of a number that cancels to 0

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
CONFIG: dict[str, list[dict[str, Any]]] = json.loads(str(VECTORS["config"])) if VECTORS else {}
PARTS = {"an": "anisotropy", "sp": "spectrum", "head": "head", "ng": "ngram"}


def cases(prefix: str) -> list[str]:
    """All cases of a part: an0, an1, …"""
    found = {match[0] for name in VECTORS if (match := re.match(rf"{prefix}\d+(?=_)", name))}
    return sorted(found, key=lambda case: int(case.removeprefix(prefix)))


def setting(case: str) -> dict[str, Any]:
    prefix, number = re.fullmatch(r"([a-z]+)(\d+)", case).groups()  # type: ignore[union-attr]
    return CONFIG[PARTS[prefix]][int(number)]


def tensor(case: str, name: str) -> Tensor:
    return torch.from_numpy(np.array(VECTORS[f"{case}_{name}"]))


def close(ours: Any, case: str, name: str, scale: float = 0.0) -> None:
    """Within 1e-5 relative, or of `scale`: sums whose terms are that large round alike."""
    theirs = VECTORS[f"{case}_{name}"]
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=TOLERANCE, atol=ROUNDING + TOLERANCE * scale)


def test_every_case_is_compared() -> None:
    known = {case for prefix in PARTS for case in cases(prefix)}
    assert {name.split("_")[0] for name in VECTORS} - {"config"} == known
    assert {part: len(found) for part, found in CONFIG.items()} == {
        part: len(cases(prefix)) for prefix, part in PARTS.items()
    }


@pytest.mark.parametrize("case", cases("an"))
def test_anisotropy(case: str) -> None:
    close(anisotropy(tensor(case, "H")), case, "anisotropy")


@pytest.mark.parametrize("case", cases("sp"))
def test_spectrum(case: str) -> None:
    found = spectrum(tensor(case, "W"))
    close(found.values_m, case, "sv", scale=float(found.values_m[0]))
    for name, value in found.metrics().items():
        close(value, case, name)


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("case", cases("head"))
def test_factored_head_under_the_chunked_loss(case: str, chunk: int | None) -> None:
    sizes = setting(case)
    head = FactoredHead(sizes["d"], sizes["V"], sizes["rank"])
    with torch.no_grad():
        head.a_vr.copy_(tensor(case, "A"))
        head.b_rd.copy_(tensor(case, "B"))
    hidden_nd, targets_n = tensor(case, "H"), tensor(case, "target").long()
    loss_sum, losses_n = head_cross_entropy(head, hidden_nd, targets_n, chunk)
    count = int((targets_n >= 0).sum())
    (loss_sum / count).backward()
    close((loss_sum / count).item(), case, "loss")
    close(float(losses_n.sum()) / count, case, "loss")
    close(float(head_scores(head, hidden_nd, targets_n, chunk)[0].sum()) / count, case, "loss")
    for parameter, name in ((head.a_vr, "grad_A"), (head.b_rd, "grad_B")):
        theirs = tensor(case, name)
        worst = float((parameter.grad - theirs).abs().max())  # type: ignore[operator]
        assert worst <= GRADIENT_TOLERANCE * float(theirs.abs().max()), (name, worst)


@pytest.mark.parametrize("case", cases("ng"))
def test_ngram_rank(case: str) -> None:
    matrix = ngram_matrix(tensor(case, "counts"), setting(case)["alpha"])
    close(matrix.prob_cv, case, "prob")
    close(matrix.weight_c, case, "context_weight")
    close(matrix.values_k, case, "sv", scale=float(matrix.values_k[0]))
    close(matrix.entropy, case, "entropy")
    ranks = tensor(case, "ranks").tolist()
    whole = float(torch.linalg.vector_norm(matrix.values_k))
    close([matrix.tail(rank)[0] for rank in ranks], case, "frob_error", scale=whole * 1e-2)
    close([matrix.tail(rank)[1] for rank in ranks], case, "rel_error", scale=1e-2)
    close([matrix.gap(matrix.truncated(rank)) for rank in ranks], case, "ce_gap", scale=1e-1)
