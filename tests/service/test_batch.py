"""The Batch API: through OpenAI's own client, over restarts, nothing lost and nothing twice."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest

from benchmarks.lab.stub_engine import generated, text_of, tokens_of
from tests.service.conftest import MODEL, WAIT_S
from tests.service.test_gateway import until
from xllm_scheduler.service.batch import Batches, parsed
from xllm_scheduler.service.batch_store import BatchStore
from xllm_scheduler.service.routing import InstanceView, Role

ENDPOINT: Literal["/v1/completions"] = "/v1/completions"


def lines(count: int, **more: Any) -> bytes:
    """An input file."""
    requests = [
        {"custom_id": f"c{n}", "method": "POST", "url": ENDPOINT,
         "body": {"model": MODEL, "prompt": f"p{n}", "max_tokens": 5, **more}}
        for n in range(count)
    ]  # fmt: skip
    return "".join(json.dumps(one) + "\n" for one in requests).encode()


def answer(number: int) -> str:
    return "".join(text_of(t) for t in itertools.islice(generated(tokens_of(f"p{number}")), 5))


async def ended(client: Any, name: str) -> Any:
    async def wait() -> Any:
        while True:
            batch = await client.batches.retrieve(name)
            if batch.status not in ("validating", "in_progress", "finalizing", "cancelling"):
                return batch
            await asyncio.sleep(0.05)

    return await asyncio.wait_for(wait(), WAIT_S)


@pytest.fixture
async def client(stub: Any, router: Any, tmp_path: Path) -> Any:
    from openai import AsyncOpenAI

    url = await router(await stub(), data=str(tmp_path))
    return AsyncOpenAI(base_url=url.url + "/v1", api_key="none")


async def test_a_batch_from_file_to_file(client: Any) -> None:
    content = io.BytesIO(lines(40))
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    made = await client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={"a": "b"}
    )
    batch = await ended(client, made.id)
    assert (batch.status, batch.metadata) == ("completed", {"a": "b"})
    assert (batch.request_counts.total, batch.request_counts.completed) == (40, 40)
    assert batch.error_file_id is None
    output = (await client.files.content(batch.output_file_id)).text
    found = {one["custom_id"]: one["response"] for one in map(json.loads, output.splitlines())}
    assert {name: one["body"]["choices"][0]["text"] for name, one in found.items()} == {
        f"c{n}": answer(n) for n in range(40)
    }
    listed = await client.batches.list(limit=1)
    assert listed.data[0].id == made.id
    assert {f.purpose for f in (await client.files.list()).data} == {"batch", "batch_output"}


async def test_requests_that_fail_stand_in_the_error_file(client: Any) -> None:
    content = lines(3) + lines(1, service_tier="gold").replace(b'"c0"', b'"bad"')
    file = await client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
    made = await client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"
    )
    batch = await ended(client, made.id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 1)
    (error,) = (await client.files.content(batch.error_file_id)).text.splitlines()
    found = json.loads(error)
    assert (found["custom_id"], found["response"]["status_code"]) == ("bad", 400)
    assert "service_tier is 'gold'" in found["response"]["body"]["error"]["message"]


async def test_a_bad_file_fails_at_once_and_names_its_lines(client: Any) -> None:
    content = lines(1) + b"{\n" + lines(1)
    file = await client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"
    )
    assert batch.status == "failed"
    found = {error.line: error.message for error in batch.errors.data}
    assert "Line 2: it is not valid JSON" in found[2]
    assert found[3] == "Line 3: custom_id 'c0' was there before."


async def test_a_cancelled_batch_keeps_what_was_answered(
    stub: Any, router: Any, tmp_path: Path
) -> None:
    from openai import AsyncOpenAI

    one = await stub(token_ms=20.0)
    url = await router(one, data=str(tmp_path), offline_requests=4)
    client = AsyncOpenAI(base_url=url.url + "/v1", api_key="none")
    short, _, _ = lines(50).partition(b"\n")
    _, end, long = lines(50, max_tokens=100_000).partition(b"\n")  # of which none will ever end
    content = io.BytesIO(short + end + long)
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    made = await client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"
    )
    while not (await client.batches.retrieve(made.id)).request_counts.completed:  # type: ignore[union-attr]
        await asyncio.sleep(0.05)
    assert (await client.batches.cancel(made.id)).status == "cancelling"
    batch = await ended(client, made.id)
    assert batch.status == "cancelled"
    count = batch.request_counts.completed
    assert count == 1
    output = (await client.files.content(batch.output_file_id)).text
    assert len(output.splitlines()) == count
    errors = (await client.files.content(batch.error_file_id)).text.splitlines()
    assert len(errors) == 50 - count
    assert {json.loads(error)["error"]["code"] for error in errors} == {"batch_cancelled"}
    answer = await url.ask(ENDPOINT, {"model": MODEL, "prompt": "x", "max_tokens": 1,
                                      "vllm_xargs": {"xllm_class": "offline"}})  # fmt: skip
    assert answer["choices"]  # what was cancelled holds no room
    await until(lambda: not one.engine.under_way)


async def test_after_a_restart_it_goes_on_and_answers_nothing_twice(tmp_path: Path) -> None:
    """Restarted again and again in the middle of things."""
    asked: Counter[str] = Counter()
    cut = asyncio.Event()

    async def ask(path: str, body: bytes) -> tuple[int, bytes]:
        prompt = json.loads(body)["prompt"]
        asked[prompt] += 1
        if asked.total() % 7 == 0:  # it ends with this one under way
            cut.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0.001)
        return 200, json.dumps({"prompt": prompt}).encode()

    view = InstanceView("a", Role.MIXED, pace_ms=50.0)
    store = BatchStore(tmp_path)
    items, errors = parsed(lines(60), ENDPOINT)
    made = store.add_batch(ENDPOINT, "file-x", "24h", 86400, None, items, errors)
    found: dict[str, Any] = {}
    for _ in range(600):  # a slow disk keeps little between two cuts
        cut.clear()
        batches = Batches(store, ask, lambda: [view], 4)
        running = asyncio.create_task(batches.run())
        while not cut.is_set() and (store.batch(made["id"]) or {})["status"] != "completed":
            await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        store.close()
        store = BatchStore(tmp_path)
        found = store.batch(made["id"]) or {}
        if found["status"] == "completed":
            break
    assert found["request_counts"] == {"total": 60, "completed": 60, "failed": 0}
    output = store.content(found["output_file_id"]).decode().splitlines()
    assert [json.loads(one)["custom_id"] for one in output] == [f"c{n}" for n in range(60)]
    assert set(asked) == {f"p{n}" for n in range(60)}
    assert asked.total() > 60  # some were under way when it ended
    store.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "it is no JSON object"),
        ('{"url": "/v1/completions"}', "custom_id is None; allowed is a text"),
        ('{"custom_id": "a", "method": "GET"}', "method is 'GET'; allowed is POST"),
        ('{"custom_id": "a", "url": "/v1/x"}', "url is '/v1/x'; allowed is the batch's endpoint"),
        ('{"custom_id": "a", "url": "/v1/completions"}', "body is None; allowed is an object"),
        (
            '{"custom_id": "a", "url": "/v1/completions", "body": {"vllm_xargs": "x"}}',
            "body.vllm_xargs is 'x'; allowed is an object",
        ),
        ("", "The file holds no request."),
    ],
)
def test_what_is_wrong_with_a_line_is_said(line: str, message: str) -> None:
    items, errors = parsed(line.encode(), ENDPOINT)
    assert items == []
    assert message in errors[0]["message"]


async def test_an_answer_that_cannot_be_kept_is_kept_later_and_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xllm_scheduler.service.batch._AGAIN_S", 0.01)
    asked: list[bytes] = []

    async def ask(path: str, body: bytes) -> tuple[int, bytes]:
        asked.append(body)
        return 200, b"{}"

    store = BatchStore(tmp_path)
    keep, failures = store.answered, iter([True] * 3)

    def full(*args: Any, **more: Any) -> None:
        if next(failures, False):
            raise sqlite3.OperationalError("database or disk is full")
        keep(*args, **more)

    monkeypatch.setattr(store, "answered", full)
    items, errors = parsed(lines(1), ENDPOINT)
    made = store.add_batch(ENDPOINT, "file-x", "24h", 86400, None, items, errors)
    view = InstanceView("a", Role.MIXED, pace_ms=50.0)
    running = asyncio.create_task(Batches(store, ask, lambda: [view], 4).run())
    while (store.batch(made["id"]) or {})["status"] != "completed":
        await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(asked) == 1
    store.close()


async def test_lines_wait_for_an_instance_that_serves_their_model(
    stub: Any, router: Any, tmp_path: Path
) -> None:
    """As after a restart, when the instances of another model are there first."""
    from openai import AsyncOpenAI

    url = await router(data=str(tmp_path), queue_s=WAIT_S)
    other = {"name": "o", "url": (await stub()).url, "models": ["other"]}
    await url.admin("POST", "/instances", json=other)
    client = AsyncOpenAI(base_url=url.url + "/v1", api_key="none")
    file = await client.files.create(file=("in.jsonl", io.BytesIO(lines(3))), purpose="batch")
    made = await client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"
    )
    await asyncio.sleep(0.5)
    await url.admin("POST", "/instances", json={"url": (await stub()).url})
    batch = await ended(client, made.id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 0)


async def test_a_file_that_is_too_long_is_refused(stub: Any, router: Any, tmp_path: Path) -> None:
    from openai import APIStatusError, AsyncOpenAI

    url = await router(await stub(), data=str(tmp_path), most_file_bytes=100)
    client = AsyncOpenAI(base_url=url.url + "/v1", api_key="none")
    with pytest.raises(APIStatusError, match="longer than 100 bytes") as refused:
        await client.files.create(file=("in.jsonl", io.BytesIO(lines(9))), purpose="batch")
    assert refused.value.status_code == 413
