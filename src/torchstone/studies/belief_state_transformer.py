"""Does learning from all pairs of prefix and suffix let a small Transformer plan, where next tokens do not?

The Belief State Transformer (Hu et al., arXiv 2410.23506) on the star graph: find the way from the centre to a goal, decoded
greedily from "=". Guessing the arm gives 1/arms. Paths are drawn anew for every step, so that nothing repeats.

All planning arms but one have the same forward encoder and spend the same training FLOPs, counted exactly (encoders on the tokens
that they read, head on its pairs): steps make up for what an arm costs per token. Seconds are reported beside them; they are not
what is matched, because they do not repeat. Controls:
- `no-prev`: the pairs without the previous token's loss. Are both directions needed?
- `empty-suffix`: the same model with the pair head, whose suffix is always empty. Is it the pairs, or the head? It has as many
  steps as the pairs, and so more FLOPs, because its head also works on tokens that are not scored.
The paper calls the task solved or not. Here solved is 0.9 of held-out paths; a table says how many seeds solve it. That is no
claim, because seeds that all reach a ceiling have no interval against a number. Next tokens fail if they stay below 0.6 with
two arms. An arm that stays within 0.1 of guessing has not left its plateau; the step at which it does is in a table. While the
belief-state arm has not left it in every seed, claims about planning are not judged, as planned.

Infilling is measured on bytes of source code: the loss of the true middle given prefix and goal, against a decoder that reads
the goal first (fill in the middle, same FLOPs), and the loss of plain text against a decoder trained on plain text alone.
`infill.belief-state` keeps a share of its pairs, because all of them would cost 30 times its encoders.

Fixed after pilots of the belief-state arm on seeds 1000 to 1002; no other arm was run before. With rate 2e-3 and batch 32 it was
at 0.52 after 400 steps, 0.79 after 1200 and 0.97 after 1400 (seed 1000). Batch 64 was at 0.46 and 0.51 after 800 steps (seeds
1001 and 1002) at nearly twice the time a step. Batch 16 and a rate of 3e-3 were near 0.09 after 1200 and 800 steps (seed
1001). With larger initial values (0.08, embeddings 0.3) and batch 32, seed 1000 was at 0.48 after 1000 steps, seeds 1001 and 1002
at 0.50 after 2000. The toy setting is thus the one of six that solved the task in the time it had, on its one seed; several
others were cut short. A first toy run of 1600 steps left no arm above guessing in any seed; the steps were then raised to 2400,
and the gate, which that run lacked, was built. Some seeds may still not leave the plateau. The gpu scale was not piloted.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.lab.study import ZERO, Cell, Claim, Gate, Measurement, Scale, Summary
from torchstone.lab.training import Probe, Trained, TrainingStudy, Variant
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.studies import _belief_state_transformer as shown

FAILED, GAIN, COST, LEFT = 0.6, 0.3, 0.1, 0.6
BST, EMPTY = "belief-state", "empty-suffix"
ROOM = {"piece": 96, "goal_min": 16, "goal_max": 32, "middle": 24, "rate": 0.01}


def plans(id: str, sentence: str, baseline: str, margin: float = GAIN, arm: str = BST) -> Claim:
    """The arm's path accuracy is above the baseline's by more than the margin."""
    gate = Gate("path_accuracy", BST, LEFT)
    return Claim(id, sentence, "path_accuracy", arm, baseline, direction="greater", margin=margin, gate=gate)


class BeliefStateTransformer(TrainingStudy):
    """Planning with pairs and without, and infilling."""

    slug = "belief-state-transformer"
    title = "Belief State Transformer: all pairs of prefix and suffix"
    question = "At equal training FLOPs, does learning from pairs find paths that next-token prediction does not find?"
    baseline = "next-token"
    metrics = shown.METRICS
    claims = (
        plans("plans", "It finds far more paths than next-token training at equal FLOPs.", "next-token"),
        Claim("next-token-fails", "Next-token training does not solve it.", "path_accuracy", "next-token", ZERO, margin=FAILED),
        plans("pairs", "It is the pairs: with the empty suffix alone the same model finds far fewer.", EMPTY),
        plans("prev", "The previous token's loss is needed: without it far fewer paths are found.", "no-prev"),
        Claim("infill", "The true middle of a text is more likely under it than under fill-in-the-middle at equal FLOPs.",
              "infill_loss", "infill.belief-state", "infill.fim"),
        Claim("plain-cost", "Plain text costs it less than 0.1 nats per byte against a decoder at equal FLOPs.",
              "plain_loss", "infill.belief-state", "infill.plain", margin=COST),
    )  # fmt: skip
    scales = {
        "smoke": Scale(2, {"arms": 2, "path": 3, "nodes": 6, "width": 32, "heads": 4, "depth": 1, "backward": 1, "batch": 4,
                           "rate": 2e-3, "steps": 4, "every": 2, "graphs": 16,
                           "text": {**ROOM, "depth": 1, "length": 128, "batch": 2, "steps": 2, "gaps": 8}}),
        "toy": Scale(3, {"arms": 2, "path": 4, "nodes": 8, "width": 64, "heads": 4, "depth": 4, "backward": 1, "batch": 32,
                         "rate": 2e-3, "steps": 2400, "every": 100, "graphs": 512,
                         "text": {**ROOM, "depth": 2, "length": 128, "batch": 16, "steps": 160, "gaps": 128}}),
        "gpu": Scale(3, {"arms": 2, "path": 5, "nodes": 50, "width": 256, "heads": 8, "depth": 6, "backward": 6, "batch": 256,
                         "rate": 3e-4, "steps": 2500, "every": 100, "graphs": 1024,
                         "text": {**ROOM, "piece": 256, "goal_min": 25, "goal_max": 75, "middle": 64, "depth": 6,
                                  "length": 512, "batch": 64, "steps": 1500, "gaps": 512}}),
    }  # fmt: skip

    def base(self, scale: Scale) -> Recipe:
        """A decoder on star graphs; the belief-state arm's steps are set, and this arm spends as much."""
        return shown.matched(shown.planning_base(scale.settings), self.arm_recipe(scale, BST))

    def arm_recipe(self, scale: Scale, arm: str) -> Recipe:
        """A belief-state recipe of planning at the scale's number of steps."""
        return load_recipe(shown.planning_base(scale.settings), shown.belief_state(scale.settings, arm))

    def variants(self, scale: Scale) -> Sequence[Variant]:
        """Planning arms at the belief-state arm's FLOPs, infilling arms at those of fill-in-the-middle."""
        s, reference = scale.settings, self.arm_recipe(scale, BST)
        notes = {
            BST: "all pairs",
            "no-prev": "pairs without the previous token's loss",
            EMPTY: "the same model, no pairs",
        }
        variants = [Variant("next-token", role="baseline")]
        for arm, note in notes.items():
            role = "arm" if arm == BST else "control"
            lines = shown.belief_state(s, arm)
            steps = s["steps"] if arm == EMPTY else shown.matched(self.arm_recipe(scale, arm), reference).budget.steps
            variants.append(Variant(arm, (*lines, f"budget.steps={steps}"), role, note))
        fim = load_recipe(self.base(scale), shown.text_lines(s, "fim"))
        for arm in ("fim", "plain", BST):
            lines = shown.text_lines(s, arm)
            steps = shown.infilling_steps(load_recipe(self.base(scale), lines), fim)
            variants.append(
                Variant(f"infill.{arm}", (*lines, f"budget.steps={steps}"), "arm" if arm == BST else "control")
            )
        return variants

    def probe(self, trained: Trained) -> Probe:
        """Paths at every checkpoint, or losses of middles and of plain text."""
        return shown.paths(trained) if trained.recipe.data.kind == "star-graph" else shown.gaps(trained)

    def summarise(self, cells: Sequence[tuple[Cell, Measurement]]) -> Summary:
        """How many seeds solve it, when they leave the plateau, what each arm costs, and curves."""
        return Summary(shown.tables(cells), shown.figures(cells), shown.beside(cells), shown.NOTES)
