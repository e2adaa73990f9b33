"""Run a study: cells in an executor, each once, then verdicts, then the report.

Order of things
  1. resolve arms and check claims; hash everything that matters into the plan's fingerprint
  2. open the directory: it continues the same plan, and refuses any other
  3. prepare once (data, precision), in a worker
  4. cells: arms × seeds, each under a lease, results kept by fingerprint
  5. verdicts; under a sequential design, more seeds until every claim is decided or the maximum is reached
  6. result.json, report.html, report.md

An interrupt stops the workers (training saves its checkpoint) and the same command continues.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from torchstone import errors
from torchstone.errors import InterruptedRun, StudyError, TorchstoneError
from torchstone.lab.describe import before
from torchstone.lab.environment import cores, environment
from torchstone.lab.executors import Event, Executor, Job, make_executor
from torchstone.lab.progress import Progress, choose_progress
from torchstone.lab.record import CellRecords, Outcome, measurement_of
from torchstone.lab.study import Arm, Cell, Scale, Study, Summary
from torchstone.lab.verdict import Design, judge
from torchstone.recipe.fingerprint import code_fingerprint, device_class, torch_version
from torchstone.report.result import ArmRecord, CellRecord, Result, Verdict
from torchstone.report.write import write
from torchstone.stats.decision import expected_false_holds
from torchstone.storage.atomic import atomic_write
from torchstone.storage.hashing import fingerprint_of
from torchstone.storage.journal import Journal
from torchstone.storage.lease import Lease

WAIT_SECONDS = 0.5
LEASE_SECONDS = 30.0


@dataclass(frozen=True)
class RunOptions:
    """How to run: see `Study.run` for the meaning of each."""

    scale: str = "toy"
    seeds: int | None = None
    out: str | Path | None = None
    on: str = "local"
    jobs: int | None = None
    max_seeds: int | None = None


@dataclass(frozen=True)
class Finished:
    """A finished run: the result, and the directory that holds it with its report."""

    result: Result
    directory: Path

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One verdict per claim."""
        return self.result.verdicts

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.directory / "report.html"


class StudyRun:
    """One study in one directory."""

    def __init__(self, study: Study, options: RunOptions, progress: Progress) -> None:
        if options.scale not in study.scales:
            raise StudyError(f"scale {options.scale!r} is not one of this study's: {', '.join(study.scales)}.")
        self.study, self.options, self.progress = study, options, progress
        self.scale: Scale = study.scales[options.scale]
        self.arms: list[Arm] = study.check(self.scale)
        self.fingerprint = self._plan_fingerprint()
        self.out = Path(options.out) if options.out else self._default_directory()
        self.records = CellRecords(self.out)
        self.prepared: dict[str, Any] = {}
        self._running: dict[str, tuple[tuple[str, int], Lease]] = {}

    def _plan_fingerprint(self) -> str:
        return fingerprint_of(
            {
                "study": self.study.reference(),
                "identity": self.study.identity(),
                "arms": [asdict(arm) for arm in self.arms],
                "scale": [self.options.scale, dict(self.scale.settings)],
                "code": code_fingerprint(),
                "torch": torch_version(),
                "device": device_class(),
            }
        )

    def _default_directory(self) -> Path:
        name = self.study.slug or "compare"
        return Path("runs") / f"{name}-{self.options.scale}-{self.fingerprint[:10]}"

    def open(self) -> None:
        """Make the directory, or check that it holds this very plan."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "plan.json"
        if path.exists():
            try:
                found = json.loads(path.read_text())["fingerprint"]
            except (ValueError, KeyError, TypeError) as error:
                raise StudyError(f"{path} is damaged ({error}); choose another --out.") from error
            if found != self.fingerprint:
                raise StudyError(
                    f"{self.out} holds another study (plan {found}, this one is {self.fingerprint}): its arms, claims, scale, "
                    "code, torch version or device differ. Results are never mixed: choose another --out."
                )
            return
        plan = {
            "fingerprint": self.fingerprint,
            "study": self.study.reference(),
            "scale": self.options.scale,
            "arms": [asdict(arm) for arm in self.arms],
        }
        atomic_write(path, json.dumps(plan, indent=1, default=str) + "\n")

    @contextmanager
    def executor(self) -> Iterator[Executor]:
        """The executor that the options ask for; an interrupt stops its workers, which save their checkpoints."""
        resources, on, jobs = self.study.resources(self.arms), self.options.on, self.options.jobs
        slots = jobs or len(resources.devices) or max(1, cores() // resources.threads)
        executor = make_executor(
            on,
            slots=jobs if on.startswith("ray") else slots,
            threads=resources.threads,
            logs=self.out / "logs",
            devices=resources.devices,
        )
        interrupted = True
        try:
            with _interrupt_on_terminate():
                yield executor
            interrupted = False
        except KeyboardInterrupt as stop:
            self.progress.say("stopping; running cells save their checkpoints")
            raise InterruptedRun(
                f"interrupted; finished cells and checkpoints are in {self.out}. The same command continues."
            ) from stop
        finally:
            executor.close(kill=interrupted)
            for _, lease in self._running.values():  # only now that no worker writes any more
                lease.release()
            self._running.clear()

    # ── cells ────────────────────────────────────────────────────────────────────────────────────────────────

    def cell_fingerprint(self, arm: Arm, seed: int) -> str:
        """Fingerprint of one cell: what it computes, with which code, on which kind of device."""
        return fingerprint_of(
            {
                "study": self.study.reference() if self.study.slug else "comparison",
                "arm": dict(arm.settings),
                "seed": seed,
                "scale": dict(self.scale.settings),
                "prepared": self.prepared,
                "code": code_fingerprint(),
                "torch": torch_version(),
                "device": device_class(),
            }
        )

    def cell(self, arm: Arm, seed: int) -> Cell:
        """The cell of an arm and a seed, as `summarise` sees it."""
        directory = self.records.directory(arm.name, seed)
        return Cell(arm, seed, self.options.scale, self.scale.settings, directory, self.prepared)

    def _payload(self, task: str, directory: Path) -> dict[str, Any]:
        return {
            "task": task,
            "reference": self.study.reference(),
            "scale": self.options.scale,
            "settings": dict(self.scale.settings),
            "directory": str(directory),
            "code": code_fingerprint(),
            "torch": torch_version(),
        }

    def prepare(self, executor: Executor) -> None:
        """Do the study's preparation once, in one of the processes that share the directory, and keep its answer."""
        path, lease = self.out / "prepared.json", Lease(self.out / "prepare.lease", ttl=LEASE_SECONDS)
        while not path.exists() and not lease.acquire():
            time.sleep(WAIT_SECONDS)
        try:
            if not path.exists():
                self._prepare(executor, path)
        finally:
            lease.release()
        self.prepared = json.loads(path.read_text())

    def _prepare(self, executor: Executor, path: Path) -> None:
        payload = {
            **self._payload("prepare", self.out / "prepare"),
            "arms": [asdict(arm) for arm in self.arms],
        }
        executor.submit(Job("prepare", payload))
        event = self._final_event(executor)
        if event.kind != "done":
            raise _typed(event.error)
        atomic_write(path, json.dumps(event.value, indent=1) + "\n")

    def _final_event(self, executor: Executor) -> Event:
        while True:
            for event in executor.wait(WAIT_SECONDS):
                if event.kind != "progress":
                    return event

    def run_cells(self, executor: Executor, seeds: Sequence[int], title: str) -> dict[tuple[str, int], Outcome]:
        """Every arm × seed, from the records where they exist; a cell whose worker died is an outcome with an error."""
        wanted = {(arm.name, seed): arm for seed in seeds for arm in self.arms}
        outcomes: dict[tuple[str, int], Outcome] = {}
        self._take_records(wanted, outcomes)
        self.progress.stage(title, len(wanted), len(outcomes))
        while len(outcomes) < len(wanted):
            self._fill(executor, wanted, outcomes, self._running)
            if not self._running:  # every open cell is leased by another process
                time.sleep(WAIT_SECONDS)
                self._take_records(wanted, outcomes, announce=True)
                continue
            for event in executor.wait(WAIT_SECONDS):
                self._handle(event, outcomes, self._running)
        return outcomes

    def _take_records(
        self,
        wanted: dict[tuple[str, int], Arm],
        outcomes: dict[tuple[str, int], Outcome],
        announce: bool = False,
    ) -> None:
        for key, arm in wanted.items():
            if key not in outcomes:
                found = self.records.read(arm.name, key[1], self.cell_fingerprint(arm, key[1]))
                if found is not None:
                    outcomes[key] = found
                    if announce:
                        self.progress.ended(f"{key[0]} seed {key[1]} (by another process)", found.error)

    def _fill(
        self,
        executor: Executor,
        wanted: dict[tuple[str, int], Arm],
        outcomes: dict[tuple[str, int], Outcome],
        running: dict[str, tuple[tuple[str, int], Lease]],
    ) -> None:
        """Start cells while the executor has room, skipping those that another process holds."""
        for key, arm in wanted.items():
            if len(running) >= executor.slots:
                return
            name = f"{key[0]} seed {key[1]}"
            if key in outcomes or name in running:
                continue
            directory = self.records.directory(*key)
            directory.mkdir(parents=True, exist_ok=True)
            lease = Lease(directory / "cell.lease", ttl=LEASE_SECONDS)
            if not lease.acquire():
                continue
            found = self.records.read(arm.name, key[1], self.cell_fingerprint(arm, key[1]))
            if found is not None:  # another process finished it a moment ago
                outcomes[key] = found
                lease.release()
                continue
            running[name] = (key, lease)
            payload = {
                **self._payload("measure", directory),
                "arm": asdict(arm),
                "seed": key[1],
                "prepared": self.prepared,
            }
            self.progress.started(name)
            executor.submit(Job(name, payload))

    def _handle(
        self,
        event: Event,
        outcomes: dict[tuple[str, int], Outcome],
        running: dict[str, tuple[tuple[str, int], Lease]],
    ) -> None:
        if event.kind == "progress":
            self.progress.moved(event.key, event.value)
            return
        key, lease = running.pop(event.key)
        arm = next(arm for arm in self.arms if arm.name == key[0])
        fingerprint = self.cell_fingerprint(arm, key[1])
        if event.kind == "done":
            outcome = Outcome(fingerprint, measurement_of(event.value["measurement"]), "", event.value["seconds"])
        else:
            outcome = Outcome(fingerprint, None, event.error)
        if event.kind != "died":
            self.records.write(arm.name, key[1], outcome)
        outcomes[key] = outcome
        lease.release()
        self.progress.ended(event.key, outcome.error)

    # ── result ───────────────────────────────────────────────────────────────────────────────────────────────

    def cell_records(self, outcomes: dict[tuple[str, int], Outcome]) -> tuple[CellRecord, ...]:
        """The outcomes as the report's records."""
        records = []
        for (name, seed), outcome in outcomes.items():
            found = outcome.measurement
            records.append(
                CellRecord(
                    arm=name,
                    seed=seed,
                    status="done" if found else "failed",
                    error=outcome.error,
                    fingerprint=outcome.fingerprint,
                    seconds=outcome.seconds,
                    metrics=dict(found.metrics) if found else {},
                    series=dict(found.series) if found else {},
                    tokens=found.tokens if found else None,
                    flops=found.flops if found else None,
                    peak_bytes=found.peak_bytes if found else None,
                )
            )
        return tuple(records)

    def summary(self, outcomes: dict[tuple[str, int], Outcome]) -> Summary:
        """The study's own tables and figures, from the cells that went well."""
        arms = {arm.name: arm for arm in self.arms}
        done = [
            (self.cell(arms[name], seed), outcome.measurement)
            for (name, seed), outcome in outcomes.items()
            if outcome.measurement is not None
        ]
        return self.study.summarise(done) if done else Summary(paper=self.study.paper)

    def result(
        self,
        outcomes: dict[tuple[str, int], Outcome],
        verdicts: Sequence[Verdict],
        design: str,
        notes: Sequence[str],
    ) -> Result:
        """Everything for the report."""
        summary = self.summary(outcomes)
        records: list[ArmRecord] = [self.study.arm_record(arm) for arm in self.arms]
        return Result(
            title=self.study.title,
            question=self.study.question,
            slug=self.study.slug,
            scale=self.options.scale,
            design=design,
            fingerprint=self.fingerprint,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=self.study.command(self.options.scale, self.options.seeds, self.options.max_seeds),
            baseline=self.study.baseline,
            metrics=self.study.metrics,
            arms=tuple(records),
            cells=self.cell_records(outcomes),
            verdicts=tuple(verdicts),
            tables=summary.tables,
            figures=summary.figures,
            paper=summary.paper or self.study.paper,
            notes=(*self.study.notes(), *summary.notes, *notes),
            environment=environment(device_class()),
            recipe_yaml=self.study.recipe_yaml(self.arms),
        )


def _typed(error: str) -> TorchstoneError:
    """The error that a worker's words stand for, so that bad data keeps its exit code; see `worker.failure`."""
    name, _, text = error.partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, TorchstoneError):
        return kind(text)
    return StudyError(f"the study cannot be prepared: {error}")


@contextmanager
def _interrupt_on_terminate() -> Iterator[None]:
    """Inside the block SIGTERM is the same as Ctrl-C (in the main thread; elsewhere nothing changes)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_study(study: Study, options: RunOptions, progress: Progress | None = None) -> Finished:
    """Run a study to its verdict and write the report; see the module's docstring for the order of things.

    Raises:
        StudyError: unknown scale, unusable arms, or a directory that holds another study.
        InterruptedRun: a signal came; the same command continues.
    """
    shown = progress or choose_progress()
    try:
        return _run(study, options, shown)
    finally:
        shown.close()


def _run(study: Study, options: RunOptions, shown: Progress) -> Finished:
    if options.jobs is not None and options.jobs < 1:
        raise StudyError(f"jobs must be at least 1; given {options.jobs}.")
    run = StudyRun(study, options, shown)
    design = Design.of(run.scale.seeds if options.seeds is None else options.seeds, options.max_seeds)
    if design.sequential is not None and any(claim.unit == "items" for claim in study.claims):
        raise StudyError(
            "this study's claims rest on items, not on seeds; adding seeds until they are decided would not hold the error "
            "rate. Run it without --until-decided."
        )
    run.open()
    for line in before(study, run.arms, design):
        shown.say(line)
    outcomes: dict[tuple[str, int], Outcome] = {}
    verdicts: list[Verdict] = []
    with run.executor() as executor:
        run.prepare(executor)
        for look, n in enumerate(design.looks):
            title = study.title if len(design.looks) == 1 else f"{study.title}, look {look + 1}"
            outcomes |= run.run_cells(executor, range(n), title)
            verdicts = judge(study, outcomes, design, look, verdicts)
            if all(verdict.status != "inconclusive" for verdict in verdicts):
                break
    seeds = len({seed for _, seed in outcomes})
    notes = [*_chance(len(verdicts)), *_earlier_numbers(Journal(run.out / "history.jsonl"), seeds, design)]
    result = run.result(outcomes, verdicts, design.describe(), notes)
    write(result, run.out)
    return Finished(result, run.out)


def _chance(claims: int) -> list[str]:
    """How many claims would hold by chance; every claim is judged alone."""
    if claims < 2:
        return []
    expected = expected_false_holds(claims)
    return [
        f"Every claim is judged alone: of {claims} claims about arms that do nothing, {expected:.2g} hold on average."
    ]


def _earlier_numbers(history: Journal, seeds: int, design: Design) -> list[str]:
    """Remember how many seeds this verdict used and under which design; warn if numbers were seen under another."""
    now = {"seeds": seeds, "looks": list(design.looks)}
    others = [record for record in history.read().records if record.get("looks") != now["looks"]]
    history.append(now)
    if not others:
        return []
    listed = ", ".join(sorted({str(record.get("seeds")) for record in others}))
    return [
        f"A verdict with {listed} seeds had been seen in this directory before this one with {seeds}; the error rate does not "
        "cover that. Declare the number of seeds beforehand, or use --until-decided in a fresh directory."
    ]
