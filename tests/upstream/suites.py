"""Runs the own unit tests of vLLM 0.23.0 and of vllm-ascend 0.23.0 with this package beside them.

    make upstream-023

Each suite runs three times: with our plugin hidden from vLLM, with it installed and not chosen, and
with all of its features chosen and the elastic scheduler in place of vLLM's. What passes without us
has to pass with us; what fails without us, for want of an NPU, of kernels or of a hub, does not.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.upstream.compare import count, passed
from tests.upstream.models import write_hub
from tests.upstream.session import Outcomes, outcomes_of
from tests.upstream.suites_plugin import MODES, ON, WITHOUT
from xllm_plugins.activation import allow_list
from xllm_plugins.names import ENTRY_POINT, ENV_ALLOW_LIST, ENV_SELECTION

_V1, _CONNECTOR = "tests/v1", "tests/v1/kv_connector/unit"
# Of vLLM's, those of what our seams touch; the others compute, or start servers.
FILES = {
    "vllm": (
        "tests/distributed/test_eplb_algo.py",
        "tests/distributed/test_eplb_utils.py",
        "tests/distributed/test_events.py",
        "tests/engine/test_arg_utils.py",
        "tests/entrypoints/openai/chat_completion/test_serving_chat.py",
        f"{_V1}/core",
        f"{_V1}/ec_connector/unit",
        _CONNECTOR,
        f"{_V1}/kv_offload",
        f"{_V1}/sample/test_rejection_sampler.py",
        f"{_V1}/spec_decode/test_ngram.py",
        f"{_V1}/streaming_input",
        f"{_V1}/test_request.py",
    ),
    "vllm-ascend": ("tests/ut",),
}
_SERVES = "serves a model, which needs weights and kernels"
# Not run at all, and why.
EXCLUDED = {
    f"{_V1}/core/test_reset_prefix_cache_e2e.py": _SERVES,
    f"{_V1}/core/test_scheduler_e2e.py": _SERVES,
    f"{_V1}/kv_offload/cpu/test_swap_blocks_triton.py": "computes with Triton",
    f"{_CONNECTOR}/test_example_connector.py": _SERVES,
    f"{_CONNECTOR}/test_lmcache_integration.py": "needs LMCache",
    f"{_CONNECTOR}/test_mooncake_store_hma_e2e.py": _SERVES,
    f"{_CONNECTOR}/test_offloading_connector.py": _SERVES,
}


def main() -> int:
    """Run one suite three times, print what that gave, and return the exit status."""
    suite, source = sys.argv[1], Path(sys.argv[2]).resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hub(folder / "hub")
        theirs, *ours = (run(suite, mode, source, folder) for mode in MODES)
    wanted = passed(theirs)
    print(f"{suite}: {len(wanted)} of {len(theirs)} tests pass without us")
    planned = count(ours[-1], "steps")
    print(f"{suite}: in {planned} of those that pass with us on our scheduler plans steps")
    problems = [] if planned else ["our scheduler planned nothing, so this says nothing"]
    for mode, outcomes in zip(MODES[1:], ours, strict=True):
        lost = sorted(wanted - passed(outcomes))
        print(f"{suite}: {len(wanted) - len(lost)} of these pass with us {mode}")
        for test in lost:
            why = outcomes.get(test, {}).get("why", "it did not run").splitlines()[0]
            problems.append(f"{mode}: {test}\n    {why.removeprefix(f'{source}/')}")
    print("\n".join(problems))
    return 1 if problems else 0


def run(suite: str, mode: str, source: Path, folder: Path) -> Outcomes:
    """The outcomes of a suite's tests in one mode."""
    environment = {}
    if mode == WITHOUT:
        others = [name for name in allow_list(None).split(",") if name != ENTRY_POINT]
        environment[ENV_ALLOW_LIST] = ",".join(others)
    if mode == ON:
        environment[ENV_SELECTION] = "xllm"
    return outcomes_of(
        source,
        FILES[suite],
        folder / mode,
        "suites_plugin",
        ["--mode", mode, *(f"--ignore={source / path}" for path in EXCLUDED)],
        hub=folder / "hub",
        env=environment,
        path=[os.environ["PYTHONPATH"]],
    )


if __name__ == "__main__":
    sys.exit(main())
