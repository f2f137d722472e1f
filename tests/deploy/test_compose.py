"""The compose file: by its schema, with options and settings that exist, and all that it mounts."""

from __future__ import annotations

import re
import subprocess
import sys

import yaml

from tests.deploy.chart import DEPLOY, ROOT
from tests.deploy.compose import INSTANCES, PATH, SERVICES
from tests.deploy.options import check_router


def test_it_is_valid_by_the_schema() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    ran = subprocess.run([*check, PATH], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_the_router_starts_with_options_and_settings_that_exist() -> None:
    router = SERVICES["router"]
    assert router["entrypoint"] == ["xllm", "router"]
    check_router(router["command"], router["environment"])


def test_instances_have_cores_of_their_own() -> None:
    cores = {one["environment"]["VLLM_CPU_OMP_THREADS_BIND"] for one in INSTANCES.values()}
    assert len(cores) == len(INSTANCES) == 3


def test_router_and_instances_meet_in_one_etcd_with_one_token() -> None:
    router = SERVICES["router"]
    assert "--etcd=http://etcd:2379" in router["command"]
    assert "--address=http://router:8080" in router["command"]
    tokens = {one["environment"]["XLLM_SERVICE_TOKEN"] for one in INSTANCES.values()}
    assert tokens == {router["environment"]["XLLM_ROUTER_ADMIN_TOKEN"]}
    for one in INSTANCES.values():
        assert '"etcd": "http://etcd:2379"' in " ".join(one["command"])


def test_every_image_is_pinned_or_built_from_a_target_that_exists() -> None:
    for name, one in SERVICES.items():
        if "build" in one:
            build = one["build"]
            dockerfile = PATH.parent / build["context"] / build["dockerfile"]
            assert f" AS {build['target']}\n" in dockerfile.read_text(), name
            assert (PATH.parent / build["context"]).resolve() == ROOT
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", one["image"]), name


def test_prometheus_asks_every_router_and_instance() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    targets = [
        target
        for job in config["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    ]
    assert sorted(targets) == sorted(["router:8080", *(f"{name}:8000" for name in INSTANCES)])


def test_what_is_mounted_from_here_is_here() -> None:
    mounts = [m for one in SERVICES.values() for m in one.get("volumes", ()) if m[0] == "."]
    assert len(mounts) == 3
    assert [m for m in mounts if not (PATH.parent / m.split(":")[0]).exists()] == []
    (provider,) = yaml.safe_load(
        (DEPLOY / "grafana" / "provisioning" / "dashboards" / "xllm.yaml").read_text()
    )["providers"]
    assert any(m.split(":")[1] == provider["options"]["path"] for m in mounts)
