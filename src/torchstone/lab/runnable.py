"""A study with the button to run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchstone.lab.progress import Progress
from torchstone.lab.runner import Finished, RunOptions, run_study
from torchstone.lab.study import Study


@dataclass(frozen=True)
class Runnable:
    """A study with the button to run it: what `torchstone.studies[slug]` gives."""

    study: Study

    def run(
        self,
        scale: str = "toy",
        *,
        seeds: int | None = None,
        out: str | Path | None = None,
        on: str = "local",
        jobs: int | None = None,
        max_seeds: int | None = None,
        progress: Progress | None = None,
    ) -> Finished:
        """Run the study and write `result.json`, `report.html` and `report.md` into `out`.

        Args:
            scale: one of `scales`.
            seeds: number of paired seeds; None takes the scale's.
            out: directory; None makes `runs/<name>-<scale>-<fingerprint>`. The same directory continues.
            on: `local` (processes on this machine), `inline` (this process), `ray` or `ray://address`.
            jobs: worker processes; None chooses from cores and model size.
            max_seeds: if given, seeds are added up to this number under the group-sequential rule until every
                claim is decided.
            progress: where progress is shown; None chooses by the terminal.

        Raises:
            StudyError: unknown scale, or `out` holds a different study.
        """
        options = RunOptions(scale=scale, seeds=seeds, out=out, on=on, jobs=jobs, max_seeds=max_seeds)
        return run_study(self.study, options, progress=progress)
