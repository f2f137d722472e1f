"""The console, as a browser shows it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By

from tests.browser import browser, logged, needs_browser
from tests.service.conftest import MODEL

pytestmark = needs_browser
__all__ = ["browser"]  # a fixture
_SHOWN_S = 15.0


def shown(browser: webdriver.Chrome, url: str, *wanted: str) -> str:
    """The page's text as soon as all that is wanted stands in it."""
    browser.get(url)
    until_s = time.monotonic() + _SHOWN_S
    while True:
        text = browser.find_element(By.TAG_NAME, "body").text
        if all(part in text for part in wanted) or time.monotonic() > until_s:
            return text
        time.sleep(0.2)


async def test_instances_answers_and_changes_are_seen(
    browser: webdriver.Chrome, stub: Any, router: Any
) -> None:
    stubs = [await stub(token_ms=5.0), await stub(token_ms=5.0)]
    url = await router(*stubs)
    names = [one.url.removeprefix("http://") for one in stubs]
    body = {"model": MODEL, "prompt": "x", "max_tokens": 10}
    for _ in range(6):
        await url.stream("/v1/completions", body)
    await url.admin("PUT", f"/instances/{names[0]}/role", params={"role": "prefill"})
    await url.admin("POST", f"/instances/{names[1]}/drain")
    text = await asyncio.to_thread(shown, browser, url.url, *names, "p50", "draining")
    for part in (*names, "prefill", "mixed", "draining", "routing round_robin", "p50"):
        assert part in text
    points = browser.find_elements(By.CSS_SELECTOR, "#ttft-plot circle")
    assert len(points) == 6
    assert browser.find_elements(By.CSS_SELECTOR, "#roles rect.prefill")
    errors = [one for one in logged(browser, "browser") if one["level"] == "SEVERE"]
    assert [one for one in errors if "favicon" not in one["message"]] == []
