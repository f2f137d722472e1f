"""``vllm serve MODEL --plugins xllm`` as its users meet it."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import openai
import pytest

from benchmarks.lab.server import Server, ServerError
from tests.serve.conftest import PROMPTS, Start, texts
from xllm_plugins.cli import main
from xllm_plugins.latency import StepShape
from xllm_scheduler.simulate.profiles import load_profile

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def server(start: Start) -> Iterator[Server]:
    """All features, two API servers, all endpoints, and every channel for settings at once."""
    with start(
        "--plugins",
        "xllm",
        "--enable-scale-out",
        "--api-server-count",
        "2",
        "--xllm-config",
        '{"scheduler": {"mode": "on", "ttft_ms": 1500, "objectives": {"batch": "offline"}}}',
        "--additional-config",
        '{"xllm": {"scheduler": {"ttft_ms": 9000, "tpot_ms": 150}}}',
        env={"XLLM_SCHEDULER_TPOT_MS": "777", "XLLM_SCHEDULER_OFFLINE_AGEING_S": "1000"},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def metrics(server: Server) -> dict[str, float]:
    """All ``xllm:`` samples by name and labels, once the poll has had time to bring them."""
    time.sleep(2.5)
    with urlopen(f"{server.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line.startswith("xllm:"))
    return {name: float(value) for name, value in samples}


def test_status_shows_decisions_versions_and_the_origin_of_every_value(server: Server) -> None:
    status = server.request("GET", "/xllm/v1/status")
    scheduler = next(row for row in status["features"] if row["feature"] == "scheduler")
    assert scheduler["feature"] == "scheduler"
    assert scheduler["active"] is True
    assert scheduler["mode"] == "on"
    assert scheduler["attached_to"] == "vllm.v1.core.sched.scheduler.Scheduler"
    settings = status["settings"]
    assert settings["scheduler.ttft_ms"] == {"value": 1500.0, "origin": "--xllm-config"}
    assert settings["scheduler.tpot_ms"] == {"value": 150.0, "origin": "--additional-config"}
    assert settings["scheduler.offline_ageing_s"] == {"value": 1000.0, "origin": "environment"}
    assert settings["scheduler.policy"] == {"value": "elastic", "origin": "default"}
    assert status["versions"]["vllm"] == "0.32.0"
    assert status["engines"][0]["scheduler"]["policy_failure"] == ""


def test_startup_prints_the_decision_table(server: Server) -> None:
    log = server.log_path.read_text(errors="replace")
    rows = re.findall(r"scheduler +on +yes +vllm\.v1\.core\.sched\.scheduler\.Scheduler", log)
    assert len(rows) == 1


def test_the_openai_client_says_offline_with_its_service_tier_alone(
    server: Server, client: openai.OpenAI
) -> None:
    before = metrics(server)
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": PROMPTS[0]}],
        service_tier="flex",
        max_tokens=16,
        temperature=0,
    )
    assert answer.service_tier == "flex"
    assert answer.choices[0].message.content
    after = metrics(server)
    key = 'xllm:scheduler_requests_total{class="%s",engine="0"}'
    assert after[key % "offline"] - before[key % "offline"] == 1
    assert after[key % "online"] - before[key % "online"] == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"service_tier": "gold"}, "service_tier is 'gold'; allowed is auto, default"),
        ({"vllm_xargs": {"xllm_class": "ofline"}}, "xllm_class is 'ofline'; allowed is online"),
        ({"vllm_xargs": {"xllm_ttft_ms": -3}}, "xllm_ttft_ms is -3; allowed is a number"),
    ],
)
def test_a_bad_class_is_a_400_with_one_sentence(
    server: Server, fields: dict[str, object], sentence: str, stream: bool
) -> None:
    with pytest.raises(ServerError, match=f"status 400.*{re.escape(sentence)}"):
        server.ask("Hello", stream=stream, **fields)


def test_every_generating_endpoint_serves_offline_requests(
    server: Server, client: openai.OpenAI
) -> None:
    before = metrics(server)['xllm:scheduler_requests_total{class="offline",engine="0"}']
    offline = {"vllm_xargs": {"xllm_class": "offline"}}
    completion = client.completions.create(
        model=server.model, prompt="The sea", max_tokens=8, extra_body=offline
    )
    assert completion.choices[0].text
    response = client.responses.create(
        model=server.model, input=PROMPTS[0], max_output_tokens=16, service_tier="flex"
    )
    assert response.output_text
    chunks = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": PROMPTS[1]}],
        service_tier="flex",
        stream=True,
        max_tokens=8,
    )
    assert any(chunk.choices and chunk.choices[0].delta.content for chunk in chunks)
    after = metrics(server)['xllm:scheduler_requests_total{class="offline",engine="0"}']
    assert after - before == 3


CHAT = {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 8}
BATCH = {"messages": [CHAT["messages"], CHAT["messages"]], "max_tokens": 8}
TOKENS = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 8}}
FLEX = {"service_tier": "flex"}
ROUTED = {"x-llm-d-inference-objective": "batch"}


def post(
    server: Server, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
) -> tuple[int, str]:
    """The status and text of an answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)) as connection:
        sent = {"Content-Type": "application/json", **headers}
        connection.request("POST", path, json.dumps({"model": server.model, **body}), sent)
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_headers_and_tiers_make_requests_of_every_protocol_offline(server: Server) -> None:
    sent: list[tuple[str, Mapping[str, Any], Mapping[str, str]]] = [
        ("/v1/chat/completions", CHAT, ROUTED),
        ("/v1/chat/completions", CHAT, {"x-gateway-inference-objective": "batch"}),
        ("/v1/chat/completions/batch", BATCH, ROUTED),  # two requests to the engine
        ("/v1/messages", CHAT | FLEX, {}),
        ("/v1/messages", CHAT | {"stream": True}, ROUTED),
        ("/inference/v1/generate", TOKENS | FLEX, {}),
        ("/inference/v1/generate", TOKENS | {"stream": True}, ROUTED),
    ]
    key = 'xllm:scheduler_requests_total{class="%s",engine="0"}'
    before = metrics(server)
    answers = [post(server, *one) for one in sent]
    assert [(status, text) for status, text in answers if status != 200] == []
    after = metrics(server)
    assert after[key % "offline"] - before[key % "offline"] == len(sent) + 1
    assert after[key % "online"] == before[key % "online"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", CHAT), ("/v1/messages", CHAT), ("/inference/v1/generate", TOKENS)],
)
def test_a_bad_header_is_a_400_with_one_sentence(
    server: Server, path: str, body: Mapping[str, Any], stream: bool
) -> None:
    headers = {"x-slo-ttft-ms": "soon"}
    status, text = post(server, path, {**body, "stream": stream}, headers)
    assert status == 400
    error = json.loads(text)["error"]
    assert error["message"] == (
        "x-slo-ttft-ms is 'soon'; allowed is a number of milliseconds above 0."
    )
    if path != "/v1/messages":  # Anthropic's errors name no field
        assert error["param"] == "x-slo-ttft-ms"


def test_the_openai_client_learns_which_tier_served_it(
    server: Server, client: openai.OpenAI
) -> None:
    tiers: dict[Literal["flex", "auto", "priority"], str] = {
        "flex": "flex",
        "auto": "default",
        "priority": "priority",
    }
    for asked, served in tiers.items():
        response = client.responses.create(
            model=server.model, input=PROMPTS[0], max_output_tokens=8, service_tier=asked
        )
        assert response.service_tier == served
    with pytest.raises(openai.BadRequestError, match="no class and no SLO to beam search"):
        client.completions.create(
            model=server.model,
            prompt="The sea",
            extra_body={"use_beam_search": True, "service_tier": "flex"},
        )


def test_answers_are_those_of_vllm_alone_also_under_mixed_load(
    server: Server, plain_answers: tuple[list[str], Server]
) -> None:
    expected, _ = plain_answers
    assert texts(server, PROMPTS) == expected
    offline = {"vllm_xargs": {"xllm_class": "offline"}}

    def tell(number: int) -> str:
        return server.ask(f"Tell a long story about number {number}.", max_tokens=48, **offline)

    with ThreadPoolExecutor(8) as pool:
        background = [pool.submit(tell, number) for number in range(6)]
        again = texts(server, PROMPTS)
        mixed = texts(server, PROMPTS, **offline)
        assert all(task.result() for task in background)
    assert again == expected
    assert mixed == expected


def test_the_latency_model_learns_from_real_steps(server: Server) -> None:
    facts = server.request("GET", "/xllm/v1/status")["engines"][0]["scheduler"]
    assert facts["step_time_ms"]["ready"] is True
    assert facts["steps_learned_from"] > 50
    assert facts["step_time_ms"]["base"] > 0.0
    assert 0.0 < metrics(server)['xllm:scheduler_step_time_error_ratio{engine="0"}'] < 1.0


def test_installed_but_not_chosen_vllm_has_no_trace_of_it(
    plain_answers: tuple[list[str], Server],
) -> None:
    _, plain = plain_answers
    with pytest.raises(ServerError, match="status 404"):
        plain.request("GET", "/xllm/v1/status")
    with urlopen(f"{plain.url}/metrics") as response:
        assert "xllm:" not in response.read().decode()
    assert "xLLM" not in plain.log_path.read_text(errors="replace")


def test_a_served_model_is_profiled_from_outside(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "profile.json"
    sizes = ["--most-tokens", "64", "--most-batch", "4"]
    assert main(["profile", "--base-url", server.url, "--output", str(output), *sizes]) == 0
    profile = load_profile(output)
    assert profile.name == server.model
    assert server.url in profile.origin
    decode = profile.step_ms(StepShape(decodes=1, decode_context=100))
    assert 0.0 < decode < profile.step_ms(StepShape().with_chunk(2000, 0))
