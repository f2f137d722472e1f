"""An engine without a model: a real vLLM scheduler and KV cache manager, driven for its CPU time.

What is left of an engine step is what its scheduler takes.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from xllm_plugins.activation import REPORT_KEY, SETTINGS_KEY
from xllm_plugins.config import section_values
from xllm_scheduler.config import SchedulerSection

BLOCK = 16
MAX_LEN = 8192
_VOCABULARY = 32000
_TOKEN = 7  # what every request is answered with, again and again


def build(
    scheduler_class: type,
    settings: Mapping[str, Any],
    *,
    budget: int,
    seqs: int,
    blocks: int,
    block_tokens: int = BLOCK,
    max_len: int = MAX_LEN,
    vocabulary: int = _VOCABULARY,
    policy: str = "fcfs",
) -> Any:
    """A scheduler of this class.

    Args:
        scheduler_class: one of vLLM's, or an elastic one on top of it.
        settings: of the section ``scheduler``; the others have their defaults.
        budget: vLLM's ``max_num_batched_tokens``.
        seqs: vLLM's ``max_num_seqs``.
        blocks: of the KV cache.
        block_tokens: of a block.
        max_len: vLLM's ``max_model_len``.
        vocabulary: token ids of the model.
        policy: vLLM's scheduling policy.
    """
    scheduler_config = SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_len,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        async_scheduling=False,
        policy=policy,
    )
    values = section_values(SchedulerSection()) | dict(settings)
    base = f"{Scheduler.__module__}.{Scheduler.__qualname__}"
    vllm_config = VllmConfig(
        model_config=_model_config(max_len, vocabulary),
        scheduler_config=scheduler_config,
        cache_config=CacheConfig(block_size=block_tokens, enable_prefix_caching=True),
        additional_config={
            SETTINGS_KEY: {"scheduler": values},
            REPORT_KEY: {"features": [{"feature": "scheduler", "attached_to": base}]},
        },
    )
    # The CPU platform has switched it off; the scheduler does not care for the platform.
    scheduler_config.async_scheduling = issubclass(scheduler_class, AsyncScheduler)
    return build_on(vllm_config, scheduler_class, blocks)


def build_on(vllm_config: VllmConfig, scheduler_class: Any, blocks: int) -> Any:
    """A scheduler as this configuration says, over a KV cache of so many blocks."""
    vllm_config.cache_config.num_gpu_blocks = blocks
    block_tokens = vllm_config.cache_config.block_size
    spec = FullAttentionSpec(
        block_size=block_tokens, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    return scheduler_class(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=block_tokens,
        log_stats=True,
    )


def write_model(directory: Path, max_len: int = MAX_LEN, vocabulary: int = _VOCABULARY) -> None:
    """Write the config of a tiny model, which has no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": vocabulary,
        "max_position_embeddings": max_len,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


@functools.cache
def _model_config(max_len: int, vocabulary: int) -> ModelConfig:
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory(prefix="xllm-model-") as folder:
        write_model(Path(folder), max_len, vocabulary)
        return ModelConfig(
            model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=max_len
        )


def request(
    request_id: str, prompt: Sequence[int], *, max_tokens: int, xargs: Mapping[str, Any]
) -> Request:
    """A request as the engine core makes it, which arrives now."""
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(max_tokens=max_tokens, extra_args=dict(xargs)),
        pooling_params=None,
        arrival_time=time.time(),
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


class Turn(NamedTuple):
    """One turn of the engine's loop; the times are this thread's CPU time."""

    schedule_s: float
    update_s: float
    """0 in the first turn of an asynchronous scheduler, in which no step ends."""
    requests: int
    """How many requests the step computes."""


class Engine:
    """Drives a scheduler as ``EngineCore.step`` and ``step_with_batch_queue`` do."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._depth = 2 if isinstance(scheduler, AsyncScheduler) else 1
        self._in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()

    def step(self) -> Turn:
        """Schedule a step and, with enough of them in flight, take in the oldest one's tokens."""
        began_s = time.thread_time()
        output = self.scheduler.schedule()
        scheduled_s = time.thread_time()
        self._in_flight.append((output, self._execute(output)))
        requests = len(output.num_scheduled_tokens)
        if len(self._in_flight) < self._depth:
            return Turn(scheduled_s - began_s, 0.0, requests)
        oldest, result = self._in_flight.popleft()
        ended_s = time.thread_time()
        self.scheduler.update_from_output(oldest, result)
        return Turn(scheduled_s - began_s, time.thread_time() - ended_s, requests)

    def all_decode(self) -> bool:
        """True if every request that runs has its prompt behind it."""
        return not any(one.is_prefill_chunk for one in self.scheduler.running)

    def _execute(self, output: Any) -> ModelRunnerOutput:
        ids = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=[[] if requests[i].is_prefill_chunk else [_TOKEN] for i in ids],
        )
