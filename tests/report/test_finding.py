"""Findings on disk: page, pictures, tables, hostile names, sizes."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from torchstone.report import finding_page, heatmap
from torchstone.report.finding import Finding, Heatmap
from torchstone.report.finding_write import as_csv, write
from torchstone.report.result import Figure, Line, PaperFigure, Table
from torchstone.report.shell import MOST_BYTES

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e=cmd"
SVG = "{http://www.w3.org/2000/svg}"


def a_map(rows: int = 3, columns: int = 4, **changes: Any) -> Heatmap:
    values = tuple(tuple(float(r * columns + c) for c in range(columns)) for r in range(rows))
    given: dict[str, Any] = {
        "title": "Usage", "x_label": "pair", "y_label": "layer", "x": tuple(map(float, range(columns))),
        "y": tuple(map(str, range(rows))), "values": values,
    }  # fmt: skip
    return Heatmap(**(given | changes))


def a_finding(**changes: Any) -> Finding:
    given: dict[str, Any] = {
        "analysis": "rope-usage", "title": "Frequencies", "question": "Which?", "subject": "tiny", "answer": "Slow ones.",
        "control": "Random weights.",
        "tables": (Table(title="Heads", columns=("layer", "share"), rows=((0, 0.123456789012), (1, None))),),
        "heatmaps": (a_map(), a_map(title="Signed", diverging=True)),
        "figures": (Figure(title="Curve", x_label="tokens", y_label="nats", log_x=True,
                           lines=(Line(name="own", x=(64, 128), y=(2.0, 1.0), low=(1.9, 0.9), high=(2.1, 1.1)),)),),
        "paper": (PaperFigure(setting="7B", paper="1", ours="2"),), "notes": ("δ = 0",),
        "command": "torchstone diagnose rope-usage tiny", "created": "2026-11-21T10:00:00Z",
    }  # fmt: skip
    return Finding(**(given | changes))


def test_every_file_is_written_and_says_the_same(tmp_path: Path) -> None:
    finding = a_finding(tables=(*a_finding().tables, Table(title="Heads", columns=("a",), rows=((1,),))))
    page = write(finding, tmp_path / "new" / "folder")
    names = sorted(path.relative_to(page.parent).as_posix() for path in page.parent.rglob("*") if path.is_file())
    assert names == ["figures/curve.svg", "figures/signed.svg", "figures/usage.svg", "finding.json", "heads-1.csv",
                     "heads.csv", "report.html", "report.md"]  # fmt: skip
    assert Finding.model_validate(json.loads((page.parent / "finding.json").read_text())) == finding
    with (page.parent / "heads.csv").open() as stream:
        assert list(csv.reader(stream)) == [["layer", "share"], ["0", "0.123456789012"], ["1", ""]]
    for text in (page.read_text(), (page.parent / "report.md").read_text()):
        assert all(
            part in text for part in ("Slow ones.", "Random weights.", "Frequencies", "δ = 0", "rope-usage tiny")
        )


def test_an_earlier_finding_leaves_no_files_and_nothing_else_is_touched(tmp_path: Path) -> None:
    write(a_finding(), tmp_path)
    (tmp_path / "mine.csv").write_text("1")
    (tmp_path / "figures" / "mine.svg").write_text("<svg/>")
    (tmp_path / "head-8.json").write_text("{}")
    write(a_finding(tables=(Table(title="Other", columns=("a",), rows=((1,),)),), heatmaps=(a_map(),)), tmp_path)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["figures/curve.svg", "figures/mine.svg", "figures/usage.svg", "finding.json", "head-8.json", "mine.csv",
                     "other.csv", "report.html", "report.md"]  # fmt: skip


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"tables": []}', b"\xff"])
def test_where_no_finding_can_be_read_nothing_is_removed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "finding.json").write_bytes(content)
    (tmp_path / "old.csv").write_text("1")
    write(a_finding(), tmp_path)
    assert (tmp_path / "old.csv").exists() and (tmp_path / "heads.csv").exists()


def test_tables_of_like_titles_have_different_files(tmp_path: Path) -> None:
    tables = tuple(Table(title=title, columns=("a",), rows=()) for title in ("a 2", "a", "a"))
    write(a_finding(tables=tables), tmp_path)
    assert len(list(tmp_path.glob("*.csv"))) == 3


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    table = Table(title=HOSTILE, columns=(HOSTILE, "x"), rows=((HOSTILE, "=1+1"),))
    finding = a_finding(
        title=HOSTILE, subject=HOSTILE, answer=HOSTILE, control=HOSTILE, question=HOSTILE, notes=(HOSTILE,), tables=(table,),
        heatmaps=(a_map(title=HOSTILE, x_label=HOSTILE, y=(HOSTILE, "1", "2"), unit=HOSTILE, note=HOSTILE),),
        command=HOSTILE, environment={HOSTILE: HOSTILE},
    )  # fmt: skip
    page = write(finding, tmp_path).read_text()
    assert "<img" not in page and "\u202e" not in page and page.count("<script") == page.count("</script>") == 4
    for path in (tmp_path / "figures").iterdir():
        assert not xml.parse(path).getroot().findall(f".//{SVG}img")
    assert "'=1+1" in next(tmp_path.glob("*.csv")).read_text()


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\n"])
def test_spreadsheets_get_no_formulas(start: str) -> None:
    text = as_csv(Table(title="t", columns=("a", "b"), rows=((f"{start}x", -1.5),)))
    assert list(csv.reader(io.StringIO(text)))[1] == [f"'{start}x", "-1.5"]


def test_every_cell_has_its_colour_and_its_words() -> None:
    one = a_map(values=((0.0, None, 2.0, 3.0), (4.0, 5.0, 6.0, 7.0), (8.0, 9.0, 10.0, 11.0)))
    picture = xml.fromstring(heatmap.svg(one))
    cells = [cell for cell in picture.findall(f"{SVG}rect") if cell.find(f"{SVG}title") is not None]
    assert len(cells) == 12
    assert cells[1].get("fill") == heatmap.NOTHING
    assert cells[0].get("fill") == heatmap.color(0.0, False) != cells[-1].get("fill") == heatmap.color(1.0, False)
    assert cells[-1].find(f"{SVG}title").text == "layer 2, pair 3: 11"


def boxes(one: Heatmap) -> tuple[list[tuple[float, float, float]], float, float]:
    """Of the columns' labels: the end of each, and left and lower edge of all, as wide as a wide font draws them; the
    picture's height."""
    picture = xml.fromstring(heatmap.svg(one))
    height = float(picture.get("viewBox", "").split()[3])
    bottom = max(
        float(cell.get("y")) + float(cell.get("height")) for cell in picture.findall(f"{SVG}rect") if len(cell)
    )
    found = []
    for label in picture.findall(f"{SVG}text"):
        x, y, width = float(label.get("x")), float(label.get("y")), heatmap.LETTER * len(label.text or "")
        if not bottom < y < bottom + 16 or label.get("text-anchor") == "start":
            continue
        turned = re.match(r"rotate\(-(\d+)", label.get("transform") or "")
        angle = math.radians(float(turned[1])) if turned else 0.0
        left = x - width * math.cos(angle) if turned else x - width / 2
        right = x if turned else x + width / 2
        found.append((left, right, y + width * math.sin(angle)))
        assert turned is None or label.get("text-anchor") == "end"
    return found, bottom, height


@pytest.mark.parametrize("rows", [2, 12])
@pytest.mark.parametrize("names", [
    [f"{10 ** (-m / 8):.3g} rad ({6.28 * 10 ** (m / 8):.3g} tokens)" for m in range(count)] for count in (4, 32, 64)
], ids=len)  # fmt: skip
def test_long_labels_are_turned_and_do_not_touch(names: list[str], rows: int) -> None:
    labels, _, height = boxes(a_map(rows, len(names), x=tuple(names)))
    assert min(len(names), 4) <= len(labels) <= len(names)
    ends = [right for _, right, _ in labels]
    assert all(b - a >= heatmap.LINE - 0.1 for a, b in zip(ends, ends[1:], strict=False))
    assert all(left >= 0 and lower < height for left, _, lower in labels)


@pytest.mark.parametrize("names", [[str(i) for i in range(100)], [f"{i}-{i + 9}" for i in range(0, 300, 10)], ["only"]])
def test_short_labels_lie_and_do_not_touch(names: list[str]) -> None:
    labels, bottom, _ = boxes(a_map(3, len(names), x=tuple(names)))
    assert labels and all(lower < bottom + 16 for _, _, lower in labels)
    assert all(a[1] < b[0] for a, b in zip(labels, labels[1:], strict=False))


def test_the_cells_begin_right_of_long_names_of_rows() -> None:
    picture = xml.fromstring(heatmap.svg(a_map(y=("the first of the rows here", "1", "2"))))
    first = next(cell for cell in picture.findall(f"{SVG}rect") if len(cell))
    label = next(text for text in picture.findall(f"{SVG}text") if (text.text or "").startswith("the first"))
    assert float(label.get("x")) < float(first.get("x"))
    assert float(label.get("x")) - heatmap.LETTER * len(label.text or "") > 20  # right of the name of the axis


def test_signed_colours_mirror_around_zero() -> None:
    one = a_map(1, 3, values=((-1.0, 0.0, 4.0),), diverging=True)
    assert heatmap.value_range(one) == (-4.0, 4.0)
    assert heatmap.value_range(a_map(1, 2, values=((None, None),))) == (0.0, 1.0)
    low, high = heatmap.value_range(a_map(1, 2, values=((3.0, 3.0),)))
    assert low < high


def test_large_maps_are_left_to_the_files_and_pages_stay_small() -> None:
    large = a_map(130, 100)
    page = finding_page.page(a_finding(heatmaps=(large, a_map(90, 64))))
    assert "13,000 cells are too many to draw" in page and len(page.encode()) <= MOST_BYTES


def test_ragged_maps_and_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValidationError, match="3 rows of 4"):
        a_map(values=((1.0,),))
    with pytest.raises(ValidationError):
        a_map(1, 1, values=((float("nan"),),))


@pytest.mark.parametrize("y", [(None, None), (1.0, 1.0), (-5.0, 3.0)])
@pytest.mark.parametrize("log", [False, True])
def test_still_line_charts_are_drawn_for_any_numbers(tmp_path: Path, y: tuple[float | None, ...], log: bool) -> None:
    figure = Figure(
        title="c", x_label="x", y_label="y", log_x=log, log_y=log, lines=(Line(name="n", x=(0.0, 10.0), y=y),)
    )
    write(a_finding(figures=(figure, Figure(title="none", x_label="", y_label="", lines=()))), tmp_path)
    root = xml.parse(tmp_path / "figures" / "c.svg").getroot()
    assert "nan" not in xml.tostring(root).decode()
