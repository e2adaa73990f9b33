"""The page: self-contained, admitted by hash, complete, small, ordered."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from types import ModuleType

import pytest

from torchstone.report import html
from torchstone.report.result import CellRecord, Pair, Result, Table

NAMES = ["study", "many-arms", "many-cells", "algorithm", "nothing", "one-arm", "hostile"]
VOID = {"meta", "link", "br", "hr", "input", "wbr"}


class Page(HTMLParser):
    """A parsed page: elements with attributes, text, raw contents of scripts and styles; checks nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            tag, attributes, before = self.raw[-1]
            self.raw[-1] = (tag, attributes, before + data)
        else:
            self.text += data

    def data(self, identifier: str) -> dict:
        return next(json.loads(text) for _, attributes, text in self.raw if attributes.get("id") == identifier)


@pytest.fixture(scope="module")
def pages(results: ModuleType) -> dict[str, str]:
    return {name: html.page(results.BUILDERS[name]()) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_admits_exactly_the_scripts_and_styles_of_the_page(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    admitted = set(re.findall(r"'sha256-[^']+'", policy))
    found = {
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for tag, attributes, text in page.raw
        if attributes.get("type") != "application/json"
    }
    assert found == admitted and len(found) == 3


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_requested_and_nothing_is_inline(pages: dict[str, str], name: str) -> None:
    allowed_links = re.compile(r"#[a-z-]+\d*$|\./result\.json$|data:,$")
    for tag, attributes in Page(pages[name]).elements:
        assert tag not in {
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "video",
            "audio",
            "source",
            "use",
        }
        assert not any(key.startswith("on") or key in ("style", "src", "srcset", "action") for key in attributes)
        assert "href" not in attributes or allowed_links.match(attributes["href"] or "")


@pytest.mark.parametrize("name", NAMES)
def test_small_with_ordered_headings_unique_ids_and_landmarks(pages: dict[str, str], name: str) -> None:
    assert len(pages[name].encode()) <= html.MOST_BYTES
    page = Page(pages[name])
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [(a["href"] or "")[1:] for tag, a in page.elements if tag == "a" and (a["href"] or "").startswith("#")]
    assert set(targets) <= set(ids)
    tags = [tag for tag, _ in page.elements]
    assert all(tags.count(landmark) == 1 for landmark in ("main", "nav", "footer"))
    roles = [attributes for _, attributes in page.elements if attributes.get("role") in ("img", "region", "group")]
    assert all(attributes.get("aria-label") for attributes in roles)


def test_everything_of_a_study_is_shown(results: ModuleType, pages: dict[str, str]) -> None:
    result = results.study()
    text = Page(pages["study"]).text
    for verdict in result.verdicts:
        assert verdict.sentence in text and verdict.reason in text and verdict.claim in text
    failed = next(cell for cell in result.cells if cell.status == "failed")
    assert failed.error in text
    for expected in (
        "model.block.feedforward.hidden",
        "344 → 336",
        "+0.07 %",
        "tuned per arm",
        "about 11 seeds",
        "Sequential looks (3)",
        "Attention noise by layer",
        "60.6 against 57.5",
        "410 MiB",
        result.command,
        result.fingerprint,
        result.design,
        *result.notes,
        "2.13.0+cpu",
        "feedforward: {kind: swiglu",
    ):
        assert expected in text


def test_the_numbers_inside_the_page_are_the_result_without_curves(results: ModuleType, pages: dict[str, str]) -> None:
    result = results.study()
    stored = Result.model_validate(Page(pages["study"]).data("report-numbers"))
    bare = [cell.model_copy(update={"series": {}}) for cell in result.cells]
    assert stored == result.model_copy(update={"cells": tuple(bare)})


def test_many_cells_embed_bands_only(pages: dict[str, str]) -> None:
    lines = Page(pages["many-cells"]).data("report-data")["charts"][0]["lines"]
    assert all(line["members"] == [] and line["low"] for line in lines)
    few = Page(pages["study"]).data("report-data")["charts"][0]["lines"]
    assert all(line["members"] for line in few)


def test_a_result_with_too_much_of_everything_stays_small(results: ModuleType) -> None:
    base = results.study(arms=3, seeds=8, points=400)
    curves = {f"layer{layer:02d}/lambda": next(iter(base.cells[0].series.values())) for layer in range(70)}
    cells = [cell.model_copy(update={"series": curves}) for cell in base.cells]
    cells += [
        CellRecord(arm="attention", seed=100 + i, status="failed", error=f"{i} " + "x" * 50_000) for i in range(300)
    ]
    rows = tuple((f"row {index}", index) for index in range(20_000))
    pairs = tuple(Pair(unit=f"item {i}", baseline=1.0, arm=1.0, contrast=i / 5000) for i in range(5000))
    verdicts = tuple(verdict.model_copy(update={"pairs": pairs}) for verdict in base.verdicts)
    tables = (Table(title="long", columns=("a", "b"), rows=rows),)
    page = html.page(base.model_copy(update={"cells": tuple(cells), "tables": tables, "verdicts": verdicts}))
    assert len(page.encode()) <= html.MOST_BYTES
    text = Page(page).text
    assert "10 more curves are in result.json" in text
    assert "more rows are in result.json" in text and "more errors are in result.json" in text


def test_equal_errors_are_shown_once(results: ModuleType) -> None:
    cells = [CellRecord(arm="only", seed=seed, status="failed", error="same trouble") for seed in range(3)]
    page = html.page(results.comparison().model_copy(update={"cells": tuple(cells)}))
    assert Page(page).text.count("same trouble") == 1
    assert "only, seed 0; only, seed 1; only, seed 2" in page


def test_the_forest_plot_puts_effect_interval_margin_and_pairs_in_place(pages: dict[str, str]) -> None:
    card = pages["study"].split('class="card holds"')[1].split("</article>")[0]
    assert card.count('class="pair"') == 3 and card.count('class="effect"') == 1 and card.count('class="margin"') == 1
    margin = float(re.search(r'class="margin" x1="([\d.]+)%"', card)[1])
    effect = float(re.search(r'class="effect" cx="([\d.]+)%"', card)[1])
    neutral = float(re.search(r'class="neutral" x1="([\d.]+)%"', card)[1])
    low, high = re.search(r'class="interval" x1="([\d.]+)%" x2="([\d.]+)%"', card).groups()
    assert float(low) < effect < float(high) < margin < neutral
