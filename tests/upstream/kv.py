"""Runs vLLM's own tests of its KV connectors with ours in their place.

    .ci/upstream-tests

fetches the tests and calls this. Every test has to pass unless ``DIFFERS`` names it. First ours
stand for vLLM's offloading connector and its connector of connectors; then ours is put around the
connector that a test names, so that transfers go through it too. See ``kv_plugin.py``.
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.upstream.compare import AT_ONCE, CONNECTOR, count, passed, run
from tests.upstream.kv_plugin import AROUND, OURS
from tests.upstream.models import write_hub
from tests.upstream.plugin import THEIRS
from tests.upstream.session import Outcomes

# By mode: where such a connector is built, and in how many tests ours must have had steps; with
# fewer they would say nothing.
FILES = {
    OURS: (
        f"{CONNECTOR}/offloading_connector/test_events.py",
        f"{CONNECTOR}/offloading_connector/test_scheduler.py",
        f"{CONNECTOR}/test_hma_auto_config.py",
        f"{CONNECTOR}/test_multi_connector.py",
    ),
    # Not test_decode_bench_connector, all of which asks its connector for its class.
    AROUND: (
        f"{CONNECTOR}/test_bidirectional_kv_transfer.py",
        f"{CONNECTOR}/test_cache_pollution_prevention.py",
        f"{CONNECTOR}/test_error_propagation.py",
        f"{CONNECTOR}/test_invalid_blocks_correctness.py",
        f"{CONNECTOR}/test_kv_load_failure_recovery.py",
        f"{CONNECTOR}/test_nixl_simple_cpu_offload.py",
        f"{CONNECTOR}/test_remote_decode_lifecycle.py",
        f"{CONNECTOR}/test_remote_prefill_lifecycle.py",
        f"{CONNECTOR}/test_scheduler_kv_connector_override.py",
    ),
}
ENOUGH_STEPS = {OURS: 75, AROUND: 30}
_PLUGIN = ("-p", "kv_plugin", "--connectors")
_BIDIRECTIONAL = f"{CONNECTOR}/test_bidirectional_kv_transfer.py::test"
_MULTI = f"{CONNECTOR}/test_multi_connector.py::test_multi"
_OFFLOADING = f"{CONNECTOR}/offloading_connector/test_scheduler.py::"
_OVERRIDE = f"{CONNECTOR}/test_scheduler_kv_connector_override.py::test_connector"
_PREFILL = f"{CONNECTOR}/test_remote_prefill_lifecycle.py::test"
_FIXTURE = "takes a fixture of vLLM's main conftest, which is not here"
_HUB = "runs a model from a hub"
_MAKING = "looks for methods in the class itself, and ours has them from vLLM's"
_METADATA = "looks at what its connector tells workers, which ours wraps"
_MOCKED = "its requests are mocks, of which nobody can tell what their KV depends on"
_OFFERED = "expects that what the device still had is not offered to host memory, which may lack it"
_REPLACED = "replaces a method of ours, which then does not know whose request it is"
# Tests that cannot hold with ours, without parameters, and why.
DIFFERS = {
    f"{_BIDIRECTIONAL}_build_connector_meta_multiple_requests": _METADATA,
    f"{_BIDIRECTIONAL}_build_connector_meta_recv_entries": _METADATA,
    f"{_BIDIRECTIONAL}_no_double_read_blocks_after_reschedule": _METADATA,
    f"{_BIDIRECTIONAL}_p_node_deferred_pull_on_no_handshake": _FIXTURE,
    f"{_BIDIRECTIONAL}_p_node_pull_kv_from_d": _FIXTURE,
    f"{_BIDIRECTIONAL}_p_node_pull_then_send_kv": _FIXTURE,
    f"{_BIDIRECTIONAL}_remote_blocks_processed_flag_persists": _METADATA,
    f"{_BIDIRECTIONAL}_turn2_deadline_gate": _FIXTURE,
    f"{_BIDIRECTIONAL}_turn2_full_prefix_hit_with_expired_deadline_skips_gate": _FIXTURE,
    f"{_MULTI}_connector_overrides_all_base_methods": _MAKING,
    f"{_MULTI}_example_connector_consistency": _HUB,
    f"{_OFFLOADING}TestEagle::test_eagle_verified_prevents_double_pop": _MOCKED,
    f"{_OFFLOADING}TestEagle::test_full_attn_lookup_pops_one_block": _MOCKED,
    f"{_OFFLOADING}TestEagle::test_full_attn_lookup_single_block_returns_zero": _MOCKED,
    f"{_OFFLOADING}TestEagle::test_non_eagle_tighten_clears_eagle_verified": _MOCKED,
    f"{_OFFLOADING}TestSharedGroupMTPOffload::test_no_annotation_marks_no_groups": _OFFERED,
    f"{_OFFLOADING}test_reset_cache": _OFFERED,
    f"{_OFFLOADING}test_swa_alignment_skip": _OFFERED,
    f"{_OFFLOADING}test_two_groups_full_and_sliding_window": _OFFERED,
    f"{_OVERRIDE}_block_state_covers_steps_without_new_blocks": _METADATA,
    f"{_OVERRIDE}_receives_block_hashes": _METADATA,
    f"{_PREFILL}_async_load_does_not_double_reserve_mamba_spec_blocks": _REPLACED,
    f"{_PREFILL}_async_load_reserves_blocks_for_inflight": _REPLACED,
    f"{_PREFILL}_async_load_reserves_blocks_for_promotion_margin": _REPLACED,
    f"{_PREFILL}_async_loads_both_admitted_when_pool_fits": _REPLACED,
    f"{_PREFILL}_deferred_lookup_does_not_block_parked_load": _REPLACED,
}


def main() -> int:
    """Run both, print what they gave, and return the exit status."""
    source = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(AT_ONCE) as pool:
        folder = Path(name)
        write_hub(folder / "hub")
        found = pool.map(
            lambda mode: run(THEIRS, source, folder, FILES[mode], (*_PLUGIN, mode)), FILES
        )
        problems = [
            line for mode, tests in zip(FILES, found, strict=True) for line in lost(mode, tests)
        ]
    print("\n".join(problems))
    return 1 if problems else 0


def lost(mode: str, outcomes: Outcomes) -> list[str]:
    """Print the counts; return a line for each test that should have passed."""
    failed = {test for test, result in outcomes.items() if result["outcome"] == "failed"}
    print(
        f"connectors, {mode}: {len(passed(outcomes))} of {len(outcomes)} tests pass, "
        f"{count(outcomes, 'steps')} in which ours had steps"
    )
    named = {test.partition("[")[0] for test in failed}
    problems = [
        f"{mode}: {test}\n    {outcomes[test]['why'].splitlines()[0]}"
        for test in sorted(failed)
        if test.partition("[")[0] not in DIFFERS
    ]
    for test in sorted(DIFFERS.keys() - named):
        if test.partition("::")[0] in FILES[mode]:
            print(f"note: {test} passes, though it is listed")
    if count(outcomes, "steps") < ENOUGH_STEPS[mode]:
        problems.append(f"{mode}: too few of these tests used ours to mean anything")
    return problems


if __name__ == "__main__":
    sys.exit(main())
