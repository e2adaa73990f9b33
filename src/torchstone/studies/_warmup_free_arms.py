"""Scales and arms of the study of warmup: centre peaks, sweeps, and what each arm changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchstone.lab.study import Scale
from torchstone.lab.training import Variant

PLAIN = ("optimizer.beta=0.9", "optimizer.nesterov=false", "optimizer.bias_correction=none")
SMALL = {
    "adamw": 4e-3,
    "liona": 1.6e-2,
    "lionar": 3.2e-2,
    "lionar-plus": 0.256,
    "lionar-plus-none": 0.256,
    "lionar-no-momentum": 4e-3,
}
LARGE = {"adamw": 2e-3, "liona": 2e-3, "lionar": 2e-3, "lionar-plus": 8e-3, "lionar-plus-none": 8e-3}
LONGER = ["adamw", "lionar-plus"]
CONTROLS = {"lionar-plus-none": [1.0, 2.0], "lionar-no-momentum": [1.0], "lionar-frozen": [1.0]}
SINGLE = {"lionar-plus-none": [1.0], "liona": [1.0], "lionar": [1.0]}
SCALES = {
    "smoke": Scale(2, {"width": 32, "depth": 1, "length": 16, "vocabulary": None, "batch": 2, "micro": None, "steps": 20,
                       "evaluate": 4, "every": 3, "halves": 1, "warmup": 0.1, "decay": 0.1, "centres": SMALL,
                       "factors": [1.0, 2.0], "peaks": CONTROLS, "longer": LONGER}),
    "toy": Scale(3, {"width": 48, "depth": 3, "length": 48, "vocabulary": None, "batch": 16, "micro": None, "steps": 140,
                     "evaluate": 256, "every": 4, "halves": 4, "warmup": 0.05, "decay": 1.0, "centres": SMALL,
                     "factors": [0.5, 1.0, 2.0, 4.0], "peaks": CONTROLS, "longer": LONGER}),
    "gpu": Scale(3, {"width": 512, "depth": 6, "length": 512, "vocabulary": 4096, "batch": 512, "micro": 128, "steps": 572,
                     "evaluate": 1024, "every": 10, "halves": 2, "warmup": 0.05, "decay": 0.1, "centres": LARGE,
                     "factors": [0.5, 1.0, 2.0], "peaks": SINGLE, "longer": []}),
}  # fmt: skip


def variants(s: Mapping[str, Any]) -> list[Variant]:
    """The four optimizers and the controls, from the settings of a scale."""

    def tuned(kind: str, arm: str) -> str:
        peak, decay = s["centres"][arm], s["decay"]
        return f"optimizer={{kind: {kind}, learning_rate: {peak!r}, weight_decay: {decay!r}, clip: null}}"

    lionar = tuned("lionar", "lionar")
    frozen = ("optimizer.rotate_embeddings=true", "model.block.projection=linear")
    weak = tuned("lionar", "lionar-no-momentum") if "lionar-no-momentum" in s["peaks"] else ""
    arms = [
        Variant("adamw", role="baseline"),
        Variant("liona", (tuned("liona", "liona"),), note="length of updates fixed"),
        Variant("lionar", (lionar, *PLAIN), note="angle of updates fixed"),
        Variant(
            "lionar-plus", (tuned("lionar", "lionar-plus"),), note="and β = 0.98, Nesterov, inverse bias correction"
        ),
    ]
    controls = [
        Variant("lionar-plus-none", (tuned("lionar", "lionar-plus-none"), PLAIN[2]), "control", "LionAR+ without its ramp"),
        Variant("lionar-no-momentum", (weak, *PLAIN[1:], "optimizer.beta=0"), "control", "sign of the gradient alone"),
        Variant("lionar-frozen", (lionar, *PLAIN, *frozen), "control", "all norms frozen, no gains"),
    ]  # fmt: skip
    return arms + [control for control in controls if control.name in s["peaks"]]
