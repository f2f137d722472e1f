"""``xllm kv top`` shows each tier of a server, or of all servers behind a router."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from xllm_kv import command
from xllm_kv.prices import Prices
from xllm_kv.report import Room, _report
from xllm_kv.top import HEADINGS, Server, rows
from xllm_plugins import cli

METRICS = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 4096.0
"""


def status() -> dict[str, Any]:
    """As an engine reports it, with 2 GiB fetched from host memory in 4 s."""
    prices = Prices({"host": (0.1, 5.0), "DiskTier": (1.0, 0.5)})
    prices.ended("host", 2 << 30, 4.0)
    prices.counts["host"].won_tokens = 12_345
    prices.missed([], 99)
    prices.counts["DiskTier"].errors = 7
    prices.late("DiskTier")
    rooms = {"host": Room(1 << 30, 4 << 30), "DiskTier": Room(3 << 20, 0)}
    return {"engines": [{"kv": dict(_report(prices, rooms).facts)}]}


def cells(row: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(HEADINGS, row, strict=True))


def test_each_tier_is_a_row() -> None:
    device, host, disk = map(cells, rows([Server("here", status(), METRICS)]))
    assert (device["server"], device["tier"]) == ("here", "device")
    assert (device["size"], device["used"]) == ("16,000 tokens", "25%")
    assert device["hits, tokens"] == "4,096"
    assert (host["tier"], host["size"], host["used"]) == ("host", "4.0 GiB", "1.0 GiB, 25%")
    assert (host["hits, tokens"], host["fetched"]) == ("12,345", "2.0 GiB")
    fetched = HEADINGS.index("fetched")
    host_row = rows([Server("here", status(), METRICS)])[1]
    assert host_row[fetched : fetched + 4] == ("2.0 GiB", "512.0 MiB/s", "0 B", "-")
    assert (disk["size"], disk["used"], disk["late"]) == ("-", "3.0 MiB", "1")
    assert (disk["errors"], disk["missed"]) == ("7", "99")


@pytest.mark.parametrize(
    ("server", "tiers"),
    [
        (Server("gone"), ["does not answer"]),
        (Server("plain", None, METRICS), ["device"]),
        (Server("without kv", {"engines": [{}]}, METRICS), ["device"]),
        (Server("two", {"engines": [{}, {}]}, METRICS), ["device", "device"]),
    ],
    ids=lambda value: value.name if isinstance(value, Server) else "",
)
def test_who_has_no_tiers_or_no_answer_is_shown_too(server: Server, tiers: list[str]) -> None:
    assert [cells(row)["tier"] for row in rows([server])] == tiers


@pytest.fixture
def server() -> Iterator[str]:
    """Answers as a server, and under ``/router`` as a router before it and one that is gone."""
    behind: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            texts = {
                "/metrics": METRICS,
                "/xllm/v1/status": json.dumps(status()),
                "/router/xllm/v1/status": json.dumps({"instances": behind}),
                "/empty/metrics": "",
            }
            text = texts.get(self.path)
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *args: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{made.server_address[1]}"
    behind += [{"name": "a", "url": url}, {"name": "b", "url": "http://127.0.0.1:9"}]
    yield url
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("", ["device", "host", "DiskTier", "16,000 tokens", "12,345", "512.0 MiB/s"]),
        ("/router", ["a ", "device", "host", "b ", "does not answer"]),
        ("/empty", ["server"]),
    ],
)
def test_it_prints_once(
    path: str,
    shown: list[str],
    server: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["kv", "top", server + path, "--once"]) == 0
    text = capsys.readouterr().out
    for part in shown:
        assert part in text


def test_it_looks_again_until_it_is_told_to_stop() -> None:
    class Screen:
        shown: list[Any] = []  # noqa: RUF012 - one instance

        def __enter__(self) -> None: ...
        def __exit__(self, *args: object) -> None: ...

        def update(self, table: Any, *, refresh: bool) -> None:
            self.shown.append(table)

    looks: list[Any] = ["first", "second"]

    def look() -> Any:
        if not looks:
            raise KeyboardInterrupt
        return looks.pop(0)

    assert command._live(Screen(), look, 0.001) == 0
    assert Screen.shown == ["first", "second"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["http://127.0.0.1:9"], "gives neither /xllm/v1/status nor /metrics."),
        (["127.0.0.1:8000"], "allowed is an address with http:// or https://."),
        (["http://127.0.0.1:9", "--every", "0"], "--every is 0; allowed is a number above 0."),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["kv", "top", *arguments, "--once"]) == 2
    assert sentence in capsys.readouterr().err
