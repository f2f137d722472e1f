"""A step policy: among offline prompts under way, the one with the least left goes first."""

from __future__ import annotations

from dataclasses import replace

from xllm_plugins.features import Policy
from xllm_plugins.hookspecs import hookimpl
from xllm_scheduler.engine.policy import ElasticPolicy, RequestView, StepPlan, StepView


class ShortestFirst(ElasticPolicy):
    """The elastic policy, shown the offline prefills in another order.

    The elastic policy gives what time is left to offline prefills in the order in which it sees
    them. The shortest first makes their mean time to first token the least.
    """

    def plan(self, view: StepView) -> StepPlan:
        """Decide one step."""
        running = sorted(view.running, key=_prefill_tokens_left)
        return super().plan(replace(view, running=tuple(running)))


def _prefill_tokens_left(request: RequestView) -> int:
    """0 for online work and for decodes, which so keep their order and stay in front."""
    return 0 if request.online or request.decoding else request.new_tokens


@hookimpl
def xllm_policies() -> list[Policy]:
    """The ``shortest-first`` step policy."""
    return [Policy("scheduler.step", "shortest-first", ShortestFirst)]
