"""The report in a real browser: charts, switches, no requests, hostile names, phones, dark mode."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from torchstone.report.result import Result

Open = Callable[..., Any]


def test_charts_are_drawn_without_console_messages_or_requests(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.study())
    assert page.console() == []
    assert [page.plot(index) for index in range(3)] == [
        {"axis": "tokens", "series": "9", "shown": "9"},
        {"axis": "tokens", "series": "9", "shown": "9"},
        {"axis": "x", "series": "5", "shown": "5"},
    ]
    assert all(page.painted(index) > 10 for index in range(3))
    assert set(page.requests()) <= {page.path.as_uri(), "data:,"}


def test_nothing_leaves_the_page_while_it_is_used(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.study())
    for selector in ("button[data-axis='1']", "[data-toggle=log]", "[data-toggle=seeds]", ".key", "summary"):
        page.click(selector)
    addresses = page.requests()
    assert addresses and all(address == page.path.as_uri() or address.startswith("data:") for address in addresses)
    assert page.console() == []


def test_an_arm_is_hidden_and_shown_again(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.study())
    before = page.painted()
    page.click("#curve-0 [data-line='1']")
    assert page.plot()["shown"] == "6"
    assert (
        page.run("return document.querySelector(\"#curve-0 [data-line='1']\").getAttribute('aria-pressed')") == "false"
    )
    assert page.painted() != before
    page.click("#curve-0 [data-line='1']")
    assert page.plot()["shown"] == "9"


def test_a_double_click_shows_one_arm_alone(open_report: Open, results: ModuleType) -> None:
    from selenium.webdriver import ActionChains

    page = open_report(results.study())
    key = page.driver.find_element("css selector", "#curve-0 [data-line='2']")
    for shown in ("3", "9"):
        ActionChains(page.driver).double_click(key).perform()
        assert page.plot()["shown"] == shown


def test_the_axis_is_switched(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.study())
    for position, axis in enumerate(("tokens", "flops", "seconds", "steps")):
        page.click(f"#curve-0 button[data-axis='{position}']")
        assert page.plot()["axis"] == axis
        pressed = page.run(
            "return [...document.querySelectorAll('#curve-0 button[data-axis]')].map((b) => "
            "b.getAttribute('aria-pressed'))"
        )
        assert pressed == ["true" if index == position else "false" for index in range(4)]
        assert page.painted() > 10
    assert page.plot(1)["axis"] == "tokens"


def test_single_seeds_log_scale_and_ranges(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.study())
    page.click("#curve-0 [data-toggle=seeds]")
    assert page.plot()["series"] == str(9 + 3 + 3 + 2)
    for toggle in ("log", "whole", "half"):
        before = page.painted()
        page.click(f"#curve-0 [data-toggle={toggle}]")
        assert page.painted() > 10 and before > 10
    assert page.console() == []


def test_the_pointer_reads_values(open_report: Open, results: ModuleType) -> None:
    from selenium.webdriver import ActionChains

    page = open_report(results.study())
    readings = "return [...document.querySelectorAll('#curve-0 .reading')].map((span) => span.textContent)"
    rest = page.run(readings)
    over = page.driver.find_element("css selector", "#curve-0 .u-over")
    page.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", over)
    ActionChains(page.driver).move_to_element_with_offset(over, -120, 0).perform()
    moved = page.run(readings)
    assert all(before != after for before, after in zip(rest, moved, strict=True))
    assert page.run("return document.querySelector('#curve-0 .at').textContent").startswith("tokens ")


def test_keys_work_from_the_keyboard(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.study())
    page.run("document.querySelector(\"#curve-0 [data-line='0']\").focus()")
    page.driver.switch_to.active_element.send_keys(" ")
    assert page.plot()["shown"] == "6"


def test_hostile_names_stay_text(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.hostile())
    page.click("[data-toggle=log]")
    page.click(".key")
    assert page.run("return window.hacked") is None
    assert page.run("return document.querySelectorAll('script').length") == 4
    assert page.run("return document.querySelectorAll('img, iframe, object, embed').length") == 0
    assert page.run("return document.querySelector('h1').textContent") == results.HOSTILE[0]
    assert page.run("return document.querySelector('#curve-0 [data-line=\"1\"] bdi').textContent") == results.HOSTILE[1]
    assert page.console() == []
    assert all(address == page.path.as_uri() or address.startswith("data:") for address in page.requests())


def test_the_policy_stops_a_script_that_was_put_in(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.study())
    tampered = page.path.with_name("tampered.html")
    text = page.path.read_text(encoding="utf-8")
    tampered.write_text(
        text.replace("<main", "<script>window.hacked=1</script><img src=x onerror=window.hacked=2><main", 1)
    )
    page.driver.get(tampered.as_uri())
    assert page.run("return window.hacked") is None
    assert any("Content Security Policy" in message for message in page.console())


@pytest.mark.parametrize("name", ["study", "hostile", "algorithm", "many-arms", "nothing"])
def test_a_phone_never_scrolls_sideways(open_report: Open, results: ModuleType, name: str) -> None:
    page = open_report(results.BUILDERS[name](), width=390)
    assert page.run("return document.documentElement.scrollWidth") <= 390
    page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.run("return document.documentElement.scrollWidth") <= 390
    wide = page.run("return [...document.querySelectorAll('.plot canvas')].map((c) => c.getBoundingClientRect().right)")
    assert all(right <= 390 for right in wide)


def test_dark_mode_changes_page_and_charts(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.study(), scheme="dark")
    background = "return getComputedStyle(document.body).backgroundColor"
    pixels = "return document.querySelector('.plot canvas').toDataURL()"
    dark, dark_chart = page.run(background), page.run(pixels)
    light_scheme = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", light_scheme)
    deadline = time.monotonic() + 5
    while page.run(pixels) == dark_chart and time.monotonic() < deadline:
        time.sleep(0.05)
    light, light_chart = page.run(background), page.run(pixels)

    def level(color: str) -> int:
        return sum(int(part) for part in color.strip("rgba()").split(",")[:3])

    assert level(dark) < 150 < 600 < level(light)
    assert dark_chart != light_chart


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_report: Open, results: ModuleType, scheme: str) -> None:
    page = open_report(results.study(), scheme=scheme)
    pairs = page.run(
        "const style = getComputedStyle(document.documentElement); const get = (n) => "
        "style.getPropertyValue(n).trim();"
        "return "
        "[['--ink','--page'],['--muted','--page'],['--muted','--sunken'],['--muted','--panel'],['--link','--page'],"
        "['--holds','--holds-tint'],['--fails','--fails-tint'],['--inconclusive','--inconclusive-tint']]"
        ".map(([a, b]) => [get(a), get(b)]);"
    )

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for text, ground in pairs:
        high, low = sorted((luminance(text), luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_the_numbers_can_be_saved(open_report: Open, results: ModuleType, tmp_path: Path) -> None:
    page = open_report(results.study())
    folder = tmp_path / "downloads"
    folder.mkdir()
    page.driver.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    page.click("#download")
    deadline = time.monotonic() + 5
    while not (folder / "result.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    saved = Result.model_validate(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    assert saved.verdicts == results.study().verdicts


def test_without_curves_there_is_no_chart_and_no_message(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.algorithm())
    assert page.run("return document.querySelectorAll('.plot').length") == 0
    assert page.run("return document.querySelectorAll('.card').length") == 2
    assert page.console() == []


def test_hundreds_of_cells_are_drawn_as_bands(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.BUILDERS["many-cells"]())
    assert page.plot() == {"axis": "tokens", "series": "24", "shown": "24"}
    assert page.painted() > 10


def test_every_claim_is_linked_from_the_top(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.study())
    page.click(".outcomes li:nth-child(3) a")
    assert page.run("return location.hash") == "#claim-2"
    assert page.run("return document.querySelector(':target h3').textContent") == results.study().verdicts[2].sentence


def test_print_shows_everything_but_the_switches(open_report: Open, results: ModuleType) -> None:
    page = open_report(results.study())
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = "return [...document.querySelectorAll(arguments[0])].every((e) => e.getClientRects().length === 0)"
    shown = "return [...document.querySelectorAll(arguments[0])].every((one) => one.getClientRects().length > 0)"
    assert page.run(hidden, ".controls, nav, #download") and page.run(shown, ".card, .forest, .plot, .key, .arm")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
