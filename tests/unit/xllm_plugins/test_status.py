"""Reports of the features of one engine process."""

from __future__ import annotations

from xllm_plugins.status import Report, now_and_then


def test_a_worker_is_asked_now_and_then() -> None:
    asked: list[object] = []
    now_s = 100.0

    def make(engine_core: object) -> Report:
        asked.append(engine_core)
        return Report(facts={"asked": len(asked)})

    report = now_and_then(make, clock=lambda: now_s)
    assert [report("core").facts["asked"] for _ in range(3)] == [1, 1, 1]
    now_s = 110.0
    assert report("core").facts["asked"] == 2
