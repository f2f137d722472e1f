"""A step under construction, as a policy fills it."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_scheduler.engine.policy import PrefillView, StepView

_MIN_CHUNK = 16  # smaller chunks cost more in overhead than they bring


def most_tokens(request: PrefillView) -> int:
    """What vLLM computes of it in a step that nothing else bounds."""
    return min(request.new_tokens, request.step_tokens)


def least_tokens(request: PrefillView) -> int:
    """The smallest piece of it that is worth a step: a minimal chunk, or all that is left."""
    most = most_tokens(request)
    return min(_MIN_CHUNK, most) if request.splittable else most


class Step:
    """A step under construction: its shape, what is left of the budget, and the caps."""

    def __init__(self, view: StepView) -> None:
        self.time = view.step_time
        self.shape = view.online.shape
        self.tokens_left = max(0, view.max_tokens - view.online.tokens)
        self.used = min(view.max_tokens, view.online.tokens)
        self.tokens: dict[str, int] = {}
        self.chunks: dict[str, int] = {}
        self.timed = False  # whether an online prompt got less than vLLM would have given it

    def ms(self) -> float:
        """How long it takes, as predicted."""
        return self.time.step_ms(self.shape)

    def add(self, request: PrefillView, tokens: int) -> None:
        """Add so many of a request's tokens, more of them if it is in the step already."""
        before = self.tokens.get(request.request_id, 0)
        tokens = min(tokens, self.tokens_left)
        context = request.context_tokens + before
        self.shape = self.shape.with_chunk(tokens, context, more=before > 0)
        self.tokens_left -= tokens
        self.used += tokens
        total = before + tokens
        if total:
            self.tokens[request.request_id] = total
        self.chunks.pop(request.request_id, None)
        # A waiting request without tokens needs no cap: what is left of the budget is not its.
        if total < most_tokens(request) and (total or request.running):
            self.chunks[request.request_id] = total

    def free_last(self, in_order: Sequence[PrefillView]) -> None:
        """Let an online one that only the budget bounds have what those before it may leave."""
        for request in reversed(in_order):
            if request.request_id in self.tokens:
                if request.online and not self.tokens_left:
                    self.chunks.pop(request.request_id, None)
                return

    def room(self, request: PrefillView, target_ms: float) -> int:
        """How many more tokens of a prefill fit; a small rest of it or at least a minimal chunk."""
        time = self.time
        before = self.tokens.get(request.request_id, 0)
        spare_ms = target_ms - self.ms()
        if time.experts:
            # A chunk of any size may touch the experts that nothing else in the step does.
            spare_ms -= time.experts - time.experts_ms(self.shape.tokens)
        fitting = time.prefill_tokens_within(spare_ms, request.context_tokens + before)
        tokens = int(min(fitting, self.tokens_left, most_tokens(request) - before))
        return tokens if before or tokens >= least_tokens(request) else 0
