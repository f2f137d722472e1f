"""Every seam holds on vllm-ascend and, under its patches, on its vLLM."""

from __future__ import annotations

import pytest

from tests.contract.test_seams import ABSENT, ELSEWHERE, IN_VLLM
from xllm_plugins import compat
from xllm_plugins.compat import (
    ASCEND,
    SEAMS,
    inspect_seam,
    load_seam,
    upstream_of,
    vllm_version,
)

OTHERS = sorted(set(SEAMS) - set(IN_VLLM))


def test_the_versions_under_test_are_those_that_are_meant() -> None:
    assert vllm_version() == compat.distribution_version(ASCEND) == "0.23.0"


@pytest.mark.parametrize("seam", SEAMS)
def test_a_seam_holds(seam: str) -> None:
    report = inspect_seam(seam)
    assert report.holds == (seam not in ABSENT["0.23.0"]), report.reason
    if seam in OTHERS:
        assert report.reason == f"{upstream_of(seam)} {ELSEWHERE[upstream_of(seam)]}"


@pytest.mark.parametrize("seam", OTHERS)
def test_a_version_that_it_was_not_made_for_is_noticed(
    seam: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "distribution_version", lambda *names: "99.0rc1")
    report = inspect_seam(seam)
    holds_for = load_seam(seam).HOLDS_FOR
    assert report.reason == f"holds for {upstream_of(seam)} {holds_for}, here is 99.0rc1"


def test_a_factory_that_takes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ascend.eplb.core.policy.policy_factory import PolicyFactory

    monkeypatch.setattr(PolicyFactory, "generate_policy", staticmethod(lambda name: None))
    report = inspect_seam("ascend_eplb")
    assert not report.holds
    assert "PolicyFactory.generate_policy takes (name), relied on are policy_type" in report.reason
