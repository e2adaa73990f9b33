"""How much rank does the output head need? Frozen backbone, heads of falling rank trained on its cached states.

    1. one pass over the text: states after the final norm (fp16) and next tokens; whole documents are held out (5 %)
    2. for r falling: logits = A (B h), from the truncated SVD of the trained W; Adam, linear decay, chunked cross-entropy
    3. gap(r) = held-out loss(r) − held-out loss of W untouched; W trained further in the same way is the control: where training
       alone changes the loss by 0.005 nats or more, gaps to W untouched would mean data and not rank, and W retrained is the zero
    4. gap ≈ c · r^(−p), and the critical rank where the gap is 0.01 nats, with a bootstrap interval over held-out documents, of
       which there must be 10

(Godey et al., arXiv 2404.07647, section 6.) One rank costs 6 · r · (v + d) FLOPs a state. With a directory, every rank's result
is a file that appears whole or not at all, and the same command goes on where it stopped. A head whose training diverged is no
result: it is an error, and no file is written.

Shapes: n tokens · d width · v vocabulary · r rank.

Pitfalls: fp16 holds numbers up to 65504; larger states are an error. The model must be W h: a bias or a soft cap in the head
would make W alone another model, which is checked on the first row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchstone.diagnose.bottleneck.critical_rank import THRESHOLD, PowerLaw, critical_rank, power_law
from torchstone.diagnose.bottleneck.head_factors import HeadFactors
from torchstone.diagnose.bottleneck.head_spectrum import require_finite_rows
from torchstone.diagnose.bottleneck.rank_sweep_states import Cached, Documents, cache_states, split_documents
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.nn.heads.factored import check_rank
from torchstone.objectives.next_token import chunked_cross_entropy, chunked_scores
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, PaperFigure, Table
from torchstone.storage.atomic import atomic_write
from torchstone.storage.hashing import fingerprint_of

RESAMPLES = 1000
LEAST_DOCUMENTS = 10  # held out, for an interval: a resample of fewer repeats the same few
CHANGE_ALLOWED = 0.005  # nats; from here on, what further training alone changes is part of every gap
PAPER = (
    PaperFigure(
        setting="rank-constrained heads on pretrained models (1B to 7B)",
        paper="loss suffers below a rank of about 1000, whatever the backbone",
    ),
)


@dataclass(frozen=True)
class Training:
    """How heads are trained: one file's settings are another's error."""

    learning_rate: float = 1e-3
    batch: int = 4096
    epochs: int = 1
    seed: int = 0


@dataclass(frozen=True)
class HeadResult:
    """Held-out losses of one head: sum and number of tokens per held-out document."""

    head: str
    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.sums) / sum(self.counts)

    @property
    def finite(self) -> bool:
        """Whether no document's loss is NaN or infinite."""
        return all(map(math.isfinite, self.sums))


@dataclass(frozen=True)
class Sweep:
    """All heads of a sweep: the full one as it is, the same trained (the control), and those of lower rank."""

    untouched: HeadResult
    retrained: HeadResult
    ranked: dict[int, HeadResult]
    full: int

    @property
    def change(self) -> float:
        """What training alone changes, nats."""
        return self.retrained.loss - self.untouched.loss

    @property
    def moved(self) -> bool:
        """Whether training alone changes too much for gaps to the untouched head to mean rank."""
        return abs(self.change) >= CHANGE_ALLOWED

    @property
    def zero(self) -> HeadResult:
        """The full head that gaps are measured from: the untouched one, or the retrained one where training alone moved it."""
        return self.retrained if self.moved else self.untouched

    @property
    def gaps(self) -> dict[int, float]:
        """Rank → loss minus that of `zero`; the full rank is 0."""
        found = {rank: result.loss - self.zero.loss for rank, result in sorted(self.ranked.items())}
        return found | {self.full: 0.0}

    def interval(self, seed: int = 0, level: float = 0.95) -> tuple[float, float] | None:
        """Percentile interval of the critical rank over resampled documents; None if there are fewer than 10 of them, or if it
        often lies outside the ranks."""
        documents, ranks = len(self.zero.sums), sorted(self.ranked)
        if documents < LEAST_DOCUMENTS:
            return None
        generator = np.random.default_rng(seed)
        counts_g = np.array(self.zero.counts)
        table_gr = np.array([self.ranked[rank].sums for rank in ranks]).T - np.array(self.zero.sums)[:, None]
        found = []
        for _ in range(RESAMPLES):
            chosen = generator.integers(0, documents, documents)
            gaps = [*(table_gr[chosen].sum(0) / counts_g[chosen].sum()).tolist(), 0.0]
            found.append(critical_rank([*ranks, self.full], gaps))
        values = [value for value in found if value is not None]
        if len(values) < level * RESAMPLES:
            return None
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


class _Work:
    """What the heads share, made when the first head needs it, so that a finished sweep runs no model."""

    def __init__(self, subject: Subject, documents: Documents, training: Training) -> None:
        self.subject, self.documents, self.training = subject, documents, training
        self.weight_vd = subject.head_weight().float()
        require_finite_rows(self.weight_vd)

    @cached_property
    def train(self) -> Cached:
        return cache_states(self.subject, self.documents.train, self.documents.length, self.weight_vd)

    @cached_property
    def held_out(self) -> Cached:
        return cache_states(self.subject, self.documents.held_out, self.documents.length, self.weight_vd)

    @cached_property
    def factors(self) -> HeadFactors:
        return HeadFactors(self.weight_vd)

    def result(self, name: str) -> HeadResult:
        """Train the head of this name (`untouched`, `retrained` or a rank) and score it on the held-out documents."""
        if name == "untouched":
            matrices = [self.weight_vd]
        elif name == "retrained":
            matrices = [self.weight_vd.clone()]
        else:
            matrices = [*self.factors.of_rank(int(name))]
        if name != "untouched":
            train_head(matrices, self.train, self.training)
        states_nd = self.held_out.states_nd.float()
        with torch.no_grad():
            inner_nr = states_nd @ matrices[1].T if len(matrices) == 2 else states_nd
            losses_n, _ = chunked_scores(inner_nr, matrices[0], self.held_out.targets_n)
        groups = self.held_out.document_n.to(losses_n.device)
        sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64, device=losses_n.device)
        sums.index_add_(0, groups, losses_n.double())
        return HeadResult(name, tuple(sums.tolist()), tuple(torch.bincount(groups).tolist()))


def train_head(matrices: Sequence[Tensor], cached: Cached, training: Training) -> None:
    """Train W, or A and B, in place on cached states: Adam with a rate that falls linearly to 0, order from the seed."""
    for matrix in matrices:
        matrix.requires_grad_()
    optimizer = torch.optim.Adam(list(matrices), lr=training.learning_rate)
    generator = torch.Generator().manual_seed(training.seed)
    count = cached.states_nd.shape[0]
    size = min(training.batch, count)
    steps = training.epochs * (count // size)
    for step in range(steps):
        if step % (count // size) == 0:
            order_n = torch.randperm(count, generator=generator).to(cached.states_nd.device)
        at = step % (count // size) * size
        rows = order_n[at : at + size]
        hidden_nd = cached.states_nd[rows].float()
        inner_nr = hidden_nd @ matrices[1].T if len(matrices) == 2 else hidden_nd
        loss_sum, _ = chunked_cross_entropy(inner_nr, matrices[0], cached.targets_n[rows])
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        (loss_sum / size).backward()
        optimizer.step()
    for matrix in matrices:
        matrix.requires_grad_(False)


def default_ranks(full: int) -> tuple[int, ...]:
    """Halves of the full rank, down to 4."""
    return tuple(full >> shift for shift in range(1, full.bit_length()) if full >> shift >= 4) or (max(1, full // 2),)


def rank_sweep(
    subject: Subject,
    documents: Documents,
    ranks: Sequence[int],
    training: Training = Training(),
    directory: Path | None = None,
) -> Sweep:
    """Train and score every head that the directory does not hold yet.

    Raises:
        ConfigError: a rank above min(v, d), a head that is no plain matrix, or a directory of another sweep.
        DataError: losses, states or a head that are not finite, states that fp16 cannot hold, or a head whose training diverged.
    """
    work = _Work(subject, documents, training)
    for rank in ranks:
        check_rank(rank, *work.weight_vd.shape)
    identity = _identity(subject, documents, training, work.weight_vd)
    names = ["untouched", "retrained", *(str(rank) for rank in sorted(set(ranks), reverse=True))]
    found = {
        name: _stored(directory, name, identity) or _store(directory, work.result(name), identity) for name in names
    }
    return Sweep(
        found["untouched"], found["retrained"], {rank: found[str(rank)] for rank in ranks}, min(work.weight_vd.shape)
    )


def _identity(subject: Subject, documents: Documents, training: Training, weight_vd: Tensor) -> str:
    """What two results must share to be compared."""
    sums = [float(weight_vd.double().sum()), float(weight_vd.double().square().sum())]
    return fingerprint_of([subject.describe(), sums, asdict(training), documents.fingerprint])


def _file(directory: Path, name: str) -> Path:
    return directory / f"head-{name}.json"


def _stored(directory: Path | None, name: str, identity: str) -> HeadResult | None:
    """What the directory holds of a head; None, too, for one that diverged."""
    if directory is None or not _file(directory, name).exists():
        return None
    path = _file(directory, name)
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        result = HeadResult(data["head"], tuple(data["sums"]), tuple(data["counts"]))
        of = data["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a result of a rank sweep ({error}); remove it, and it is made again."
        ) from error
    if of != identity:
        raise ConfigError(
            f"{path} belongs to a sweep with another model, other texts or other settings. Give another directory, or remove "
            "this one: heads of different sweeps are not compared."
        )
    return result if result.finite else None


def _store(directory: Path | None, result: HeadResult, identity: str) -> HeadResult:
    if not result.finite:
        raise DataError(
            f"the head {result.head!r} has a held-out loss of {result.loss}: its training diverged, and nothing is kept of it. "
            "Give a lower learning rate."
        )
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        content = json.dumps(asdict(result) | {"identity": identity}, indent=1, allow_nan=False)
        atomic_write(_file(directory, result.head), content)
    return result


def rank_sweep_finding(
    subject: Subject,
    texts: Sequence[str],
    *,
    ranks: Sequence[int] | None = None,
    directory: str | Path | None = None,
    tokens: int = 200_000,
    length: int = 128,
    held_out: float = 0.05,
    learning_rate: float = 1e-3,
    batch: int = 4096,
    epochs: int = 1,
    seed: int = 0,
) -> Finding:
    """Loss against the rank of the head, next to the full head trained in the same way.

    Args:
        subject: a model with a linear head.
        texts: documents; some of them are held out whole.
        ranks: of the heads; None: halves of the full rank down to 4.
        directory: where every head's result is kept, for going on later; None: nowhere.
        tokens: to cache at most, 2·d bytes each.
        length: longest row in tokens.
        held_out: share of the documents that no head is trained on.
        learning_rate, batch, epochs, seed: of the heads' training.

    Raises:
        ConfigError: see `rank_sweep`.
        DataError: fewer than two usable documents, or see `rank_sweep`.
    """
    documents = split_documents(subject, texts, length, tokens, held_out)
    full = min(subject.vocab_size, subject.width)
    chosen = tuple(default_ranks(full) if ranks is None else ranks)
    training = Training(learning_rate, batch, epochs, seed)
    sweep = rank_sweep(subject, documents, chosen, training, None if directory is None else Path(directory))
    return _finding(subject, documents, sweep)


def _finding(subject: Subject, documents: Documents, sweep: Sweep) -> Finding:
    ranks = sorted(sweep.ranked)
    law = power_law(ranks, [sweep.gaps[rank] for rank in ranks])
    held_out = len(sweep.zero.sums)
    notes = [documents.describe()]
    if held_out < LEAST_DOCUMENTS:
        notes.append(
            f"No interval of the critical rank: {held_out} held-out documents are too few to resample, and {LEAST_DOCUMENTS} are "
            "needed. Give more texts, or hold out a larger share."
        )
    if subject.tied:
        notes.append("The output matrix is tied to the token embedding; heads are trained apart from it.")
    return Finding(
        analysis="rank-sweep",
        title="Loss against the rank of the head",
        question="Which rank of the output head does this model need on this text?",
        subject=subject.describe(),
        answer=_answer(sweep, law),
        control="The full matrix trained in the same way on the same states: what training alone changes.",
        tables=(_table(sweep),),
        figures=(_figure(sweep, law),),
        paper=PAPER,
        notes=tuple(notes),
    )


def _answer(sweep: Sweep, law: PowerLaw | None) -> str:
    """What training alone changes comes first where it decides what gaps are measured from."""
    critical = critical_rank(list(sweep.gaps), list(sweep.gaps.values()))
    interval = sweep.interval() if critical is not None else None
    around = f" (95 % interval {interval[0]:.1f} to {interval[1]:.1f} over documents)" if interval else ""
    where = f"is {critical:.1f}{around}" if critical is not None else "lies outside the ranks that were measured"
    head = "retrained full head" if sweep.moved else "full head"
    rank = f"The rank at which the loss is 0.01 nats above the {head}'s {where}."
    falls = f" The gap follows {law.c:.3g} · rank^-{law.p:.2f}." if law else ""
    trained = f"Training the full head in the same way changes its loss by {sweep.change:+.4f} nats"
    if not sweep.moved:
        return f"{rank}{falls} {trained}."
    return (
        f"{trained}, {CHANGE_ALLOWED:g} or more, so gaps are measured from the retrained full head and not from the model's own; "
        f"train longer, or on text like the model's own. {rank}{falls}"
    )


def _table(sweep: Sweep) -> Table:
    losses: dict[str | int, float] = {rank: result.loss for rank, result in sorted(sweep.ranked.items())}
    losses |= {f"{sweep.full}, retrained": sweep.retrained.loss, f"{sweep.full}, untouched": sweep.untouched.loss}
    return Table(
        title="loss by rank",
        columns=("rank", "held-out loss", "gap to the untouched head", "gap to the retrained head"),
        rows=tuple(
            (head, loss, loss - sweep.untouched.loss, loss - sweep.retrained.loss) for head, loss in losses.items()
        ),
        note="Nats per token on held-out documents.",
    )


def _figure(sweep: Sweep, law: PowerLaw | None) -> Figure:
    ranks = tuple(sorted(sweep.ranked))
    lines = [Line(name="measured", x=ranks, y=tuple(_positive(sweep.gaps[rank]) for rank in ranks))]
    if law:
        lines.append(Line(name="power law", x=ranks, y=tuple(law.c * rank**-law.p for rank in ranks)))
    lines.append(Line(name="0.01 nats", x=(ranks[0], ranks[-1]), y=(THRESHOLD, THRESHOLD)))
    return Figure(
        title="What a head of lower rank loses",
        x_label="rank",
        y_label="nats per token",
        log_x=True,
        log_y=True,
        lines=tuple(lines),
        note=f"against the full head, {'retrained' if sweep.moved else 'untouched'}",
    )


def _positive(value: float) -> float | None:
    """For a logarithmic axis."""
    return value if value > 0 else None
