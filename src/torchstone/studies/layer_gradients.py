"""Are gradients of step-by-step responses smaller because they reason, or because they are longer and easier?

Li, Li and Zhou, "What Happened in LLMs Layers when Trained for Fast vs. Slow Thinking: A Gradient Perspective", arXiv
2410.23743: before any update, the gradient of an instruction-tuning loss with respect to each attention projection has a
large nuclear norm, uneven over the layers, where the response is a bare answer, and a small, even one where it reasons.
The responses that are compared differ in two more ways: the loss is a mean over more tokens, and each token costs less.

A small model learns 3-digit additions written both ways, half and half, from the same prompt. Its gradients are then taken
on held-out problems under five conditions: fast and slow, each with its own response and with the next problem's
(irrelevant), and slow *matched*: the loss over as many random tokens of the slow response as the fast response has. The
same on the untrained models of the same seeds.

Verdicts. The paper's first claim is kept if matched slow gradients are smaller than fast ones; if only the raw ones are,
it is an artefact of length. The second is kept if an irrelevant response raises the gradient by a larger factor for slow
than for fast responses. Controls: an untrained model cannot reason, so whatever it shows comes from lengths; and a norm
divided by the loss tells how much is left once a cheaper token's smaller gradient is taken out.

Intervals are over problems; one problem measured on three models is one unit, so that they speak of these models.
A table has every model's own ratios. MAD is one number per model, and its claims have three units.

Toy sizes and the claims on raw and matched gradients and on separation are those of our plan, written after a pilot and before
any run of this study. Departures: the gpu scale has longer additions, where the plan had GSM8K; the claims on MAD, on gradients
divided by the loss and on separation at equal length are additions. Chosen after a look: learning rate and initialisation, by
the two losses alone and on seed 1000, which no verdict uses, so that 300 steps reach those of that pilot (1.7 and 0.23).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from torchstone.lab.study import Arm, Cell, Claim, Measurement, Resources, Scale, Study, Summary
from torchstone.recipe.fingerprint import device_class
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.recipe.yaml import dump_yaml
from torchstone.studies import _layer_gradients as measures

FAST, SLOW, MATCHED = "fast", "slow", "slow-matched"
NOTES = {
    FAST: "the bare answer",
    SLOW: "column by column, then the answer",
    MATCHED: "slow, scored on as many random tokens as the bare answer has",
}


def smaller(
    id: str, sentence: str, arm: str, baseline: str = FAST, metric: str = "nuclear", unit: str = "items"
) -> Claim:
    """The arm's metric is below the baseline's by a factor."""
    return Claim(id, sentence, metric, arm, baseline, "log ratio", "less", unit=unit)  # type: ignore[arg-type]


class LayerGradients(Study):
    """Fast against slow responses, on one trained model per seed."""

    slug = "layer-gradients"
    title = "Layer gradients of fast and slow responses"
    question = "Do step-by-step responses have smaller and more even gradients than bare answers of equal length?"
    baseline = FAST
    metrics = measures.METRICS
    claims = (
        smaller("raw", "Slow responses have smaller gradients than fast ones.", SLOW),
        smaller("matched", "Scored on as many tokens, slow responses have smaller gradients than fast ones.", MATCHED),
        smaller("per-loss", "Scored on as many tokens and divided by the loss, slow responses have smaller gradients.",
                MATCHED, metric="per_loss"),
        smaller("untrained-raw", "Control, holds if averaging alone shrinks gradients: in an untrained model, slow "
                "responses have smaller gradients.", f"init.{SLOW}", f"init.{FAST}"),
        smaller("untrained-matched", "Control, should not hold: in an untrained model, slow responses scored on as many "
                "tokens have smaller gradients.", f"init.{MATCHED}", f"init.{FAST}"),
        smaller("even-raw", "Slow responses have a flatter curve over the layers (MAD).", SLOW, metric="mad", unit="seeds"),
        smaller("even-matched", "Scored on as many tokens, slow responses have a flatter curve over the layers (MAD).",
                MATCHED, metric="mad", unit="seeds"),
        Claim("separation", "An irrelevant response raises gradients by a larger factor for slow than for fast responses.",
              "separation", SLOW, FAST, direction="greater", unit="items"),
        Claim("separation-matched", "The same with slow responses scored on as many tokens as fast ones.",
              "separation", MATCHED, FAST, direction="greater", unit="items"),
        Claim("untrained-separation", "Control, should not hold: an untrained model separates slow responses better.",
              "separation", f"init.{SLOW}", f"init.{FAST}", direction="greater", unit="items"),
    )  # fmt: skip
    scales = {
        "smoke": Scale(2, {"width": 32, "head_dim": 8, "depth": 2, "digits": 2, "steps": 4, "batch": 8, "problems": 12}),
        "toy": Scale(3, {"width": 64, "head_dim": 16, "depth": 4, "digits": 3, "steps": 300, "batch": 32, "problems": 128}),
        "gpu": Scale(3, {"width": 512, "head_dim": 64, "depth": 8, "digits": 4, "steps": 2000, "batch": 256, "problems": 512}),
    }  # fmt: skip

    def recipe(self, scale: Scale) -> Recipe:
        """The model that all trained arms of a seed share."""
        s = scale.settings
        return load_recipe({
            "model": {
                "kind": "decoder", "width": s["width"], "depth": s["depth"], "head_dim": s["head_dim"],
                "head": {"kind": "linear", "tied": False},
                "initialisation": {"kind": "normal", "std": 0.1 * (64 / s["width"]) ** 0.5,
                                   "embedding_std": 0.5, "scale_residual": False},
            },
            "data": {"kind": "addition", "digits": s["digits"], "slow": 0.5},
            "optimizer": {"kind": "adamw", "learning_rate": 8e-3 * (64 / s["width"])},
            "schedule": {"kind": "cosine", "warmup": 0.05, "final": 0.1},
            "budget": {"steps": s["steps"]},
            "batch": {"sequences": s["batch"]},
            "evaluation": {"every": None, "sequences": 64},
            "precision": "fp32", "compile": False,
        })  # fmt: skip

    def arms(self, scale: Scale) -> list[Arm]:
        """Kinds of responses, on the trained and on the untrained model. They differ in what is scored, not in training."""
        recipe = self.recipe(scale).data_dict()
        roles = {FAST: "baseline", SLOW: "arm", MATCHED: "control"}

        def arm(response: str, trained: bool) -> Arm:
            settings = {"response": response, "trained": trained, "recipe": recipe}
            if trained:
                return Arm(response, roles[response], NOTES[response], settings)  # type: ignore[arg-type]
            return Arm(f"init.{response}", "control", f"{NOTES[response]}; untrained model", settings)

        return [
            arm(FAST, True), *(arm(response, False) for response in NOTES), arm(SLOW, True), arm(MATCHED, True),
        ]  # fmt: skip

    def measure(self, cell: Cell) -> Measurement:
        """Gradients of the arm's responses on held-out problems, and of the next problem's responses."""
        return measures.measure(cell)

    def summarise(self, cells: Sequence[tuple[Cell, Measurement]]) -> Summary:
        """All conditions by projection, every model's ratios, curves, and the paper's numbers beside ours."""
        return Summary(
            tables=(measures.by_projection(cells), measures.by_seed(cells)),
            figures=measures.curves(cells),
            paper=measures.beside(cells),
        )

    def notes(self) -> tuple[str, ...]:
        """What the intervals are about."""
        return (
            "Intervals of claims over items are over problems, given these models; the table of ratios by model shows how much "
            "the models themselves differ.",
        )

    def resources(self, arms: Sequence[Arm]) -> Resources:
        """One thread; or the first GPU, for all cells wait for its model."""
        if device_class() != "cuda":
            return Resources(threads=1)
        return Resources(devices=(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],))

    def recipe_yaml(self, arms: Sequence[Arm]) -> str:
        """The recipe of the trained models."""
        return dump_yaml(load_recipe(arms[0].settings["recipe"]))
