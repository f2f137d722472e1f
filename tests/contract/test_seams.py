"""Every seam holds on the vLLM under test, and one that does not is noticed and named."""

from __future__ import annotations

import os
from typing import Any

import pytest
import vllm.config
import vllm.engine.arg_utils
import vllm.v1.core.sched.scheduler
from packaging.specifiers import SpecifierSet

from xllm_plugins import compat
from xllm_plugins.compat import (
    ASCEND,
    NIXL,
    SEAMS,
    VLLM,
    inspect_seam,
    is_patched,
    load_seam,
    patch,
    seams_here,
    upstream_of,
    vllm_version,
)
from xllm_plugins.errors import CompatError

pytestmark = pytest.mark.vllm

IN_VLLM = [seam for seam in SEAMS if upstream_of(seam) == VLLM]
ELSEWHERE = {ASCEND: "0.23.0", NIXL: "1.5.1"}  # what tests/ascend and test_nixl_progress have
# vLLM before 0.26 has no endpoint plugins, so there is nobody to ask for the engine's status.
ABSENT = {
    "0.23.0": {
        "engine_status",
        "eplb_cpu",
        "kv_tiers",
        "spec_beside",
        "spec_width",
        "target_platform",
    }
}


def test_the_vllm_under_test_is_the_one_that_is_meant() -> None:
    assert vllm_version() == os.environ.get("XLLM_EXPECT_VLLM", "0.32.0")


@pytest.mark.parametrize("seam", IN_VLLM)
def test_a_seam_holds(seam: str) -> None:
    report = inspect_seam(seam)
    assert report.holds == (seam not in ABSENT.get(str(vllm_version()), ())), report.reason
    if not report.holds:
        assert report.reason == f"holds for vLLM {load_seam(seam).HOLDS_FOR}, here is 0.23.0"


@pytest.mark.parametrize("seam", SEAMS)
def test_a_seam_says_why_it_is_there_and_what_it_relies_on(seam: str) -> None:
    module = load_seam(seam)
    assert module.WHY.endswith(".")
    assert module.WITHOUT.endswith(".")
    assert SpecifierSet(module.HOLDS_FOR).contains(ELSEWHERE.get(upstream_of(seam), "0.32.0"))
    assert module.SEAM
    assert all(isinstance(target, compat.Target) for target in module.SEAM)


@pytest.mark.parametrize(
    ("seam", "owner", "attribute", "replacement", "sentence"),
    [
        pytest.param(
            "engine_config",
            vllm.engine.arg_utils.EngineArgs,
            "create_engine_config",
            None,
            "vllm.engine.arg_utils:EngineArgs.create_engine_config is not there: "
            "type object 'EngineArgs' has no attribute 'create_engine_config'",
            id="a method that is gone",
        ),
        pytest.param(
            "scheduler_levers",
            vllm.v1.core.sched.scheduler.Scheduler,
            "_preempt_request",
            lambda self, timestamp, request: None,
            "vllm.v1.core.sched.scheduler:Scheduler._preempt_request takes "
            "(self, timestamp, request), relied on are self, request, timestamp in this order",
            id="parameters in another order",
        ),
        pytest.param(
            "scheduler_levers",
            vllm.v1.core.sched.scheduler.Scheduler,
            "update_from_output",
            lambda self, scheduler_output: None,
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output takes "
            "(self, scheduler_output), relied on are self, scheduler_output, model_runner_output "
            "in this order",
            id="a parameter that is gone",
        ),
    ],
)
def test_an_upstream_that_moved_is_noticed(
    seam: str,
    owner: type,
    attribute: str,
    replacement: Any,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if replacement is None:
        monkeypatch.delattr(owner, attribute)
    else:
        monkeypatch.setattr(owner, attribute, replacement)
    report = inspect_seam(seam)
    assert (report.holds, report.reason) == (False, sentence)


def test_more_parameters_than_relied_on_are_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = vllm.v1.core.sched.scheduler.Scheduler
    monkeypatch.setattr(
        scheduler, "_preempt_request", lambda self, request, reason, timestamp, drop=False: None
    )
    assert inspect_seam("scheduler_levers").holds


@pytest.mark.parametrize("version", ["0.22.1", "0.33.0", "1.0.0rc1"])
@pytest.mark.parametrize("seam", IN_VLLM)
def test_a_version_that_it_was_not_made_for_is_noticed(
    seam: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    report = inspect_seam(seam)
    holds_for = load_seam(seam).HOLDS_FOR
    assert (report.holds, report.reason) == (
        False,
        f"holds for vLLM {holds_for}, here is {version}",
    )


def test_without_vllm_no_seam_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: None)
    assert inspect_seam("cli_option").reason == "vLLM is not installed"


@pytest.mark.parametrize("seam", sorted(set(SEAMS) - set(IN_VLLM)))
def test_a_seam_elsewhere_is_not_looked_for_where_that_is_not_installed(
    seam: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "distribution_version", lambda *names: None)
    assert inspect_seam(seam).reason == f"{upstream_of(seam)} is not installed"
    assert seams_here() == IN_VLLM


class Upstream:
    @staticmethod
    def static(value: int) -> int:
        return value

    def method(self, value: int) -> int:
        return value


def _doubled(original: Any) -> Any:
    return lambda *args: 2 * original(*args)


@pytest.mark.parametrize("attribute", ["static", "method"])
def test_a_patch_is_applied_once_and_has_one_owner(attribute: str) -> None:
    Target = type("Target", (Upstream,), {attribute: vars(Upstream)[attribute]})  # noqa: N806
    assert not is_patched(Target, attribute)
    patch(Target, attribute, _doubled, "ours")
    patch(Target, attribute, _doubled, "ours")
    assert is_patched(Target, attribute)
    assert getattr(Target(), attribute)(3) == 6
    assert not is_patched(Upstream, attribute)

    with pytest.raises(CompatError, match=f"Target.{attribute} was already patched by ours"):
        patch(Target, attribute, _doubled, "theirs")
    assert getattr(Target(), attribute)(3) == 6


def test_without_a_role_for_both_no_instance_offers_to_move_kv(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(**given: Any) -> None:
        raise ValueError("kv_role: allowed are kv_producer and kv_consumer")

    monkeypatch.setattr(vllm.config, "KVTransferConfig", refuses)
    report = inspect_seam("kv_both")
    assert not report.holds
    assert report.reason.startswith("KVTransferConfig takes no kv_both: kv_role")
