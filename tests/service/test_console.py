"""The console, as a browser shows it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.browser import browser, logged, needs_browser
from tests.service.conftest import MODEL, TOKEN, WAIT_S, told_loads, told_tiers
from tests.service.test_batch import ENDPOINT, lines

pytestmark = needs_browser
__all__ = ["browser"]  # a fixture


def shown(browser: webdriver.Chrome, url: str, *wanted: str) -> str:
    """The page's text as soon as all that is wanted stands in it."""
    browser.get(url)
    return text_with(browser, *wanted)


def text_with(browser: webdriver.Chrome, *wanted: str) -> str:
    """The same without loading it anew."""
    until_s = time.monotonic() + WAIT_S
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
    slos = {"xllm_ttft_ms": 6e4, "xllm_tpot_ms": 6e4}
    body = {"model": MODEL, "prompt": "x", "max_tokens": 10, "vllm_xargs": slos}
    for _ in range(6):
        await url.stream("/v1/completions", body)
    await url.admin("PUT", f"/instances/{names[0]}/role", params={"role": "prefill"})
    await url.admin("POST", f"/instances/{names[1]}/drain")
    text = await asyncio.to_thread(shown, browser, url.url, *names, "p50", "draining")
    for part in (*names, "prefill", "mixed", "draining", "routing round_robin", "p50"):
        assert part in text
    assert "online p50" in text
    assert "100 % in time" in text
    points = browser.find_elements(By.CSS_SELECTOR, "#ttft-plot circle")
    assert len(points) == 6
    assert browser.find_elements(By.CSS_SELECTOR, "#ttft-plot line.slo")
    assert "SLO 60000 ms" in text
    assert browser.find_elements(By.CSS_SELECTOR, "#roles rect.prefill")
    errors = [one for one in logged(browser, "browser") if one["level"] == "SEVERE"]
    assert [one for one in errors if "favicon" not in one["message"]] == []


async def test_batches_are_seen_also_when_they_are_over(
    browser: webdriver.Chrome, stub: Any, router: Any, tmp_path: Any
) -> None:
    from openai import AsyncOpenAI

    url = await router(await stub(), data=str(tmp_path))
    client = AsyncOpenAI(base_url=url.url + "/v1", api_key="none")
    file = await client.files.create(file=("in.jsonl", lines(3)), purpose="batch")
    made = await client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"
    )
    text = await asyncio.to_thread(shown, browser, url.url, made.id, "completed")
    assert "completed" in text
    assert property_of(browser, "#batches .bar", "title") == "3 of 3"


async def test_loads_of_devices_are_seen_with_the_admin_token(
    browser: webdriver.Chrome, stub: Any, router: Any
) -> None:
    balanced, plain = await stub(), await stub()
    balanced.engine.eplb = told_loads()
    url = await router(balanced, plain)
    await asyncio.to_thread(shown, browser, url.url, "routing round_robin")
    assert browser.find_elements(By.CSS_SELECTOR, "#experts svg") == []
    field = browser.find_element(By.CSS_SELECTOR, "#token")

    def text_after(token: str, *wanted: str) -> str:
        field.clear()
        field.send_keys(token, Keys.ENTER)
        return text_with(browser, *wanted)

    assert "token is missing or wrong" in await asyncio.to_thread(text_after, "x", "wrong")
    name = balanced.url.removeprefix("http://")
    text = await asyncio.to_thread(text_after, TOKEN, "experts moved")
    moved = sum(balanced.engine.eplb["last_moves"])
    parts = (name, "plan 1", f"{moved} experts moved", "layers: moved 2, no_load 1")
    for part in (*parts, "max/mean 1.600, 1.600 in prefill steps, 1.600 in decode steps"):
        assert part in text
    assert f"{plain.url.removeprefix('http://')}: plan" not in text
    hot = cells_of(browser)
    assert len(hot) == 3 * 4
    assert hot["layer 0, device 0: 1.90 of the mean"] == "rgb(255,26,26)"
    assert hot["layer 0, device 2: 0.40 of the mean"] == "rgb(102,102,255)"
    assert hot["layer 2, device 3: 0.00 of the mean"] == "none"
    said = property_of(browser, "#experts rect.layer title", "textContent")
    told = balanced.engine.eplb
    assert said == (
        f"layer 0: max/mean 1.900 in the last window, {told['imbalance'][0]:.3f} expected; "
        f"moved, {told['last_moves'][0]} experts"
    )
    errors = [one["message"] for one in logged(browser, "browser") if one["level"] == "SEVERE"]
    ours = [one for one in errors if url.url in one]
    assert [one for one in ours if "favicon" not in one and "401" not in one] == []


async def test_kv_tiers_are_seen_with_the_admin_token(
    browser: webdriver.Chrome, stub: Any, router: Any
) -> None:
    tiered = await stub()
    tiered.engine.status = {"engines": [told_tiers(), {}, told_tiers()]}
    url = await router(tiered, await stub())
    await asyncio.to_thread(shown, browser, url.url, "routing round_robin")
    assert not browser.find_element(By.ID, "tiers").is_displayed()
    browser.find_element(By.CSS_SELECTOR, "#token").send_keys(TOKEN, Keys.ENTER)
    await asyncio.to_thread(text_with, browser, "1.0 / 4.0 GiB")
    name = tiered.url.removeprefix("http://")
    host, disk = (f"{one['fetch_mib_ms']:.2f}" for one in told_tiers()["kv"]["tiers"].values())
    rows = [
        ["host", "1.0 / 4.0 GiB", "2048.0", "3.0", "12345", "0", "7", host, "0", "0", "0"],
        ["DiskTier", "3.0 MiB", "0.0", "0.0", "0", "0", "0", disk, "0", "1", "0"],
    ]
    expected = [[one, *row] for one in (name, f"{name} #2") for row in rows]
    assert rows_of(browser, "#tiers tbody") == expected
    assert property_of(browser, "#tiers .bar", "title") == "25.0 %"
    browser.find_element(By.CSS_SELECTOR, "#token").send_keys("x", Keys.ENTER)
    await asyncio.to_thread(text_with, browser, "token is missing or wrong")
    assert not browser.find_element(By.ID, "tiers").is_displayed()


def rows_of(browser: webdriver.Chrome, selector: str) -> list[list[str]]:
    """The texts of a table's cells, read at once: the page is drawn anew."""
    script = (
        "return [...document.querySelector(arguments[0]).rows]"
        ".map(row => [...row.cells].map(one => one.textContent))"
    )
    found: list[list[str]] = browser.execute_script(script, selector)
    return found


def property_of(browser: webdriver.Chrome, selector: str, name: str) -> str:
    """One of the first element that a selector finds, read at once: the page is drawn anew."""
    script = "return document.querySelector(arguments[0])[arguments[1]]"
    return str(browser.execute_script(script, selector, name))


def cells_of(browser: webdriver.Chrome) -> dict[str, str]:
    """The colour of each cell of the heat map, by what hovering over it says."""
    script = (
        "return [...document.querySelectorAll('#experts rect.cell')]"
        ".map(one => [one.textContent, one.getAttribute('fill')])"
    )
    return dict(browser.execute_script(script))
