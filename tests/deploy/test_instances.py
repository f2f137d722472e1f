"""Instances of all deployments start with options, variables and settings that exist."""

from __future__ import annotations

import pytest

from tests.deploy.cases import CASES, container, environment, pods, rendered
from tests.deploy.compose import INSTANCES
from tests.deploy.options import Instance, refused


@pytest.mark.vllm
def test_vllm_and_our_settings_take_what_they_start_with() -> None:
    started = [Instance(one["command"], one["environment"]) for one in INSTANCES.values()]
    started += [
        Instance(container(template)["args"], environment(template))
        for case in CASES
        for component, template in pods(rendered(case))
        if component not in ("router", "etcd")
    ]
    assert len(started) >= 3 + len(CASES)
    assert refused(started) == []
