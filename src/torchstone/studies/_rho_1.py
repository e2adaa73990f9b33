"""The toy language model of the Rho-1 study, its reference, and one cell of each arm.

The model sees four tokens: their embeddings side by side, one hidden layer, logits. It has what torchstone's objectives ask of a
model (hidden states and a head), so that `objective: selective` itself selects and `next-token` itself is the baseline.

Shapes: b sequences · t tokens · d width of an embedding · h hidden · n tokens, flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.synthetic.noisy_trigram import NoisyTrigram, NoisyTrigramConfig
from torchstone.evals.trajectories import CATEGORIES, categorise
from torchstone.lab.study import Cell, Measurement
from torchstone.nn.heads.linear import LinearHead
from torchstone.objectives.next_token import NextTokenConfig, head_scores
from torchstone.objectives.selective import SelectiveConfig
from torchstone.report.result import Series

SEEN = 4  # tokens that the model sees
CHECKPOINTS = 10
NOISELESS = {"noise_documents": 0.0, "noise_tokens": 0.0}
WATCHED = 256  # noisy sequences, of no training stream, whose tokens are sorted into categories
APART = 1_000_000  # seeds of the watched sequences begin here


class FourTokens(nn.Module):
    """A feed-forward language model of the last four tokens.

    Args:
        vocab_size: token ids.
        width, hidden: of an embedding, and of the hidden layer.
        seed: of the initial weights.
    """

    def __init__(self, vocab_size: int, width: int, hidden: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocab_size, width)
            self.layer = nn.Linear(SEEN * width, hidden)
            self.head = LinearHead(hidden, self.embed, tied=False)

    def forward(self, tokens_bt: Tensor, span: Any = None) -> tuple[Tensor, None, None]:
        """Hidden states [b, t, h] for the head; positions before the fourth see zeros for what is missing."""
        padded_btd = F.pad(self.embed(tokens_bt), (0, 0, SEEN - 1, 0))
        length = tokens_bt.shape[1]
        seen_btd = torch.cat([padded_btd[:, place : place + length] for place in range(SEEN)], dim=-1)
        return self.layer(seen_btd).relu(), None, None

    def flops(self) -> float:
        """Forward FLOPs per token."""
        return 2.0 * (self.layer.weight.numel() + self.head.weight_vd.numel())


@torch.no_grad()
def losses_of(model: FourTokens, batch: Batch) -> Tensor:
    """Loss of every target, 0 where there is none: [b, t]."""
    hidden_nh = model(batch.tokens_bt)[0].flatten(0, 1)
    return head_scores(model.head, hidden_nh, batch.targets_bt.flatten())[0].view(batch.targets_bt.shape)


@torch.no_grad()
def clean_numbers(model: FourTokens, task: NoisyTrigram, sequences: int) -> dict[str, float]:
    """Loss on held-out clean sequences, and how often the language's own next token is ranked first."""
    batch = next(task.evaluation(sequences, sequences))
    losses_bt, scored_bt = losses_of(model, batch), batch.targets_bt != IGNORE
    top_bt = model.head.logits(model(batch.tokens_bt)[0]).argmax(-1)
    right_bt = top_bt[:, 1:] == task.answers(batch.tokens_bt)
    return {
        "clean_loss": float(losses_bt[scored_bt].mean()),
        "clean_top1": float(right_bt[scored_bt[:, 1:]].double().mean()),
    }


@dataclass
class Training:
    """A model and how it is trained: Adam at a constant rate on the mean loss of the targets that the objective takes.

    Attributes:
        model: the model.
        learning_rate: of Adam.
        objective: of torchstone.
        targets, noise: targets that were trained on, and the noise among them.
    """

    model: FourTokens
    learning_rate: float
    objective: nn.Module = field(default_factory=lambda: NextTokenConfig().build())
    targets: int = 0
    noise: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.learning_rate)

    def step(self, batch: Batch) -> float:
        """One update; returns the loss that was minimised."""
        self.optimizer.zero_grad(set_to_none=True)
        found = self.objective(self.model, batch)
        found.loss.backward()
        self.optimizer.step()
        trained_bt = batch.targets_bt != IGNORE if found.weights_bt is None else found.weights_bt > 0
        self.targets += int(trained_bt.sum())
        if batch.noise_bt is not None:
            self.noise += int((trained_bt & batch.noise_bt).sum())
        return float(found.loss.detach())


def clean_batches(task: NoisyTrigram, s: Mapping[str, Any], seed: int, steps: int, size: int) -> Iterator[Batch]:
    """The reference's clean sequences in a new order each epoch."""
    whole = next(task.clean(seed, s["reference_sequences"], s["reference_sequences"]))
    order = np.random.default_rng([seed, 150])
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < size:
            queue += order.permutation(s["reference_sequences"]).tolist()
        rows, queue = queue[:size], queue[size:]
        yield Batch(whole.tokens_bt[rows], whole.targets_bt[rows], rows=tuple(rows))


def reference_of(task: NoisyTrigram, s: Mapping[str, Any], seed: int, kind: str) -> FourTokens:
    """The reference: the same model with other initial weights, on few clean sequences, or on raw ones (`self`)."""
    model = FourTokens(task.vocab_size, s["width"], s["hidden"], seed + APART)
    training = Training(model, s["learning_rate"])
    if kind == "self":
        for step in range(s["reference_steps"]):
            training.step(task.batch(seed + 2 * APART, step, s["batch"]))
    else:
        for batch in clean_batches(task, s, seed, s["reference_steps"], s["batch"]):
            training.step(batch)
    return model.eval()


def measure(cell: Cell) -> Measurement:
    """Train one arm and take its numbers. The language follows from the seed. The reference is trained inside the cell, from the
    seed and the rate alone, so that all arms of a seed with one rate have the same one."""
    arm = cell.arm.settings
    s = {**cell.settings, "learning_rate": cell.settings["learning_rate"] * arm["rate"]}
    language = {"table_seed": cell.seed}
    task = NoisyTrigramConfig.model_validate({**language, **({} if arm["noisy"] else NOISELESS)}).build()
    reference = reference_of(task, s, cell.seed, arm["reference"]) if arm["reference"] else None
    objective = (
        SelectiveConfig(ratio=s["ratio"], score=arm["score"]).build() if arm["score"] else NextTokenConfig().build()
    )
    model = FourTokens(task.vocab_size, s["width"], s["hidden"], cell.seed)
    training = Training(model, s["learning_rate"], objective)
    steps = round(s["steps"] * arm["steps"]) + (s["reference_steps"] if arm["clean_share"] else 0)
    noisy = NoisyTrigramConfig.model_validate(language).build()
    watched = noisy.batch(cell.seed + APART, 0, min(WATCHED, s["evaluate"]))
    marks = {round(steps * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)}
    seen, curve = [], []
    for step, batch in enumerate(_batches(task, s, cell.seed, steps, arm["clean_share"])):
        loss = training.step(batch if reference is None else replace(batch, reference_bt=losses_of(reference, batch)))
        if step + 1 in marks:
            seen.append(losses_of(model, watched))
            curve.append((step + 1, clean_numbers(model, task, s["evaluate"])["clean_loss"]))
            cell.report({"step": step + 1, "steps": steps, "loss": loss})
    row = task.length - task.settings.context
    targets = steps * s["batch"] * row
    costs = cost(model, targets, s["reference_steps"] * s["batch"] * row if reference else 0)
    x, y = zip(*curve, strict=True)
    return Measurement(
        metrics={
            **clean_numbers(model, task, s["evaluate"]),
            "noise_selected": training.noise / training.targets,
        },
        series={"clean loss": Series(axes={"steps": tuple(map(float, x))}, values=y)},
        extra={"categories": categories(watched, seen), "cost": costs},
        tokens=targets,
        flops=sum(costs.values()),
    )


def _batches(task: NoisyTrigram, s: Mapping[str, Any], seed: int, steps: int, mixed: bool) -> Iterator[Batch]:
    """The raw batches of a seed; `mixed` replaces in each as many rows by clean ones as the reference saw in all."""
    if not mixed:
        yield from (task.batch(seed, step, s["batch"]) for step in range(steps))
        return
    total = s["reference_steps"] * s["batch"]
    counts = np.diff([round(total * step / steps) for step in range(steps + 1)])
    clean = clean_batches(task, s, seed, total, 1)
    for step, count in enumerate(counts):
        raw = task.batch(seed, step, s["batch"])
        rows = [next(clean) for _ in range(count)]
        keep = s["batch"] - count
        flags = torch.zeros((count, task.length), dtype=torch.bool)
        assert raw.noise_bt is not None
        yield Batch(
            torch.cat([raw.tokens_bt[:keep], *(one.tokens_bt for one in rows)]),
            torch.cat([raw.targets_bt[:keep], *(one.targets_bt for one in rows)]),
            rows=raw.rows,
            noise_bt=torch.cat([raw.noise_bt[:keep], flags]),
        )


def categories(watched: Batch, seen: list[Tensor]) -> dict[str, dict[str, float | None]]:
    """Share of each category among the watched tokens, and share of noise inside it; None for a category without tokens."""
    valid_bt = watched.targets_bt != IGNORE
    assert watched.noise_bt is not None
    noise_n = watched.noise_bt[valid_bt].numpy()
    found = categorise(np.stack([losses_bt[valid_bt].numpy() for losses_bt in seen], axis=1))
    shares: dict[str, float | None] = {**found.shares()}
    inside = {name: noise_n[found.category_n == name] for name in CATEGORIES}
    return {"share": shares, "noise": {name: float(one.mean()) if len(one) else None for name, one in inside.items()}}


def cost(model: FourTokens, targets: int, referred: int) -> dict[str, float]:
    """FLOPs of training, and of the reference: its own training on `referred` targets, and scoring online."""
    forward = model.flops()
    return {"own": 3 * forward * targets, "reference": forward * (3 * referred + targets) if referred else 0.0}
