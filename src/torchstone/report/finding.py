"""A finding as data: what one analysis of one model found, next to its control.

`torchstone.diagnose` makes findings; `torchstone.report.finding_page` shows them. Nothing here computes. Numbers that do
not exist are null; non-finite numbers are refused, so that the file is valid JSON everywhere.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from torchstone.report.result import Figure, PaperFigure, Record, Table

FINDING_VERSION = 1


class Heatmap(Record):
    """A matrix of numbers drawn as coloured cells. `values[row][column]`; null where there is nothing.

    `diverging` is for signed numbers: the colours then mirror around 0.
    """

    title: str
    x_label: str
    y_label: str
    x: tuple[str | float, ...] = Field(description="one label per column")
    y: tuple[str | float, ...] = Field(description="one label per row")
    values: tuple[tuple[float | None, ...], ...]
    unit: str = ""
    diverging: bool = False
    note: str = ""

    @model_validator(mode="after")
    def _rectangular(self) -> Heatmap:
        if len(self.values) != len(self.y) or any(len(row) != len(self.x) for row in self.values):
            raise ValueError(f"heat map {self.title!r} needs {len(self.y)} rows of {len(self.x)} values.")
        return self


class TokenSpan(Record):
    """A piece of text with a number of its own. `value` is null where there is none; `marked` is what the reader looks for."""

    text: str
    value: float | None = None
    marked: bool = False


class TokenText(Record):
    """A text whose tokens are coloured by a number, some of them marked.

    Attributes:
        title: of the text.
        value_label: what the colours show, unit included; they mirror around 0.
        mark_label: what being marked means.
        spans: the text in order; joined they are the text.
    """

    title: str
    value_label: str
    mark_label: str
    spans: tuple[TokenSpan, ...]
    note: str = ""


class Finding(Record):
    """Everything that a reader of one analysis needs.

    Attributes:
        analysis: name of the analysis, as on the command line (`rope-usage`).
        title, question: one line each.
        subject: the model: path or name, architecture, size.
        answer: what the numbers say, in one to three sentences, control included.
        control: what the numbers are compared with, and why that is the right comparison.
        tables: the first is the main one. Each becomes a CSV file, named by its title. The control's numbers are columns of
            the same table or a table of their own.
        heatmaps, figures, token_texts: for the report.
        paper: the paper's numbers beside ours.
        notes: small print (skipped heads, δ = 0, …).
    """

    schema_version: int = FINDING_VERSION
    analysis: str
    title: str
    question: str
    subject: str
    answer: str
    control: str
    tables: tuple[Table, ...]
    heatmaps: tuple[Heatmap, ...] = ()
    figures: tuple[Figure, ...] = ()
    token_texts: tuple[TokenText, ...] = ()
    paper: tuple[PaperFigure, ...] = ()
    notes: tuple[str, ...] = ()
    created: str = Field(default="", description="UTC, ISO 8601; set when the finding is written")
    command: str = ""
    environment: dict[str, str] = {}
