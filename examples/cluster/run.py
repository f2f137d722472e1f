"""etcd, a router and vLLM servers on this machine: answers, batches, moved KV, changed roles.

python -m examples.cluster.run                      # three servers
python -m examples.cluster.run --instances 2 --once # ends when everything has been shown
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console

from benchmarks.lab.etcd import etcd_server
from benchmarks.lab.model import prepare_smollm2
from benchmarks.lab.nixl import NIXL, nixl_env
from benchmarks.lab.router import TOKEN, RouterProcess, route
from benchmarks.lab.server import LOGS, Server, free_port, serve

MODEL = "smollm2"
STORY = "Tell a long story about a bridge, a river and a clockmaker. " * 12
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
console = Console(highlight=False)


def main() -> None:
    """Runs the example."""
    options = _options()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xllm-cluster-")))
        etcd = _etcd(stack)
        router = stack.enter_context(
            route(
                *("--routing", "slo_aware", "--roles", "", "--data", str(folder / "batches")),
                *(("--etcd", etcd) if etcd else ()),
                port=options.port or free_port(preferred=8080),
            )
        )
        console.print(f"router: {router.url} (its console is a page there)")
        servers = _servers(stack, options.instances, router, etcd)
        router.await_instances(options.instances)
        console.print(f"{options.instances} servers have registered themselves")
        client = OpenAI(base_url=f"{router.url}/v1", api_key="none")
        _answers(client)
        _batch(client)
        if _has_nixl():
            _apart(router, client, servers)
        else:
            console.print("nixl is not installed; no KV is moved")
        _roles(router, client, servers)
        if not options.once:
            console.print("serving until Ctrl-C")
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
    console.print("stopped")


def _etcd(stack: contextlib.ExitStack) -> str:
    """A real etcd's address; without one the router keeps to itself what it knows."""
    if shutil.which("etcd") is None:
        console.print("etcd is not installed (Debian: etcd-server); the router does without")
        return ""
    url = stack.enter_context(etcd_server()).url
    console.print(f"etcd: {url}")
    return url


def _servers(
    stack: contextlib.ExitStack, count: int, router: RouterProcess, etcd: str
) -> list[Server]:
    """Start servers side by side, each on a core of its own as far as they go."""
    model = prepare_smollm2()
    cores = sorted(os.sched_getaffinity(0))
    joins = {"etcd": etcd} if etcd else {"routers": router.url}
    config = {"service": {**joins, "token": TOKEN}, **(NIXL if _has_nixl() else {})}
    args = [
        "--plugins", "xllm", "--xllm-config", json.dumps(config), "--served-model-name", MODEL,
        "--enforce-eager", "--max-model-len", "2048", "--dtype", "float32",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    ]  # fmt: skip
    servers: list[Server] = []
    failures: list[BaseException] = []

    def start(number: int) -> None:
        core = cores[number % len(cores)]
        env = {
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            **nixl_env(),
        }
        log = LOGS / f"cluster-{number}.log"
        try:
            servers.append(stack.enter_context(serve(model, args=args, env=env, log_path=log)))
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failures.append(error)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(count)]
    with console.status(f"starting {count} servers, about {40 * count} s"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return servers


def _answers(client: OpenAI) -> None:
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(
        model=MODEL, messages=question, max_tokens=32, temperature=0
    )
    console.print(f"chat: {answer.choices[0].message.content}")
    stream = client.chat.completions.create(
        model=MODEL, messages=question, max_tokens=32, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    if "".join(pieces) != answer.choices[0].message.content:
        raise SystemExit(f"streamed, the answer is another one: {''.join(pieces)!r}")
    console.print(f"the same, streamed in {len(pieces)} pieces")
    weather: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    tools: Any = [WEATHER]
    called = client.chat.completions.create(
        model=MODEL, messages=weather, tools=tools, max_tokens=64, temperature=0,
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )  # fmt: skip
    calls: Any = called.choices[0].message.tool_calls
    call = calls[0]
    console.print(f"tools: {call.function.name}({call.function.arguments})")


def _batch(client: OpenAI) -> None:
    lines = [
        {"custom_id": f"n{n}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": MODEL, "max_tokens": 16,
                  "messages": [{"role": "user", "content": f"Name the number {n} in words."}]}}
        for n in range(8)
    ]  # fmt: skip
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("batch.jsonl", io.BytesIO(content)), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    counts = batch.request_counts
    if batch.status != "completed" or counts is None or counts.failed:
        raise SystemExit(f"the batch is {batch.status}: {counts}")
    console.print(f"batch: {counts.completed} of {counts.total} requests answered")


def _apart(router: RouterProcess, client: OpenAI, servers: list[Server]) -> None:
    """A prompt computed at one server, its KV fetched by another one, which answers."""
    names = [f"127.0.0.1:{server.port}" for server in servers]
    for name in names:
        role = "prefill" if name == names[0] else "decode"
        router.call("PUT", f"/xllm/v1/instances/{name}/role?role={role}")
    # The roles alone shall decide: on a busy machine it may be predicted not to pay.
    router.call("PUT", "/xllm/v1/settings", {"routing": "least_loaded"})
    messages: Any = [{"role": "user", "content": STORY}]
    whole = servers[0].ask(STORY, max_tokens=24, model=MODEL)
    apart = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=24, temperature=0,
        extra_headers={"x-request-id": "apart"},
    )  # fmt: skip
    taken = router.call("GET", "/xllm/v1/requests/apart")["route"]
    router.call("PUT", "/xllm/v1/settings", {"routing": "slo_aware"})
    if apart.choices[0].message.content != whole:
        raise SystemExit("computed apart, the answer is another one")
    if taken["prefill"] == taken["decode"]:
        raise SystemExit(f"the prompt was not computed apart: {taken}")
    console.print(
        f"prefilled at {taken['prefill']}, generated at {taken['decode']}: the same answer"
    )


def _roles(router: RouterProcess, client: OpenAI, servers: list[Server]) -> None:
    """Roles change while an answer is under way."""
    messages: Any = [{"role": "user", "content": "Name many animals."}]
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=96, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    tokens = 0
    for chunk in stream:
        tokens += bool(chunk.choices and chunk.choices[0].delta.content)
        if tokens in (10, 50):
            role = "decode" if tokens == 10 else "mixed"
            for server in servers:
                name = f"127.0.0.1:{server.port}"
                router.call("PUT", f"/xllm/v1/instances/{name}/role?role={role}")
    console.print(f"roles changed twice while an answer of {tokens} pieces was under way")


def _has_nixl() -> bool:
    return importlib.util.find_spec("nixl") is not None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--instances", type=int, default=3, help="vLLM servers")
    parser.add_argument("--port", type=int, help="of the router; default: 8080 or a free one")
    parser.add_argument("--once", action="store_true", help="end when everything has been shown")
    return parser.parse_args()


if __name__ == "__main__":
    main()
