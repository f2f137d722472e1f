"""Runs vLLM's own scheduler tests with vLLM's classes and with ours, and compares.

    .ci/upstream-tests

fetches the tests and calls this. A test that passes with vLLM's classes has to pass with ours when
all requests are online. When every second one is offline, it has to pass unless ``DIFFERS`` names
it, and even then it may fail in an assertion of its own only, not inside vLLM or our code.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.upstream.models import write_hub
from tests.upstream.plugin import HALF_OFFLINE, OURS, THEIRS
from tests.upstream.session import Outcomes, outcomes_of

AT_ONCE = 2
# So many tests must have passed in which our classes scheduled steps, and were given offline
# requests; with fewer the comparison would say nothing.
ENOUGH_STEPS, ENOUGH_OFFLINE = 300, 150
CORE = "tests/v1/core"
CONNECTOR = "tests/v1/kv_connector/unit"
# Those in which a scheduler is built. Not test_scheduler_e2e and test_reset_prefix_cache_e2e, which
# need weights and kernels, nor test_dflash_lookahead, which needs a drafter from a hub.
FILES = (
    f"{CORE}/prefix_cache/test_partial_prefix_cache_hits.py",
    f"{CORE}/test_async_scheduler.py",
    f"{CORE}/test_deferred_block_free.py",
    f"{CORE}/test_prefix_caching.py",
    f"{CORE}/test_prefix_replay.py",
    f"{CORE}/test_priority_preemption_bug.py",
    f"{CORE}/test_priority_scheduler_random.py",
    f"{CORE}/test_scheduler.py",
    f"{CORE}/test_swa_inflight_window_free.py",
    f"{CORE}/test_worker_slot_overflow.py",
    f"{CONNECTOR}/offloading_connector/test_scheduler.py",
    f"{CONNECTOR}/test_bidirectional_kv_transfer.py",
    f"{CONNECTOR}/test_cache_pollution_prevention.py",
    f"{CONNECTOR}/test_decode_bench_connector.py",
    f"{CONNECTOR}/test_error_propagation.py",
    f"{CONNECTOR}/test_invalid_blocks_correctness.py",
    f"{CONNECTOR}/test_kv_load_failure_recovery.py",
    f"{CONNECTOR}/test_mooncake_connector.py",
    f"{CONNECTOR}/test_multi_connector.py",
    f"{CONNECTOR}/test_nixl_connector.py",
    f"{CONNECTOR}/test_nixl_connector_hma.py",
    f"{CONNECTOR}/test_nixl_simple_cpu_offload.py",
    f"{CONNECTOR}/test_remote_decode_lifecycle.py",
    f"{CONNECTOR}/test_remote_prefill_lifecycle.py",
    f"{CONNECTOR}/test_scheduler_kv_connector_override.py",
    "tests/v1/spec_decode/test_dynamic_sd.py",
    "tests/v1/streaming_input/test_scheduler_streaming.py",
)
_FAILURE = f"{CONNECTOR}/test_kv_load_failure_recovery.py::test"
_REMOTE = f"{CONNECTOR}/test_remote_prefill_lifecycle.py::test"
_SCHEDULER = f"{CORE}/test_scheduler.py::test"
_ORDER = "expects one order of all; ours admits and keeps online requests before offline ones"
_VICTIM = "expects a certain victim of preemption; ours takes offline requests first"
_HEADROOM = "its KV cache is tiny; ours keeps the growth of online requests free of offline ones"
_LOADED = "prompts are loaded, not computed; ours plans before it knows, so offline ones come later"
# Tests that cannot hold when every second request is offline, without parameters, and why.
DIFFERS = {
    f"{CORE}/test_deferred_block_free.py::test_allocation_retry_waits_for_fence_then_succeeds": (
        _VICTIM
    ),
    f"{CORE}/test_worker_slot_overflow.py::"
    "test_reset_prefix_cache_priority_does_not_over_admit_worker_slot": _ORDER,
    f"{_FAILURE}_sync_load_failure": _LOADED,
    f"{_SCHEDULER}_fcfs_mixed_blocked_types_remote_load_drains_first": _ORDER,
    f"{_SCHEDULER}_priority_scheduling_arrival_time_tiebreaker": _ORDER,
    f"{_SCHEDULER}_priority_scheduling_basic_ordering": _ORDER,
    f"{_SCHEDULER}_priority_scheduling_ec_connector_preemption_and_resumption": _HEADROOM,
    f"{_SCHEDULER}_priority_scheduling_equal_priority_preemption": _ORDER,
    f"{_SCHEDULER}_priority_scheduling_fcfs_fallback": _ORDER,
    f"{_SCHEDULER}_priority_scheduling_heap_property": _ORDER,
    f"{_SCHEDULER}_priority_scheduling_mixed_priority_and_arrival": _ORDER,
    f"{_SCHEDULER}_priority_scheduling_preemption": _VICTIM,
    f"{_SCHEDULER}_priority_scheduling_preemption_and_resumption_when_out_of_kv": _HEADROOM,
    f"{_SCHEDULER}_priority_scheduling_preemption_victim_selection": _ORDER,
    f"{_SCHEDULER}_priority_scheduling_waiting_queue_order": _ORDER,
    f"{_SCHEDULER}_priority_scheduling_with_limited_slots": _ORDER,
    f"{_SCHEDULER}_schedule": _ORDER,
    f"{_SCHEDULER}_schedule_concurrent_partial_requests": _ORDER,
    f"{_SCHEDULER}_schedule_order": _ORDER,
    f"{_SCHEDULER}_schedule_partial_requests": _ORDER,
    f"{_SCHEDULER}_scheduler_reset_prefix_cache": _ORDER,
    f"{_SCHEDULER}_scheduler_stats_waiting_queues": _ORDER,
    f"{_SCHEDULER}_throttle_capacity_bound_guard_admits": _ORDER,
}


def main() -> int:
    """Run all three, print what they gave, and return the exit status."""
    source = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(AT_ONCE) as pool:
        folder = Path(name)
        write_hub(folder / "hub")
        theirs, ours, half = pool.map(
            lambda mode: run(mode, source, folder), (THEIRS, OURS, HALF_OFFLINE)
        )
    wanted = passed(theirs)
    print(f"{len(wanted)} of {len(theirs)} tests pass with vLLM's classes")
    problems = lost(wanted, ours, "ours", source, {})
    problems += lost(wanted, half, "ours, half offline", source, DIFFERS)
    if count(ours, "steps") < ENOUGH_STEPS or count(half, "offline") < ENOUGH_OFFLINE:
        problems.append("too few of these tests used our classes to mean anything")
    print("\n".join(problems))
    return 1 if problems else 0


def run(
    mode: str, source: Path, folder: Path, files: Sequence[str] = FILES, more: Sequence[str] = ()
) -> Outcomes:
    """The outcomes of tests with one kind of classes, and with more options for pytest."""
    return outcomes_of(
        source,
        files,
        folder / "-".join((mode, *more[-1:])),
        "plugin",
        ["--scheduler", mode, *more],
        hub=folder / "hub",
    )


def passed(outcomes: Outcomes) -> set[str]:
    """The tests that passed."""
    return {test for test, result in outcomes.items() if result["outcome"] == "passed"}


def count(outcomes: Outcomes, what: str) -> int:
    """In how many of the tests that passed our classes had steps or offline requests."""
    return sum(bool(outcomes[test][what]) for test in passed(outcomes))


def lost(
    wanted: set[str], outcomes: Outcomes, what: str, source: Path, differs: Mapping[str, str]
) -> list[str]:
    """Print the counts; return a line for each test that should have passed, or not be listed."""
    missing = sorted(wanted - passed(outcomes))
    print(
        f"{len(wanted) - len(missing)} of these pass with {what}; "
        f"{count(outcomes, 'steps')} passed in which our classes scheduled, "
        f"{count(outcomes, 'offline')} with offline requests"
    )
    problems = []
    for test in missing:
        result = outcomes.get(test, {"why": "it did not run", "where": ""})
        in_the_test = result["where"].startswith(str(source))
        if test.partition("[")[0] not in differs or not in_the_test:
            why = result["why"].splitlines()[0].removeprefix(f"{source}/")
            problems.append(f"{what}: {test}\n    {why}")
    for test in sorted(differs.keys() - {test.partition("[")[0] for test in missing}):
        print(f"note: {test} passes with {what}, though it is listed")
    return problems


if __name__ == "__main__":
    sys.exit(main())
