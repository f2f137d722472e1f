"""The chart: Helm lints and renders it; Kubernetes' schemas and our options know what it makes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from tests.deploy.chart import CHART, Helm, helm
from tests.deploy.options import check_instance, check_router, serve_refusals, unknown_to_vllm
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.service.app import build
from xllm_scheduler.service.config import RouterSection

AUTH = {"adminToken": "secret"}
MIXED = {"name": "mixed", "model": "Qwen/Qwen3-8B"}
APART = [
    {
        "name": role,
        "model": "Qwen/Qwen3-32B",
        "role": role,
        "replicas": 2,
        "config": {"kv": {"transfer": "nixl", "host_gib": 8}, "scheduler": {"tpot_ms": 50}},
        "args": ["--tensor-parallel-size", "4", "--served-model-name", "qwen"],
        "resources": {"limits": {"nvidia.com/gpu": "4"}},
        "cacheClaim": "models",
        "shmSize": "32Gi",
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    }
    for role in ("prefill", "decode")
]
ASCEND = {
    **MIXED,
    "name": "ascend",
    "replicas": 2,
    "registers": False,
    "image": {"repository": "xllm-ascend"},
    "securityContext": {"runAsUser": 0},
    "resources": {"limits": {"huawei.com/Ascend910": "1"}},
}
BATCHES = {
    "replicas": 1,
    "image": {"repository": "xllm-cpu"},
    "args": ["--routing=kv_aware", "--roles=dynamic"],
    "batches": {"enabled": True, "storageClassName": "fast"},
    "ingress": {"enabled": True, "host": "llm.example", "className": "nginx", "tlsSecret": "tls"},
}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {"auth": AUTH},
    "prefill and decode": {"auth": AUTH, "instances": APART, "monitoring": {"podMonitor": True}},
    "batches, ingress": {"auth": AUTH, "router": BATCHES},
    "ascend": {"auth": AUTH, "instances": [ASCEND, MIXED], "router": {"replicas": 1}},
    "what is there": {
        "auth": {"existingSecret": "tokens"},
        "etcd": {"address": "http://etcd.infra:2379"},
        "imagePullSecrets": [{"name": "registry"}],
    },
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "auth.adminToken and auth.existingSecret are both empty; give one."),
    ({"auth": {"adminToken": "12345678"}}, "auth.adminToken has to begin with a letter"),
    ({"auth": AUTH, "router": {"replica": 2}}, "'/router': additional properties 'replica' not"),
    ({"auth": AUTH, "router": {"replicas": 0}}, "'/router/replicas': minimum: got 0, want 1"),
    (
        {"auth": AUTH, "router": {"batches": {"enabled": True}}},
        "router.replicas is above 1; with router.batches.enabled it has to be 1",
    ),
    ({"auth": AUTH, "instances": []}, "'/instances': minItems: got 0, want 1"),
    ({"auth": AUTH, "instances": [{"name": "a"}]}, "'/instances/0': missing property 'model'"),
    (
        {"auth": AUTH, "instances": [{**MIXED, "role": "both"}]},
        "'/instances/0/role': value must be one of 'prefill', 'decode', 'mixed'",
    ),
    ({"auth": AUTH, "instances": [{**MIXED, "args": [4]}]}, "got number, want string"),
    (
        {"auth": AUTH, "instances": [{**MIXED, "config": {"sheduler": {}}}]},
        "'/instances/0/config': additional properties 'sheduler' not allowed",
    ),
    ({"auth": AUTH, "instances": [MIXED, MIXED]}, 'instances has the name "mixed", which is taken'),
    ({"auth": AUTH, "instances": [{**MIXED, "name": "etcd"}]}, 'the name "etcd", which is taken'),
    ({"auth": AUTH, "instances": [{**ASCEND, "role": "decode"}]}, "'/instances/0/role'"),
]
EACH = pytest.mark.parametrize("case", CASES)


@functools.cache
def asked() -> Helm:
    """Everything in one process of Helm's."""
    return helm([*CASES.values(), *(values for values, _ in REFUSED)])


def rendered(case: str) -> list[dict[str, Any]]:
    """The manifests of a case."""
    made = asked().made[list(CASES).index(case)]
    assert isinstance(made, list), made
    return made


def pods(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The templates of pods, by the component that they are of."""
    for one in manifests:
        if one["kind"] in ("Deployment", "StatefulSet"):
            template = one["spec"]["template"]
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], template


def container(template: dict[str, Any]) -> dict[str, Any]:
    (one,) = template["spec"]["containers"]
    found: dict[str, Any] = one
    return found


def environment(template: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", "secret") for one in container(template).get("env", ())}


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


@pytest.mark.vllm
def test_instances_start_with_options_and_settings_that_exist() -> None:
    templates = [
        template
        for case in CASES
        for component, template in pods(rendered(case))
        if component not in ("router", "etcd")
    ]
    assert serve_refusals([container(one)["args"] for one in templates]) == []
    for one in templates:
        check_instance(environment(one))
        assert unknown_to_vllm(environment(one)) == set()


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
