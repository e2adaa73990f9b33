"""Does a model of parameter tokens that grows in the middle of its training beat one that is large from the start?

TokenFormer (Wang et al., arXiv 2410.23168) replaces every matrix by attention to learned tokens, so that a trained model is
enlarged by appending tokens. A byte model on source code is trained, doubled, and trained on; every arm has the same training
FLOPs over its whole history and one cosine over its whole training.

A. At the moment of growth: the change of logits and loss for each of four ways to make the new tokens (keys zero or random,
   scale kept or following √n). Zero keys with the scale kept must change nothing; the released code does the opposite.
B. At the end: growth against the large model from scratch, and against the small one trained on.

Controls, each of which could explain a gain away
- `small`: the small model with all FLOPs. If it wins, growing was not worth its price.
- `mlp-grown` and `mlp-large`: an ordinary Transformer of the same sizes, widened in the middle by hidden units with zero
  outgoing weights, and large from scratch. The paper lacks it; growth is specific to TokenFormer only if it beats this.
- C. `equal` and `transformer`: TokenFormer and Transformer with equal parameters and FLOPs, and the modes of the weights at the
  same size, so that what growth gains is not taken for what the architecture gains.

Rule: contrasts over paired seeds, margins as stated with each claim. "Nothing" is a change of logits below 1e-5 of the largest.
No learning rate was tuned. Looked at beforehand, for speed: seed 1000 of four arms with 100 and 80 steps, whose losses were
seen; the numbers of steps and of sequences were set after it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.lab.matching import counts_of
from torchstone.lab.study import ZERO, Arm, Cell, Claim, Measurement, Scale, Summary
from torchstone.lab.training import Probe, Trained, TrainingStudy, Variant
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.report.result import ArmRecord
from torchstone.studies import _tokenformer as shown

EXACT, PARITY = 1e-5, 0.03


def price(recipe: Recipe) -> float:
    """Training FLOPs of a token."""
    return counts_of(recipe).training_flops_per_token


def lower(id: str, arm: str, baseline: str, sentence: str, margin: float = 0.0) -> Claim:
    """The arm's validation loss is lower than the baseline's plus the margin."""
    return Claim(id, sentence, "validation_loss", arm, baseline, margin=margin)


class TokenFormer(TrainingStudy):
    """Growth in the middle of training, at equal FLOPs."""

    slug = "tokenformer"
    title = "TokenFormer: models that grow by appending parameter tokens"
    question = "Is a model that grows in the middle of its training better than one of equal cost that is large from the start?"
    baseline = "large"
    metrics = shown.METRICS
    paper = shown.PAPER
    claims = (
        Claim("exact", "Growth with zero keys and the scale kept changes no logit.", "logit_change", "zero-fixed", ZERO,
              margin=EXACT),
        Claim("following-jumps", "With zero keys and the scale following, the loss jumps.", "jump", "zero-following", ZERO,
              direction="greater"),
        Claim("released-jumps", "With random keys and the scale following, as released, the loss jumps.", "jump",
              "random-following", ZERO, direction="greater"),
        *(lower(f"pays-{choice}", choice, "large", f"Grown with {choice.replace('-', ' keys, scale ')}, the model ends "
                "with a lower loss than the large one from scratch.") for choice in shown.CHOICES),
        lower("beats-small", "zero-fixed", "small", "Growth ends with a lower loss than the small model trained on."),
        lower("beats-mlp", "zero-fixed", "mlp-grown", "Growth by tokens beats growth of an MLP: it is specific to TokenFormer."),
        lower("mlp-pays", "mlp-grown", "mlp-large", "Control: growing a Transformer's MLP beats a large one from scratch."),
        lower("exact-helps", "zero-fixed", "random-following", "Exact growth ends with a lower loss than the released kind."),
        lower("parity", "equal", "transformer", "At equal parameters TokenFormer is at most 0.03 nats above a Transformer.",
              PARITY),
        lower("factor", "equal.softmax", "equal.softmax-bare", "A softmax needs the factor n: without it the loss is higher."),
        lower("norm", "equal", "equal.softmax", "Normalising before GELU is better than a softmax."),
    )  # fmt: skip
    scales = {
        "smoke": Scale(2, {"width": 32, "depth": 1, "length": 16, "sequences": 4, "small": 4, "grown": 3, "equal": 4,
                           "every": 2, "modes": []}),
        "toy": Scale(3, {"width": 64, "depth": 2, "length": 64, "sequences": 8, "small": 400, "grown": 320, "equal": 320,
                         "every": 80, "modes": []}),
        "gpu": Scale(2, {"width": 512, "depth": 8, "length": 256, "sequences": 64, "small": 1500, "grown": 1200,
                         "equal": 2000, "every": 100, "modes": ["gelu-l2-norm", "none"]}),
    }  # fmt: skip

    def base(self, scale: Scale) -> Recipe:
        """The large TokenFormer, as many steps as its arms' FLOPs buy."""
        s = scale.settings
        recipe = load_recipe({
            "model": {
                "kind": "decoder", "width": s["width"], "depth": s["depth"], "head_dim": s["width"] // 4,
                "block": {
                    "mixer": {"kind": "attention", "position": {"kind": "rotary", "variant": "partial", "p": 0.25}},
                    "norm": {"kind": "layernorm", "scale": False, "bias": False},
                },
            },
            "data": {"kind": "text", "tokenizer": "bytes", "length": s["length"]},
            "optimizer": {"kind": "adamw", "learning_rate": 3e-3},
            "schedule": "cosine", "budget": {"steps": 1}, "batch": {"sequences": s["sequences"]},
            "evaluation": {"every": s["every"], "sequences": 64},
        }, shown.tokens(2 * s["width"], 8 * s["width"]))  # fmt: skip
        return load_recipe(recipe, [self._steps(recipe, scale)])

    def _steps(self, recipe: Recipe, scale: Scale) -> str:
        """The budget that gives an arm of one size the FLOPs of the arms that grow."""
        s, d = scale.settings, scale.settings["width"]
        small, large = (load_recipe(recipe, shown.tokens(n * d, 4 * n * d)) for n in (1, 2))
        total = s["small"] * price(small) + s["grown"] * price(large)
        return f"budget.steps={round(total / price(recipe))}"

    def variants(self, scale: Scale) -> Sequence[Variant]:
        """Arms that grow, what they are compared with, and the architectures at equal parameters."""
        s, d = scale.settings, scale.settings["width"]
        grown, equal = (f"budget.steps={s['small'] + s['grown']}",), (f"budget.steps={s['equal']}",)
        small, note = shown.tokens(d, 4 * d), f"doubled after step {s['small']}"
        modes = {
            "equal": "",
            "equal.softmax": ", norm_mode: softmax",
            "equal.softmax-bare": ", norm_mode: softmax, tau: 1.0",
        }
        modes |= {f"equal.{mode}": f", norm_mode: {mode}" for mode in s["modes"]}
        return [
            Variant("large", role="baseline", note="parameter tokens: twice the width, and 8 widths in the feed-forward"),
            *(Variant(name, (*small, *grown), note=f"half the tokens, {note}") for name in shown.CHOICES),
            Variant("small", (*small, self._steps(load_recipe(self.base(scale), small), scale)), "control", "never grown"),
            Variant("mlp-grown", (*shown.mlp(6 * d), *grown), "control", f"a Transformer of that size, {note}"),
            Variant("mlp-large", shown.mlp(14 * d), "control", "a Transformer as large as the grown one"),
            Variant("transformer", (*shown.mlp(4 * d), *equal), "control", "a plain Transformer"),
            *(Variant(name, (*shown.tokens(3 * d // 4, 3 * d, mode), *equal), "control", "parameters of `transformer`")
              for name, mode in modes.items()),
        ]  # fmt: skip

    def arms(self, scale: Scale) -> Sequence[Arm]:
        """The arms, with what grows in the middle of some."""
        return shown.with_growth(super().arms(scale), scale.settings["small"])

    def arm_record(self, arm: Arm) -> ArmRecord:
        """An arm that grows is as large as it ends."""
        return super().arm_record(shown.as_it_ends(arm))

    def measure(self, cell: Cell) -> Measurement:
        """Train, and grow on the way where the arm says so."""
        return shown.grown_cell(cell) if "growth" in cell.arm.settings else super().measure(cell)

    def probe(self, trained: Trained) -> Probe:
        """The curve against FLOPs of an arm that does not grow."""
        return Probe(series={shown.CURVE: shown.plain_curve(trained.summary.history)})

    def summarise(self, cells: Sequence[tuple[Cell, Measurement]]) -> Summary:
        """Jumps, use of tokens, curves."""
        return Summary(shown.tables(cells), (shown.curves(cells),), self.paper, shown.NOTES)
