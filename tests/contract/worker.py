"""A model runner without a model: it executes a scheduler's output as vLLM's own worker does.

It keeps what a worker keeps (tokens and block tables, built from scheduler outputs alone) and a KV
cache whose every slot remembers the prefix that was computed into it. A token is sampled from the
whole prefix, and only after every slot of it was found right. So a token stream is right exactly if
the schedule was, whatever the schedule was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput

VOCABULARY = 50


def next_token(prefix: int) -> int:
    """The model: the token that follows a prefix."""
    return prefix % VOCABULARY


def extend(prefix: int, token: int) -> int:
    """The prefix that is one token longer."""
    return hash((prefix, token))


def completion(prompt: Sequence[int], tokens: int) -> list[int]:
    """What the model answers, worked out without any schedule."""
    prefix = 0
    for token in prompt:
        prefix = extend(prefix, token)
    answer = []
    for _ in range(tokens):
        answer.append(next_token(prefix))
        prefix = extend(prefix, answer[-1])
    return answer


@dataclass
class _State:
    """One request in the worker's batch; ``prefixes[i]`` is the prefix that ends at token i."""

    blocks: list[int]
    tokens: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.prefixes.append(extend(self.prefixes[-1] if self.prefixes else 0, token))

    def replace(self, tokens: Sequence[int]) -> None:
        self.tokens, self.prefixes = [], []
        for token in tokens:
            self.append(token)


class Worker:
    """Executes steps in the order in which they are launched."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._states: dict[str, _State] = {}
        self._kv: dict[tuple[int, int], int] = {}

    def execute(self, output: Any) -> ModelRunnerOutput:
        """Compute one step's tokens."""
        for request_id in output.finished_req_ids:
            self._states.pop(request_id, None)
        computed = self._update_states(output)
        sampled = [
            self._compute(request_id, computed[request_id], tokens)
            for request_id, tokens in output.num_scheduled_tokens.items()
        ]
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
        )

    def _update_states(self, output: Any) -> dict[str, int]:
        computed = {}
        for new in output.scheduled_new_reqs:
            state = _State(blocks=list(new.block_ids[0]))
            state.replace(new.prefill_token_ids or new.prompt_token_ids)
            self._states[new.req_id] = state
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            state = self._states[request_id]
            added = cached.new_block_ids[index]
            resumed = request_id in cached.resumed_req_ids
            if resumed:
                state.blocks = []
            state.blocks += added[0] if added is not None else []
            known = cached.all_token_ids.get(request_id)
            if resumed and known is not None:
                state.replace(known)
            # A request that sat out a step comes with all its tokens; vLLM's worker takes them as
            # they are, so they must be those that it has sampled.
            assert known is None or known == state.tokens, f"{request_id} would lose tokens"
            computed[request_id] = cached.num_computed_tokens[index]
        return computed

    def _compute(self, request_id: str, computed: int, new_tokens: int) -> list[int]:
        state = self._states[request_id]
        end = computed + new_tokens
        assert end <= len(state.tokens), f"{request_id} computes tokens that do not exist yet"
        for position in range(computed, end):
            self._kv[self._slot(state, position)] = state.prefixes[position]
        if end < len(state.tokens):
            return []
        for position in range(end):
            found = self._kv.get(self._slot(state, position))
            assert found == state.prefixes[position], f"{request_id} reads foreign KV at {position}"
        token = next_token(state.prefixes[-1])
        state.append(token)
        return [token]

    def _slot(self, state: _State, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self._block_size)
        return state.blocks[block], offset
