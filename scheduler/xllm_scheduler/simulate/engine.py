"""One instance's engine as vLLM would configure it on the GPUs that are asked for."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xllm_plugins.activation import REPORT_KEY, SETTINGS_KEY
from xllm_plugins.compat import inspect_seam, target_platform
from xllm_plugins.config import parse_section, section_values
from xllm_plugins.errors import ConfigError, NotAvailableError
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.simulate.clock import VirtualClock
from xllm_scheduler.simulate.hardware import CPU, GPUS, named

_GIB = 1 << 30
_BESIDE_GIB = 3.0  # activations, CUDA graphs and NCCL beside the weights, on each GPU
_SHIPPED = files("xllm_scheduler.simulate").joinpath("data/models")
FCFS, PRIORITY, ELASTIC = "vllm-fcfs", "vllm-priority", "elastic"


@dataclass(frozen=True)
class EngineSpec:
    """What an instance is.

    Attributes:
        model: a directory with a ``config.json``, the name of a shipped one, or a hub's name.
        gpu: a name of :data:`~xllm_scheduler.simulate.hardware.GPUS`.
        tensor_parallel: how many of them.
        scheduler: ``vllm-fcfs``, ``vllm-priority``, ``elastic``, or a scheduler class by its name.
        settings: of the section ``scheduler``, for ``elastic``.
        vllm: further arguments of vLLM's, by the names of ``EngineArgs``.
        kv_gib: the KV cache's size on each GPU; None for what weights and activations leave.
        kv_events: whether instances tell which KV they hold.
    """

    model: str
    gpu: str = "h200"
    tensor_parallel: int = 1
    scheduler: str = FCFS
    settings: Mapping[str, Any] = field(default_factory=dict)
    vllm: Mapping[str, Any] = field(default_factory=dict)
    kv_gib: float | None = None
    kv_events: bool = False


class Engine:
    """vLLM's configuration for a spec; makes any number of schedulers.

    Attributes:
        vllm_config: as on the target.
        kv_cache_config: as on the target.
        block_tokens: tokens of a KV block.
        kv_token_bytes: what one token's KV takes on all GPUs together.
        kv_tokens: what the KV cache holds.
        step_tokens: most tokens of one step.
        depth: how many steps may be in flight.
        forward_blocks: whether the worker begins transfers only when a step has been computed: a
            CPU computes in the thread that launches.
        max_model_len: the longest request, in tokens.
    """

    def __init__(self, spec: EngineSpec) -> None:
        found = inspect_seam("target_platform")
        if not found.holds:
            raise NotAvailableError(f"seam target_platform does not hold: {found.reason}.")
        self.spec = spec
        self.forward_blocks = spec.gpu == CPU
        gpu = named(GPUS, spec.gpu, "gpu")
        if spec.gpu == CPU:
            platform: AbstractContextManager[None] = nullcontext()
            if spec.kv_gib is None:
                raise ConfigError("kv_gib is missing; on cpu it is what the server is given.")
        else:
            platform = target_platform.target_platform(gpu.name, gpu.memory_bytes, gpu.capability)
        with _model_directory(spec.model) as directory, platform:
            self.vllm_config = config = _vllm_config(spec, directory)
            cache = config.cache_config
            on_gpu = spec.gpu != CPU
            if on_gpu and config.model_config.use_mla and not cache.user_specified_block_size:
                cache.block_size = gpu.mla_block_tokens
            kv_bytes = spec.kv_gib and int(spec.kv_gib * _GIB)
            if not kv_bytes:
                usable = gpu.memory_bytes * cache.gpu_memory_utilization - _BESIDE_GIB * _GIB
                kv_bytes = int(usable - weight_bytes(config) / spec.tensor_parallel)
            if kv_bytes <= 0:
                raise ConfigError(
                    f"{spec.model} does not fit on {spec.tensor_parallel} x {spec.gpu}; "
                    "more --tp or a GPU with more memory is needed."
                )
            self.kv_cache_config = target_platform.kv_cache_config(config, kv_bytes)
            self._blocks = target_platform.block_sizes(config, self.kv_cache_config)
        self.block_tokens = self._blocks[0]
        self.max_model_len: int = config.model_config.max_model_len
        pipeline = config.parallel_config.pipeline_parallel_size
        self.depth: int = max(pipeline, 2 if config.scheduler_config.async_scheduling else 1)
        # KV that lies on several GPUs is sent by all of them; MLA's lies on each as a whole.
        shards = 1 if config.model_config.use_mla else spec.tensor_parallel
        tokens = (self.kv_cache_config.num_blocks - 1) * self.block_tokens
        self.kv_token_bytes = kv_bytes * shards / tokens
        self.kv_tokens: int = tokens
        self.step_tokens: int = config.scheduler_config.max_num_batched_tokens
        self._class = self._scheduler_class()

    def scheduler(self, clock: VirtualClock, publisher: Any = None) -> Any:
        """A new scheduler of this engine, empty.

        Args:
            clock: what it takes for the time.
            publisher: is told of KV events, as vLLM's publishers are; None for no events.
        """
        from vllm.v1.structured_output import StructuredOutputManager

        scheduler, hashes = self._blocks
        cls = type(self._class.__name__, (self._class,), {"wall_clock": clock})
        made = cls(
            vllm_config=self.vllm_config,
            kv_cache_config=self.kv_cache_config,
            structured_output_manager=StructuredOutputManager(self.vllm_config),
            block_size=scheduler,
            hash_block_size=hashes,
        )
        if publisher is not None:
            made.kv_event_publisher = publisher
        return made

    @functools.cached_property
    def block_hasher(self) -> Any:
        """VLLM's own: what makes equal prefixes share KV."""
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        function = get_hash_fn_by_name(self.vllm_config.cache_config.prefix_caching_hash_algo)
        init_none_hash(function)
        return get_request_block_hasher(self._blocks[1], function)

    def _scheduler_class(self) -> type:
        from vllm.utils.import_utils import resolve_obj_by_qualname

        config = self.vllm_config.scheduler_config
        base: type = config.get_scheduler_cls()
        if self.spec.scheduler in (FCFS, PRIORITY):
            return base
        if self.spec.scheduler != ELASTIC:
            try:
                found: type = resolve_obj_by_qualname(self.spec.scheduler)
            except (ImportError, AttributeError, ValueError) as error:
                raise ConfigError(
                    f"scheduler is {self.spec.scheduler!r}; allowed are {FCFS}, {PRIORITY}, "
                    f"{ELASTIC} and the full name of a class: {error}"
                ) from error
            return found
        from xllm_scheduler.engine.scheduler import elastic_class

        section = parse_section(SchedulerSection, "scheduler", {**self.spec.settings})
        values = {**section_values(section), "profile_dir": ""}
        self.vllm_config.additional_config = {
            SETTINGS_KEY: {"scheduler": values},
            REPORT_KEY: {"features": []},
        }
        return elastic_class(base)


def weight_bytes(vllm_config: Any) -> int:
    """What a model's weights take, counted on a model without any memory."""
    import torch
    from transformers import AutoModelForCausalLM

    config = vllm_config.model_config.hf_config
    bits = _weight_bits(getattr(config, "quantization_config", None))
    if hasattr(config, "quantization_config"):
        config = type(config).from_dict(
            {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    size = vllm_config.model_config.dtype.itemsize * 8 if bits is None else bits
    return int(sum(p.numel() for p in model.parameters()) * size // 8)


def _weight_bits(quantization: Any) -> int | None:
    if not quantization:
        return None
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return int(quantization.get("bits", 8))


def _vllm_config(spec: EngineSpec, directory: str) -> Any:
    from vllm.config import KVEventsConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    extra = dict(spec.vllm)
    if spec.kv_events:  # "null", since each scheduler is given a publisher of ours
        extra["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    if spec.scheduler == PRIORITY:
        extra["scheduling_policy"] = "priority"
    try:
        arguments = EngineArgs(
            model=directory,
            tensor_parallel_size=spec.tensor_parallel,
            skip_tokenizer_init=True,
            enforce_eager=True,  # there is no graph to capture
            load_format="dummy",
            kv_transfer_config={
                "kv_connector": "SimulatedTransfer",
                "kv_connector_module_path": "xllm_scheduler.simulate.connector",
                "kv_role": "kv_both",
            },
            **extra,
        )
        return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"vLLM does not take this engine: {message}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM does not take this engine: {error}") from error


class _model_directory:  # noqa: N801 - used as a context manager
    """A directory with a model's ``config.json``: the user's, a shipped one's copy, or a hub's."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._made = ""

    def __enter__(self) -> str:
        path = Path(self._model)
        if path.is_file() and path.name == "config.json":
            return str(path.parent)
        if path.is_dir():
            return str(path)
        name = self._model.rsplit("/", 1)[-1]
        shipped = {p.name.removesuffix(".json").lower(): p for p in _SHIPPED.iterdir()}
        if name.lower() not in shipped:
            return self._model  # vLLM asks the hub
        self._made = tempfile.mkdtemp(prefix="xllm-model-")
        text = shipped[name.lower()].read_text("utf-8")
        (Path(self._made) / "config.json").write_text(json.dumps(json.loads(text)))
        return self._made

    def __exit__(self, *_: object) -> None:
        if self._made:
            shutil.rmtree(self._made)
