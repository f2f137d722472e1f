"""The chart: Helm lints and renders it; Kubernetes' schemas and our options know what it makes."""

from __future__ import annotations

import json

import httpx
import kubernetes_validate
import pytest
import yaml

from tests.deploy.cases import CASES, REFUSED, asked, container, environment, pods, rendered
from tests.deploy.chart import CHART
from tests.deploy.options import check_router
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.service.app import build
from xllm_scheduler.service.config import RouterSection

EACH = pytest.mark.parametrize("case", CASES)


def kinds(case: str) -> set[str]:
    return {one["kind"] for one in rendered(case)}


def test_helms_linter_finds_nothing() -> None:
    assert asked().findings == []


@EACH
def test_every_manifest_is_valid_by_kubernetes_own_schemas(case: str) -> None:
    known = [one for one in rendered(case) if one["kind"] != "PodMonitor"]  # has none there
    assert len(known) >= 5
    for one in known:
        kubernetes_validate.validate(one, "1.37", strict=True)


@EACH
def test_the_router_starts_with_options_and_settings_that_exist(case: str) -> None:
    router = dict(pods(rendered(case)))["router"]
    assert container(router)["command"] == ["xllm", "router"]
    check_router(container(router)["args"], environment(router))


def test_instances_and_routers_meet_in_etcd_by_role() -> None:
    found = dict(pods(rendered("prefill and decode")))
    assert set(found) == {"router", "etcd", "prefill", "decode"}
    assert "--etcd=http://demo-etcd:2379" in container(found["router"])["args"]
    for role in ("prefill", "decode"):
        args = container(found[role])["args"]
        config = json.loads(args[args.index("--xllm-config") + 1])
        assert config["service"] == {"etcd": "http://demo-etcd:2379", "role": role}
        assert config["scheduler"] == {"tpot_ms": 50}
        assert environment(found[role])["XLLM_SERVICE_ADDRESS"] == "http://$(POD_IP):8000"


def test_instances_that_cannot_register_are_named_to_the_router() -> None:
    found = dict(pods(rendered("ascend")))
    expected = "http://demo-ascend-0.demo-ascend:8000,http://demo-ascend-1.demo-ascend:8000"
    assert f"--instances={expected}" in container(found["router"])["args"]
    assert "--xllm-config" not in container(found["ascend"])["args"]
    assert not any(name.startswith("XLLM_SERVICE") for name in environment(found["ascend"]))


def test_an_etcd_and_a_secret_that_are_there_are_used() -> None:
    assert {"Secret", "Deployment"} <= set(kinds("defaults"))
    manifests = rendered("what is there")
    assert "Secret" not in {one["kind"] for one in manifests}
    found = dict(pods(manifests))
    assert "etcd" not in found
    for name in ("router", "mixed"):
        assert "http://etcd.infra:2379" in " ".join(container(found[name])["args"])
        assert {
            one["valueFrom"]["secretKeyRef"]["name"]
            for one in container(found[name])["env"]
            if "secretKeyRef" in one.get("valueFrom", {})
        } == {"tokens"}


@EACH
def test_services_and_monitors_find_the_pods_they_are_for(case: str) -> None:
    manifests = rendered(case)
    templates = [template for _, template in pods(manifests)]
    for one in manifests:
        spec = one.get("spec", {})
        if one["kind"] == "Service":
            selector, ports = spec["selector"], {port["targetPort"] for port in spec["ports"]}
        elif one["kind"] in ("PodMonitor", "PodDisruptionBudget"):
            selector = spec["selector"]["matchLabels"]
            ports = {port["port"] for port in spec.get("podMetricsEndpoints", ())}
        else:
            continue
        chosen = [t for t in templates if selector.items() <= t["metadata"]["labels"].items()]
        assert chosen, one["metadata"]["name"]
        offered = {port["name"] for t in chosen for port in container(t)["ports"]}
        assert ports <= offered, one["metadata"]["name"]


def test_metrics_are_asked_for_where_that_is_switched_on() -> None:
    assert "PodMonitor" not in kinds("defaults")
    assert "PodMonitor" in kinds("prefill and decode")


@EACH
def test_probes_ask_paths_of_ports_that_are_there(case: str) -> None:
    for component, template in pods(rendered(case)):
        one = container(template)
        kinds_of_probes = ("startup", "liveness", "readiness")
        probes = {kind: one[f"{kind}Probe"]["httpGet"] for kind in kinds_of_probes}
        assert {probe["port"] for probe in probes.values()} <= {p["name"] for p in one["ports"]}
        ready = "/ready" if component == "router" else "/health"
        assert [probe["path"] for probe in probes.values()] == ["/health", "/health", ready]


async def test_the_router_answers_its_probes() -> None:
    """An instance's /health is vLLM's own, at which every whole-server test waits."""
    transport = httpx.ASGITransport(build(RouterSection(), SchedulerSection()))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503  # it has no instance


@EACH
def test_variables_of_kubernetes_services_are_not_taken_for_settings(case: str) -> None:
    """A service xllm-router would set XLLM_ROUTER_PORT, at which the router ends."""
    assert all(t["spec"]["enableServiceLinks"] is False for _, t in pods(rendered(case)))


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[text for _, text in REFUSED])
def test_bad_values_are_one_clear_sentence(number: int) -> None:
    made = asked().made[len(CASES) + number]
    assert isinstance(made, str)
    assert REFUSED[number][1] in made


def test_every_value_is_known_to_the_schema_and_to_a_template() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) == set(schema) - {"global"}
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    for name in schema["instances"]["items"]["properties"]:
        assert f"$one.{name}" in templates, name
        assert f"{name}:" in (CHART / "values.yaml").read_text(), name
