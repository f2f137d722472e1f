"""xLLM's published rule for co-location, as a step policy to compare with; for benchmarks only.

Bottleneck analysis by a roofline: offline requests are taken in while the batch is below the size
at which matrix products become bound by compute, and run beside online ones while the predicted
time of the batch stays below a share of the TPOT SLO (``pd_ooc_scheduler`` of jd-opensource/xllm at
87e8d6ed, described in arXiv 2510.14686 and 2511.21862). xLLM prefills on other instances than it
decodes on; on one instance, prefill chunks count into the predicted time as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm_scheduler.engine.policy import PrefillView, StepPlan, StepPolicy, StepView

_MOST_BATCH = 10_000
_MIN_CHUNK = 16


@dataclass(frozen=True)
class Device:
    """What a roofline knows of an accelerator.

    Attributes:
        gemm_flops: reached by matrix products, per second.
        attention_flops: reached by attention, per second.
        gemm_bytes: memory bandwidth that matrix products reach, per second.
        attention_bytes: memory bandwidth that attention reaches, per second.
        network_bytes: between the devices of an instance, per second.
    """

    gemm_flops: float
    attention_flops: float
    gemm_bytes: float
    attention_bytes: float
    network_bytes: float


ASCEND_910B = Device(390e12 * 0.68, 390e12 * 0.60, 1600e9 * 0.58, 1600e9 * 0.38, 10e9)
"""As it is written into xLLM."""
H200 = Device(989e12 * 0.68, 989e12 * 0.60, 4800e9 * 0.58, 4800e9 * 0.38, 450e9)
"""NVIDIA's figures with xLLM's shares."""


@dataclass(frozen=True)
class Roofline:
    """How long a batch takes by the slower of compute, memory and network in each operation.

    Attributes:
        device: one of the instance's.
        hidden, intermediate, layers, heads, kv_heads, vocabulary: the model's.
        tensor_parallel: devices of the instance.
        value_bytes: of a weight or activation.
    """

    device: Device
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tensor_parallel: int = 1
    value_bytes: int = 2

    def decode_s(self, lengths: Sequence[int]) -> float:
        """A step in which each request of these lengths generates a token."""
        attended = [(1, length) for length in lengths]
        return self._model_s(len(lengths), attended, sampled=len(lengths))

    def prefill_s(self, tokens: int) -> float:
        """A step in which one prompt is computed."""
        return self._model_s(tokens, [(tokens, tokens)], sampled=1)

    def batch_s(self, tokens: int, sampled: int) -> float:
        """A step of so many tokens, of which so many bring a new one, without attention."""
        return self._model_s(tokens, [], sampled=sampled)

    def attention_s(self, queries: int, keys: int) -> float:
        """The attention of so many tokens to so many, in all layers."""
        return self.layers * self._attention_s(queries, keys)

    @property
    def saturation_batch(self) -> int:
        """The batch size from which every matrix product is bound by compute."""
        ridge = self.device.gemm_flops / self.device.gemm_bytes
        return max(self._smallest(i, o, ridge) for i, o in self._linears())

    def _linears(self) -> list[tuple[int, int]]:
        tp, group = self.tensor_parallel, self.heads / self.kv_heads
        qkv = int((self.hidden + 2 * self.hidden / group) / tp)
        inner = self.intermediate // tp
        return [
            (self.hidden, qkv),
            (self.hidden // tp, self.hidden),
            (self.hidden, inner),
            (self.hidden, inner),
            (inner, self.hidden),
        ]

    def _smallest(self, inputs: int, outputs: int, ridge: float) -> int:
        for batch in range(1, _MOST_BATCH + 1):
            flops = 2 * inputs * outputs * batch
            if flops / self._linear_bytes(inputs, outputs, batch) >= ridge:
                return batch
        return _MOST_BATCH

    def _linear_bytes(self, inputs: int, outputs: int, batch: int) -> float:
        return self.value_bytes * (batch * inputs + inputs * outputs + batch * outputs)

    def _linear_s(self, inputs: int, outputs: int, batch: int) -> float:
        return max(
            2 * inputs * outputs * batch / self.device.gemm_flops,
            self._linear_bytes(inputs, outputs, batch) / self.device.gemm_bytes,
        )

    def _attention_s(self, queries: int, keys: int) -> float:
        hidden = self.hidden / self.tensor_parallel
        group = self.heads / self.kv_heads
        flops = 2 * hidden * 2 * queries * keys
        read = (2 * queries + 2 * keys / group) * hidden * self.value_bytes
        return max(flops / self.device.attention_flops, read / self.device.attention_bytes)

    def _reduce_s(self, values: int) -> float:
        share = (self.tensor_parallel - 1) / self.tensor_parallel
        return self.value_bytes * values * share / self.device.network_bytes

    def _model_s(self, batch: int, attended: Sequence[tuple[int, int]], *, sampled: int) -> float:
        layer = sum(self._linear_s(i, o, batch) for i, o in self._linears())
        layer += sum(self._attention_s(queries, keys) for queries, keys in attended)
        layer += 2 * self._reduce_s(batch * self.hidden)
        head = self._linear_s(self.hidden, self.vocabulary // self.tensor_parallel, sampled)
        return self.layers * layer + head


@dataclass(frozen=True)
class Thresholds:
    """What is searched over.

    Attributes:
        latency: the share of the TPOT SLO that a batch with offline work may take, as predicted.
        saturation: the batch up to which offline requests are taken in, in saturation batches.
    """

    latency: float = 0.98
    saturation: float = 1.0


class BottleneckPolicy(StepPolicy):
    """See the module. It has no deadlines: each step is held to the same time.

    Args:
        roofline: of the instance.
        tpot_ms: the SLO.
        thresholds: see there.
    """

    def __init__(self, roofline: Roofline, tpot_ms: float, thresholds: Thresholds) -> None:
        self._roofline = roofline
        self._limit_s = thresholds.latency * tpot_ms / 1e3
        self._most = thresholds.saturation * roofline.saturation_batch
        self._batch_s: dict[tuple[int, int], float] = {}

    def plan(self, view: StepView) -> StepPlan:
        """Decide one step."""
        prefills = [*view.prefills, *view.waiting]
        online = [r for r in prefills if r.online]
        busy = bool(view.online.due_s or online)
        decodes, context = len(view.online.due_s), view.online.shape.decode_context
        chunks: dict[str, int] = {}
        held: set[str] = set()
        prefill_tokens = min(view.max_tokens, sum(r.new_tokens for r in online))
        for name, length in zip(view.offline.ids, view.offline.context_tokens, strict=True):
            late = self._step_s(decodes + 1, context + length, prefill_tokens) > self._limit_s
            if busy and (held or late):
                held.add(name)
                continue
            decodes += 1
            context += length
        left = view.max_tokens - decodes - prefill_tokens
        for request in (r for r in view.prefills if not r.online):
            tokens = self._fitting(request, busy, decodes, context, prefill_tokens, left)
            chunks[request.request_id] = tokens
            prefill_tokens += tokens
            left -= tokens
        running = decodes + len(held) + len(view.prefills)
        first = next((r for r in view.waiting if not r.online), None)
        admit = False
        if first is not None and not held and running < self._most:
            tokens = self._fitting(first, busy, decodes, context, prefill_tokens, left)
            admit = tokens > 0
            if admit:
                chunks[first.request_id] = tokens
                prefill_tokens += tokens
        used = decodes + prefill_tokens
        idle = not used and not busy
        return StepPlan(
            max_tokens=view.max_tokens if idle or not busy else max(1, used),
            held=frozenset(held),
            chunk_tokens={name: n for name, n in chunks.items() if not idle},
            admit_offline=admit or idle,
        )

    def _fitting(
        self,
        request: PrefillView,
        busy: bool,
        decodes: int,
        context: int,
        prefill_tokens: int,
        left: int,
    ) -> int:
        """The largest chunk that keeps the step within its limit; 0 if none is worth it."""
        most = min(request.new_tokens, left)
        if not busy:
            return max(0, most)
        low, high = 0, max(0, most)
        while low < high:
            middle = (low + high + 1) // 2
            if self._step_s(decodes, context, prefill_tokens + middle) <= self._limit_s:
                low = middle
            else:
                high = middle - 1
        return low if low >= min(_MIN_CHUNK, request.new_tokens) else 0

    def _step_s(self, decodes: int, context: int, prefill_tokens: int) -> float:
        tokens, sampled = decodes + prefill_tokens, max(1, decodes)
        if (tokens, sampled) not in self._batch_s:
            seconds = self._roofline.batch_s(tokens, sampled) if tokens else 0.0
            self._batch_s[tokens, sampled] = seconds
        attention_s = self._roofline.attention_s(decodes, 0) if decodes else 0.0
        # A decode's attention is bound by memory, so what counts is how much is read in all.
        attention_s += self._roofline.attention_s(0, context)
        if prefill_tokens:
            attention_s += self._roofline.attention_s(prefill_tokens, prefill_tokens)
        return self._batch_s[tokens, sampled] + attention_s
