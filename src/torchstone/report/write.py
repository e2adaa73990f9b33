"""Write a result and its reports into a directory, each file all or nothing, and read a result back.

`result.json` is the truth and is written first; `report.md` and `report.html` are made from it and can be
made again. A file is replaced by renaming a finished one over it, so a process that is killed while it writes
leaves the old report as it was.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from torchstone.errors import StudyError
from torchstone.report import html, markdown
from torchstone.report.result import SCHEMA_VERSION, Result
from torchstone.storage.atomic import atomic_write

RESULT, MARKDOWN, HTML = "result.json", "report.md", "report.html"


def write(result: Result, directory: Path) -> Path:
    """Write `result.json`, `report.md` and `report.html` into `directory`; returns the path of
    `report.html`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.model_dump(mode="json"), ensure_ascii=False, indent=1, allow_nan=False)
    atomic_write(directory / RESULT, text + "\n")
    return render(result, directory)


def render(result: Result, directory: Path) -> Path:
    """Write `report.md` and `report.html` only; returns the path of `report.html`."""
    directory = Path(directory)
    atomic_write(directory / MARKDOWN, markdown.page(result))
    atomic_write(directory / HTML, html.page(result))
    return directory / HTML


def load(directory: Path) -> Result:
    """Read `result.json` of `directory` (or the file itself).

    Raises:
        StudyError: there is none, it is damaged, or a newer torchstone wrote it.
    """
    path = Path(directory)
    path = path if path.is_file() else path / RESULT
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(
            f"{path.parent} holds no {RESULT}. Give the directory of a finished `study run` or `compare`."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise StudyError(
            f"{path} cannot be read as JSON: {error}. It is damaged; run the same command again to make it anew."
        ) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise StudyError(
            f"{path} has schema version {version}, this torchstone reads up to {SCHEMA_VERSION}. Upgrade torchstone."
        )
    try:
        return Result.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"]) or "the top level"
        raise StudyError(
            f"{path} is not a result: at {where}, {first['msg']} ({error.error_count()} problems "
            "in all). It is "
            "damaged or was edited; run the same command again to make it anew."
        ) from error
