"""Does a hybrid of linear recurrence and local attention get what each of the two lacks?

Griffin (De et al., arXiv 2402.19427) and RecurrentGemma (Botev et al., arXiv 2404.07839) repeat two recurrent blocks and one
local attention block. Four arms, equal in everything but the mixers: *global* multi-query attention, *local* attention
with a window, *hawk* (recurrent blocks only) and *griffin* (R, R, A). All have GeGLU with biases, embeddings times √width, a tied
head with logits capped at 30, and initial values by fan-in.

Three tasks, each on models of its own
- text: bytes of Python source. After training on T tokens, the loss on the *same last T/2 tokens* with T … 8T of context
  (`evals.extrapolation`): with T these are positions T/2 to T. Loss by position alone would compare different tokens.
- far (`far-tag`): say the first token again at markers every 16 tokens. A window sees it near the beginning only.
- recall (`gap-recall`, no filler): each key is given a value once; questions come within the window, with other pairs in between.
  Which of the pairs will be asked is not known, so a state of fixed size has to hold all of them.

Rule. "The hybrid gets both" is four claims, two on each task: griffin is above the arm that lacks what the task needs by at
least 0.3 (local on far, counted at markers that stacked windows cannot reach; hawk on recall), and at most 0.1 below the arm
that has it (hawk on far, local on recall). Chance is 0.125. Extrapolation: griffin's loss rises by at most 0.05 nats from T to
8T, global's by at least 0.3. Whether griffin *uses* far context is a claim apart: foreign text in its place must cost
something. In range, griffin is at most 0.02 nats above global. Text loss does not tell griffin from local and decides nothing.

Controls. Parameters agree within 0.1 % through the width of the feed-forward; FLOPs are reported (attention in full). Hawk and
local are each other's control on the two tasks. No learning rate was tuned.

Changed before any verdict was read. The plan asked for thresholds (griffin at least 0.9, the failing arm below 0.6), but seeds
that all reach a ceiling have no interval against a number, and below 0.6 on far was true by construction; contrasts between
arms took their place. A first run with the thresholds was finished by then, of which only the number of claims that hold was
seen.

Chosen after a look, on seed 1000, which no verdict uses: the recall task (in-context `recall` with few keys is solved by hawk
and too slow for the others), steps and the learning rate. Seen there: far for griffin and hawk; recall for griffin, hawk and
local; text for global and griffin, whose numbers (a rise of 0.79 and of 0.00 nats, a foreign gap of 0.0002 for griffin) changed
nothing. Griffin on far was also seen on seeds 2000 to 2002 (0.81, 1.00, 1.00).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchstone.lab.study import ZERO, Cell, Claim, Measurement, Scale, Summary
from torchstone.lab.training import Matching, Probe, Trained, TrainingStudy, Variant
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.studies import _recurrentgemma as shown

GAIN, LESS = 0.3, 0.1
ROTARY = "{kind: rotary, variant: partial, p: 0.5, layout: half}"


def patterns(settings: dict[str, Any], window: int) -> dict[str, str]:
    """The line that gives each arm its mixers."""
    recurrent = f"{{kind: rglru, num_blocks: {settings['blocks']}}}"
    local = f"{{kind: local-attention, window: {window}}}"
    return {
        "global": f"model.pattern=[{{kind: attention, kv_heads: 1, output_bias: true, position: {ROTARY}}}]",
        "local": f"model.pattern=[{local}]",
        "hawk": f"model.pattern=[{recurrent}]",
        "griffin": f"model.pattern=[{recurrent}, {recurrent}, {local}]",
    }


class RecurrentGemma(TrainingStudy):
    """Global, local, recurrent, and both."""

    slug = "recurrentgemma"
    title = "RecurrentGemma: recurrence and local attention"
    question = (
        "Do recurrent blocks and local attention together remember far and recall exactly, and read beyond training?"
    )
    baseline = "global"
    matching = Matching("params", tolerance=0.001)
    metrics = shown.METRICS
    claims = (
        Claim("far-local", f"Beyond the reach of windows, griffin recalls a far tag better than local by {GAIN}.",
              "beyond_accuracy", "far.griffin", "far.local", direction="greater", margin=GAIN),
        Claim("far-hawk", f"There it is at most {LESS} below recurrence alone.", "beyond_accuracy", "far.griffin", "far.hawk",
              direction="greater", margin=-LESS),
        Claim("recall-hawk", f"Inside the window, griffin recalls pairs better than recurrence alone by {GAIN}.", "accuracy",
              "recall.griffin", "recall.hawk", direction="greater", margin=GAIN),
        Claim("recall-local", f"There it is at most {LESS} below local attention.", "accuracy", "recall.griffin",
              "recall.local", direction="greater", margin=-LESS),
        Claim("griffin-long", "Griffin's loss rises by at most 0.05 nats from T to 8T of context.", "rise", "griffin", ZERO,
              margin=0.05),
        Claim("global-long", "Global attention's loss rises by at least 0.3 nats.", "rise", "global", ZERO,
              direction="greater", margin=0.3),
        Claim("uses-context", "Griffin predicts better from its own far context than from foreign text.", "foreign_gap",
              "griffin", ZERO, direction="greater"),
        Claim("in-range", "In range, griffin's loss is at most 0.02 nats above global attention's.", "loss_1x", "griffin",
              "global", margin=0.02),
    )  # fmt: skip
    scales = {
        "smoke": Scale(2, {"width": 32, "head_dim": 16, "blocks": 8, "hidden": 96, "depth": 3, "task_depth": 3,
                           "length": 16, "window": 4, "task_length": 32, "task_window": 8, "every": 8, "sequences": 4,
                           "task_sequences": 4, "steps": 3, "far_steps": 3, "recall_steps": 3, "windows": 8, "rate": 4e-3}),
        "toy": Scale(3, {"width": 64, "head_dim": 16, "blocks": 8, "hidden": 200, "depth": 6, "task_depth": 3,
                         "length": 128, "window": 32, "task_length": 64, "task_window": 16, "every": 16, "sequences": 8,
                         "task_sequences": 16, "steps": 260, "far_steps": 250, "recall_steps": 450, "windows": 40,
                         "rate": 4e-3}),
        "gpu": Scale(2, {"width": 512, "head_dim": 64, "blocks": 8, "hidden": 1536, "depth": 12, "task_depth": 6,
                         "length": 2048, "window": 512, "task_length": 256, "task_window": 32, "every": 64,
                         "sequences": 32, "task_sequences": 64, "steps": 2300, "far_steps": 500, "recall_steps": 1000,
                         "windows": 12, "rate": 1e-3}),
    }  # fmt: skip

    def base(self, scale: Scale) -> Recipe:
        """Global multi-query attention on bytes of text."""
        s = dict(scale.settings)
        recipe = {
            "model": {
                "kind": "decoder", "width": s["width"], "depth": s["depth"], "head_dim": s["head_dim"],
                "block": {"feedforward": {"kind": "geglu", "hidden": s["hidden"], "bias": True}},
                "embedding_scale": "sqrt-width", "head": {"kind": "linear", "soft_cap": 30.0}, "initialisation": "fan-in",
            },
            "data": {"kind": "text", "tokenizer": "bytes", "length": s["length"]},
            "optimizer": {"kind": "adamw", "learning_rate": s["rate"]},
            "schedule": "cosine", "budget": {"steps": s["steps"]}, "batch": {"sequences": s["sequences"]},
            "evaluation": {"every": 100, "sequences": 128},
        }  # fmt: skip
        return load_recipe(load_recipe(recipe), [patterns(s, s["window"])["global"]])

    def variants(self, scale: Scale) -> Sequence[Variant]:
        """The four arms on each task; on the synthetic ones the layers are fewer."""
        s = dict(scale.settings)
        length, depth = s["task_length"], f"model.depth={s['task_depth']}"
        tasks = {
            "far": (f"data={{kind: far-tag, length: {2 * length}, every: {s['every']}}}", f"budget.steps={s['far_steps']}",
                    f"batch.sequences={s['task_sequences'] // 2}"),
            "recall": (f"data={{kind: gap-recall, keys: {length // 4}, cells: {length // 2}, filler_probability: 0.0, "
                       f"max_gap: {s['task_window'] - 1}}}", f"budget.steps={s['recall_steps']}",
                       f"batch.sequences={s['task_sequences']}"),
        }  # fmt: skip
        text = patterns(s, s["window"])
        found = [Variant("global", role="baseline")]
        found += [Variant(arm, (text[arm],), "arm", shown.ARMS[arm]) for arm in ("local", "hawk", "griffin")]
        lines = patterns(s, s["task_window"])
        for task, overrides in tasks.items():
            found.append(Variant(f"{task}.global", (*overrides, depth), "control", shown.ARMS["global"], matched=False))
            found += [
                Variant(f"{task}.{arm}", (lines[arm],), "arm", shown.ARMS[arm], against=f"{task}.global")
                for arm in ("local", "hawk", "griffin")
            ]
        return found

    def probe(self, trained: Trained) -> Probe:
        """Loss by context for text, accuracy by distance for the far tag; state sizes and decays."""
        return shown.text_numbers(trained) if trained.recipe.data.kind == "text" else shown.task_numbers(trained)

    def summarise(self, cells: Sequence[tuple[Cell, Measurement]]) -> Summary:
        """Loss by context, what each arm can do, state sizes, decay spectra, and the paper's numbers."""
        return Summary(shown.tables(cells), shown.figures(cells), shown.PAPER, shown.NOTES)
