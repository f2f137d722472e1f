"""The HTML report, as a browser shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests.browser import browser, logged, needs_browser
from tests.contract.simulate.conftest import PLAIN
from xllm_plugins.cli import main

SENT = 'Network.requestWillBeSent"'
pytestmark = needs_browser
__all__ = ["browser"]  # a fixture


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a short scenario with all that a page can show."""
    folder = tmp_path_factory.mktemp("report")
    failures = [{"instance": "i1", "at_s": 1.0, "back_s": 2.0}]
    scenario = {**PLAIN, "seconds": 3, "instances": 2, "failures": failures}
    (folder / "scenario.yaml").write_text(yaml.safe_dump(scenario))
    page = folder / "report.html"
    arguments = ["--sweep", "--attainment", "0.95", "--html", str(page)]
    assert main(["simulate", str(folder / "scenario.yaml"), *arguments]) == 0
    return page


def test_all_plots_are_drawn_and_nothing_is_fetched(
    browser: webdriver.Chrome, report: Path
) -> None:
    browser.get(report.as_uri())
    captions = [f.text for f in browser.find_elements(By.TAG_NAME, "figcaption")]
    assert captions == [
        "Attainment and goodput against the rate",
        "TTFT and TPOT of online requests",
        "vllm-fcfs: the instances over time",
    ]
    for picture in browser.find_elements(By.CSS_SELECTOR, "figure > svg"):
        assert picture.size["width"] > 600
        assert picture.size["height"] > 200
        assert picture.find_elements(By.TAG_NAME, "path")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1100
    sent = [e["message"] for e in logged(browser, "performance") if SENT in e["message"]]
    assert sent
    assert all(report.as_uri() in message for message in sent)
    assert [e for e in logged(browser, "browser") if e["level"] == "SEVERE"] == []


def test_the_table_and_the_events_can_be_read(browser: webdriver.Chrome, report: Path) -> None:
    browser.get(report.as_uri())
    table, events = browser.find_elements(By.TAG_NAME, "table")
    rows = [row.text for row in table.find_elements(By.TAG_NAME, "tr")]
    assert rows[0] == "vllm-fcfs"
    assert any(row.startswith("attainment ") and row.endswith("%") for row in rows)
    assert "i1 is lost" in events.text
    assert "i1 is back" in events.text
