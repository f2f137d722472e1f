"""A step policy: among offline prompts under way, the one with the least left goes first."""

from __future__ import annotations

from xllm_plugins.features import Policy
from xllm_plugins.hookspecs import hookimpl
from xllm_scheduler.engine.elastic import ElasticPolicy
from xllm_scheduler.engine.policy import PrefillView, StepPlan, StepView


class ShortestFirst(ElasticPolicy):
    """The elastic policy, shown the offline prefills in another order.

    The elastic policy gives what time is left to offline prefills in the order in which it sees
    them. The shortest first makes their mean time to first token the least.
    """

    def plan(self, view: StepView) -> StepPlan:
        """Decide one step."""
        return super().plan(view._replace(prefills=sorted(view.prefills, key=_offline_tokens_left)))


def _offline_tokens_left(request: PrefillView) -> int:
    """0 for online prefills, which so keep their order and stay in front."""
    return 0 if request.online else request.new_tokens


@hookimpl
def xllm_policies() -> list[Policy]:
    """The ``shortest-first`` step policy."""
    return [Policy("scheduler.step", "shortest-first", ShortestFirst)]
