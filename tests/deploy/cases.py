"""Values that the chart is tried with, and what Helm makes of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from tests.deploy.chart import Helm, helm

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
    ({"auth": {"adminToken": 12345678}}, "'/auth/adminToken': got number, want string"),
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
