"""Pictures of schedules: a well-formed SVG of the course, and text for a terminal."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from torchstone.optim.schedules.plot import samples, svg, text_lines
from torchstone.optim.schedules.wsd_s import wsd_s
from torchstone.recipe.registry import kinds, parse_part

SVG = "{http://www.w3.org/2000/svg}"


def drawn(schedule, title="Learning rate"):
    root = ElementTree.fromstring(svg(schedule, title))
    points = root.find(f"{SVG}polyline").get("points").split()
    return root, [tuple(map(float, point.split(","))) for point in points]


@pytest.mark.parametrize("kind", kinds("schedule"))
@pytest.mark.parametrize("steps", [1, 7, 5000])
def test_every_kind_is_drawn_within_its_frame(kind, steps):
    schedule = parse_part("schedule", kind if steps > 20 else {"kind": kind, "warmup": 0}).build(steps)
    root, points = drawn(schedule)
    width, height = float(root.get("width")), float(root.get("height"))
    assert len(points) == len(samples(schedule)) <= 800
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_the_picture_shows_rates_stages_and_checkpoints():
    schedule = wsd_s(300, ends=[100], peak=2e-3, warmup=20, floor=0.2)
    root, points = drawn(schedule)
    rates = [schedule.lr(step) for step in samples(schedule)]
    heights = [300 - 48 - y for _, y in points]
    assert [height / max(heights) for height in heights] == pytest.approx([rate / 2e-3 for rate in rates], abs=1e-3)
    text = " ".join(item.text for item in root.iter(f"{SVG}text"))
    for word in ("warmup", "stable", "decay", "checkpoint", "100", "300", "peak 0.002"):
        assert word in text
    assert len(list(root.iter(f"{SVG}circle"))) == 3  # two checkpoints and their key


def test_a_title_cannot_break_the_picture():
    root, _ = drawn(wsd_s(10), '<script>"&')
    assert '<script>"&' in [item.text for item in root.iter(f"{SVG}text")]
    assert root.find(f".//{SVG}script") is None


def test_plot_writes_the_file_and_returns_its_path(tmp_path):
    schedule = wsd_s(10)
    assert schedule.plot(tmp_path / "plan.svg", "My plan") == tmp_path / "plan.svg"
    assert (tmp_path / "plan.svg").read_text() == svg(schedule, "My plan")


@pytest.mark.parametrize("plain", [False, True])
def test_text_shows_the_course_and_marks_every_checkpoint(plain):
    schedule = wsd_s(1200, ends=[400], decay=0.5, floor=0.25)
    lines = text_lines(schedule, width=60, height=8, plain=plain)
    assert len(lines) == 10 and all(len(line) <= 9 + 60 for line in lines)
    body = [line[9:].ljust(60) for line in lines[:8]]
    filled = [sum(row[column] != " " for row in body) for column in range(60)]
    assert filled[:10] == [8] * 10 and filled[22:38] == [8] * 16
    assert filled[19] < 4 > filled[59]
    assert [match.start() - 9 for match in re.finditer(r"\^", lines[8])] == [19, 59]
    assert "1,200" in lines[9]
    assert not plain or "".join(lines).isascii()


def test_text_of_a_short_run_has_a_column_for_each_step():
    assert text_lines(wsd_s(3), width=60)[-2].endswith("--^")
