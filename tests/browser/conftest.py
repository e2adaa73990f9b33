"""A headless Chromium for tests of the HTML report, and reports to open in it.

Without a browser these tests fail and say how to install one; TORCHSTONE_NO_BROWSER=1 skips them instead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from torchstone import report
from torchstone.report import finding_write
from torchstone.report.finding import Finding
from torchstone.report.result import Result

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--mute-audio",
)
INSTALL = (
    "the report's browser tests need Chromium and its driver (Debian: apt-get install "
    "chromium chromium-driver) and selenium "
    "(pip install selenium); set TORCHSTONE_NO_BROWSER=1 to skip them"
)


@pytest.fixture(scope="session")
def results() -> ModuleType:
    """Builders of realistic, extreme and hostile results."""
    path = Path(__file__).parents[1] / "report" / "results.py"
    spec = importlib.util.spec_from_file_location("browser_results", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One Chromium with a fresh profile for all tests of a process."""
    if os.environ.get("TORCHSTONE_NO_BROWSER") == "1":
        pytest.skip("TORCHSTONE_NO_BROWSER=1")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    server = shutil.which("chromedriver")
    if browser is None or server is None or importlib.util.find_spec("selenium") is None:
        pytest.fail(INSTALL, pytrace=False)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options=options, service=Service(server))
    yield chromium
    chromium.quit()


class Page:
    """An open report."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver, self.path = driver, path

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self.driver.execute_script(script, *arguments)

    def click(self, selector: str) -> None:
        """Click an element as a person would, after scrolling to it."""
        element = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()

    def console(self) -> list[str]:
        """Console messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were requested since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def plot(self, index: int = 0) -> dict[str, str]:
        """What the chart says of itself."""
        return self.run("return {...document.querySelectorAll('.plot')[arguments[0]].dataset}", index)

    def painted(self, index: int = 0) -> int:
        """How many different colours the chart's canvas shows."""
        return self.run(
            "const canvas = document.querySelectorAll('.plot canvas')[arguments[0]];"
            "const copy = Object.assign(document.createElement('canvas'), {width: canvas.width, "
            "height: canvas.height});"
            "const pen = copy.getContext('2d', {willReadFrequently: true}); pen.drawImage(canvas, 0, 0);"
            "const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;"
            "const seen = new Set();"
            "for (let i = 0; i < data.length; i += 4) if (data[i + 3]) seen.add((data[i] << 16) "
            "| (data[i + 1] << 8) | data[i + 2]);"
            "return seen.size;",
            index,
        )


@pytest.fixture
def open_report(driver: Any, tmp_path: Path) -> Callable[..., Page]:
    """Write the report of a result or finding and open it from disk, at a width and in a colour scheme."""

    def opened(result: Result | Finding, width: int = 1100, scheme: str = "light") -> Page:
        write = finding_write.write if isinstance(result, Finding) else report.write
        path = write(result, tmp_path / "report")  # type: ignore[arg-type]
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get("about:blank")
        driver.get_log("browser")
        driver.get_log("performance")
        driver.get(path.as_uri())
        return Page(driver, path)

    return opened
