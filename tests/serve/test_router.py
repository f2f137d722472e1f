"""A router over two real servers: they register, it routes by KV, moves KV, and survives a loss."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.lab.nixl import nixl_env
from benchmarks.lab.router import TOKEN, RouterProcess, cores, route
from benchmarks.lab.server import Server, free_port, serve
from tests.deploy import dashboard
from tests.serve.conftest import SERVER_ARGS, SHARED_GIB
from xllm_scheduler.service.kv_book import index_name

pytestmark = pytest.mark.serve

STORY = "Tell a long story about a bridge, a river and a clockmaker. " * 12


@dataclass
class Fleet:
    """A router and its instances."""

    router: RouterProcess
    servers: list[Server]

    @property
    def names(self) -> list[str]:
        return [f"127.0.0.1:{server.port}" for server in self.servers]

    def blocks(self, name: str) -> int:
        """How many KV blocks the router knows of on an instance's device."""
        known = self.router.call("GET", "/xllm/v1/status")["index"]["instances"]
        found: int = known.get(index_name(name, 0), {}).get("device", 0)
        return found

    def await_blocks(self, name: str, blocks: int) -> None:
        """Until the router knows of so many, and has heard that nothing is under way."""
        until_s = time.monotonic() + 60.0
        while self.blocks(name) < blocks or any(
            one["waiting"] + one["running"] for one in self.router.instances().values()
        ):
            assert time.monotonic() < until_s, self.router.call("GET", "/xllm/v1/status")
            time.sleep(0.1)

    @contextlib.contextmanager
    def by_role(self) -> Iterator[None]:
        """The roles alone decide who serves what, whatever is predicted of a busy machine."""
        self.router.call("PUT", "/xllm/v1/settings", {"routing": "least_loaded"})
        yield
        self.router.call("PUT", "/xllm/v1/settings", {"routing": "slo_aware"})

    def roles(self, *roles: str) -> None:
        for name, role in zip(self.names, roles, strict=True):
            self.router.call("PUT", f"/xllm/v1/instances/{name}/role?role={role}")


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    logs = tmp_path_factory.mktemp("router")
    router_port = free_port()
    config = {
        "service": {"routers": f"http://127.0.0.1:{router_port}", "token": TOKEN},
        "kv": {"transfer": "nixl", "host_gib": 0.25 if SHARED_GIB > 1.0 else 0.0},
    }
    with contextlib.ExitStack() as stack:
        router = stack.enter_context(
            route("--routing", "slo_aware", port=router_port, log_path=logs / "router")
        )
        servers: list[Server] = []
        failures: list[BaseException] = []

        def start(core: int) -> None:
            env = {
                "VLLM_CPU_OMP_THREADS_BIND": str(core),
                "VLLM_CPU_KVCACHE_SPACE": "1",
                **nixl_env(),
            }
            args = [
                *SERVER_ARGS, "--plugins", "xllm", "--xllm-config", json.dumps(config),
                "--served-model-name", "smol",
            ]  # fmt: skip
            try:
                log = logs / f"server-{core}"
                servers.append(stack.enter_context(serve(model, args=args, env=env, log_path=log)))
            except BaseException as error:  # noqa: BLE001 - told in the main thread
                failures.append(error)

        threads = [threading.Thread(target=start, args=(core,)) for core in cores()[:2]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        router.await_instances(2)
        yield Fleet(router, servers)


def body(content: str, tokens: int = 48, **more: Any) -> dict[str, Any]:
    return {"model": "smol", "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens, "temperature": 0, **more}  # fmt: skip


def ask(url: str, content: str, **more: Any) -> dict[str, Any]:
    answer = requests.post(f"{url}/v1/chat/completions", json=body(content, **more), timeout=300)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def text(answer: dict[str, Any]) -> str:
    content: str = answer["choices"][0]["message"]["content"]
    return content


def stream(url: str, content: str, seen: list[str], **more: Any) -> None:
    """Collect the pieces of a streamed answer."""
    asked = body(content, stream=True, ignore_eos=True, **more)
    with requests.post(f"{url}/v1/chat/completions", json=asked, stream=True, timeout=300) as found:
        assert found.status_code == 200, found.text
        for line in found.iter_lines():
            if line and line != b"data: [DONE]":
                chunk = json.loads(line.removeprefix(b"data: "))
                assert "error" not in chunk, chunk
                seen += [c["delta"].get("content") or "" for c in chunk["choices"]]


def test_instances_register_themselves_with_what_they_are(fleet: Fleet) -> None:
    known = fleet.router.instances()
    assert set(known) == set(fleet.names)
    assert {one["role"] for one in known.values()} == {"mixed"}
    assert {tuple(one["models"]) for one in known.values()} == {("smol",)}


def test_an_answer_is_the_instances_own(fleet: Fleet) -> None:
    through = ask(fleet.router.url, "What is the capital of France?")
    direct = ask(fleet.servers[0].url, "What is the capital of France?")
    assert text(through) == text(direct)
    assert "Paris" in text(through)


@pytest.mark.parametrize(
    ("path", "more", "last"),
    [
        ("/v1/responses", {"input": "Hello.", "max_output_tokens": 8}, "response.completed"),
        ("/v1/messages", {"messages": body("Hello.")["messages"], "max_tokens": 8}, "message_stop"),
    ],
)
def test_streams_of_other_apis_come_whole(
    fleet: Fleet, path: str, more: dict[str, Any], last: str
) -> None:
    asked = {"model": "smol", "stream": True, **more}
    found = requests.post(f"{fleet.router.url}{path}", json=asked, timeout=300)
    assert found.status_code == 200, found.text
    kinds = [line[7:] for line in found.text.splitlines() if line.startswith("event: ")]
    assert kinds[-1] == last, found.text
    # vLLM puts tokens together that are generated faster than they are read.
    assert any("delta" in kind for kind in kinds), kinds


def test_a_prompt_goes_where_its_kv_lies(fleet: Fleet) -> None:
    fleet.roles("mixed", "mixed")
    for server, name in zip(fleet.servers, fleet.names, strict=True):
        prompt = f"About {name}: {9 * STORY}"
        before = fleet.blocks(name)
        ask(server.url, prompt, tokens=1)  # past the router, which learns of it by events alone
        fleet.await_blocks(name, before + 11)
        answer = requests.post(
            f"{fleet.router.url}/v1/chat/completions",
            # The prompt alone is weighed: what was learned of the speed of two servers on a busy
            # machine may tell them apart by more, if they are to generate within an SLO.
            json=body(prompt, 1, vllm_xargs={"xllm_ttft_ms": 1e6, "xllm_tpot_ms": 1e6}),
            headers={"x-request-id": f"kv-{name}"},
            timeout=300,
        )
        assert answer.status_code == 200, answer.text
        found = fleet.router.call("GET", f"/xllm/v1/requests/kv-{name}")
        assert found["cached_tokens"][name] >= 1280, found
        assert found["route"]["prefill"] == name, (found, fleet.router.instances())


def test_prompt_and_answer_at_different_instances_over_nixl(fleet: Fleet) -> None:
    whole = text(ask(fleet.servers[0].url, "Say something about rivers. " + STORY))
    fleet.roles("prefill", "decode")
    with fleet.by_role():
        answer = requests.post(
            f"{fleet.router.url}/v1/chat/completions",
            json=body("Say something about rivers. " + STORY),
            headers={"x-request-id": "apart"},
            timeout=300,
        )
    found = fleet.router.call("GET", "/xllm/v1/requests/apart")
    assert (found["route"]["prefill"], found["route"]["decode"]) == tuple(fleet.names)
    assert text(answer.json()) == whole
    fleet.roles("mixed", "mixed")


def test_a_role_reaches_the_engine(fleet: Fleet) -> None:
    fleet.roles("prefill", "decode")
    for server, role in zip(fleet.servers, ("prefill", "decode"), strict=True):
        (engine,) = server.request("GET", "/xllm/v1/status")["engines"]
        assert engine["service"]["role"] == role
    answer = requests.put(
        f"{fleet.servers[0].url}/xllm/v1/role", json={"role": "decode"}, timeout=30
    )
    assert answer.status_code == 401
    fleet.roles("mixed", "mixed")


def test_roles_change_while_answers_are_under_way(fleet: Fleet) -> None:
    expected: list[str] = []
    stream(fleet.servers[1].url, "Name many animals.", expected, tokens=96)
    seen: list[str] = []
    asking = threading.Thread(
        target=stream, args=(fleet.router.url, "Name many animals.", seen), kwargs={"tokens": 96}
    )
    asking.start()
    while not seen:
        time.sleep(0.05)
    fleet.roles("decode", "prefill")
    fleet.roles("mixed", "mixed")
    asking.join()
    assert "".join(seen) == "".join(expected)


def test_the_dashboard_asks_for_what_is_exported(fleet: Fleet) -> None:
    there: set[str] = set()
    for url in (fleet.router.url, fleet.servers[0].url):
        there |= dashboard.exported(requests.get(f"{url}/metrics", timeout=30).text)
    read = {one.metric for query in dashboard.queries() for one in dashboard.asked(query)}
    assert read - there == set()


def test_a_killed_instance_costs_no_token(fleet: Fleet) -> None:
    """The last of these, since one of the two is gone afterwards."""
    expected: list[str] = []
    stream(fleet.servers[0].url, "Tell me about the sea.", expected, tokens=120)
    seen: list[str] = []
    asking = threading.Thread(
        target=stream,
        args=(fleet.router.url, "Tell me about the sea.", seen),
        kwargs={"tokens": 120},
    )
    asking.start()
    while len(seen) < 20:
        time.sleep(0.02)
    serving = max(fleet.router.instances().values(), key=lambda one: one["running"])
    victim = fleet.servers[fleet.names.index(serving["name"])]
    os.killpg(victim.pid, signal.SIGKILL)
    asking.join()
    assert "".join(seen) == "".join(expected)
    assert text(ask(fleet.router.url, "Are you there?", tokens=8))
