"""Registers the expert load balancer, exactly as a third party's plugin would register its own."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

from xllm_eplb import command
from xllm_eplb.ascend import replan
from xllm_eplb.balancer import Balancer
from xllm_eplb.books import METRICS, report_of
from xllm_eplb.config import EplbSection
from xllm_eplb.phases import Prefill, is_prefill
from xllm_eplb.trace import Machine
from xllm_plugins.compat import ascend_eplb, eplb_cpu, eplb_phase, eplb_policy, inspect_seam
from xllm_plugins.config import Mode
from xllm_plugins.errors import NotAvailableError
from xllm_plugins.features import Attachment, Feature
from xllm_plugins.hookspecs import hookimpl
from xllm_plugins.status import Report, now_and_then

_balancer: Balancer | None = None  # of this worker process
_STAGED = 3  # vllm-ascend's policy that is handed loads by stages


def prepare(engine_args: Any, section: EplbSection) -> Mapping[str, Any]:
    """Let vLLM configure EPLB on a CPU where that is asked for."""
    if not (section.on_cpu and engine_args.enable_eplb):
        return {}
    found = inspect_seam("eplb_cpu")
    if not found.holds:
        raise NotAvailableError(f"eplb.on_cpu: seam eplb_cpu does not hold: {found.reason}")
    return {"eplb_config": eplb_cpu.allow(engine_args.eplb_config)} if eplb_cpu.is_cpu() else {}


def attach(attachment: Attachment) -> str:
    """Take part where vLLM's EPLB is on; workers replace its policy when they load the model."""
    if ascend_eplb.settings() is not None:
        return _attach_to_ascend(attachment)
    parallel = attachment.vllm_config.parallel_config
    if not parallel.enable_eplb:
        raise NotAvailableError("--enable-eplb is not given")
    policy = parallel.eplb_config.policy
    if policy != "default":
        raise NotAvailableError(f"--eplb-config.policy {policy} is kept")
    return "vllm.distributed.eplb.EplbState"


def _attach_to_ascend(attachment: Attachment) -> str:
    settings: Any = ascend_eplb.settings()
    if not settings.eplb_config.dynamic_eplb:
        raise NotAvailableError("eplb_config.dynamic_eplb in --additional-config is not true")
    found = inspect_seam("ascend_eplb")
    if not found.holds:
        raise NotAvailableError(f"seam ascend_eplb does not hold: {found.reason}")
    if settings.mix_placement:
        raise NotAvailableError("with mix_placement shared experts would be moved as well")
    policy = settings.eplb_config.eplb_policy_type
    if policy == _STAGED:
        raise NotAvailableError(f"eplb_policy_type {policy} is kept; it counts loads by stages")
    given = attachment.vllm_config.additional_config["eplb_config"]
    if "eplb_policy_type" in given and attachment.section.mode is not Mode.ON:
        raise NotAvailableError(f"eplb_policy_type {policy} is kept; eplb.mode=on takes its place")
    return "vllm_ascend.eplb.core.policy.policy_factory.PolicyFactory"


def install() -> None:
    """In every process: replace the policy of an EPLB once it takes a model."""
    eplb_policy.install(planner, stalled, begins)
    ascend_eplb.install(ascend_planner)
    eplb_cpu.install(on_cpu)


def on_cpu(vllm_config: Any) -> bool:
    """Whether this worker shall do on a CPU what vLLM does on GPUs only."""
    section = _section(vllm_config)
    return section is not None and section.on_cpu and eplb_cpu.is_cpu()


def stalled(seconds: float) -> None:
    """Count a rearrangement of this process."""
    if _balancer is not None:
        _balancer.stalled(seconds)


def begins(state: Any) -> None:
    """A plan begins on every rank, from this state's window if there is one."""
    if _balancer is not None:
        found = [] if state is None else eplb_phase.prefill_loads(state)
        _balancer.counted([one and Prefill(*one) for one in found])


def planner(vllm_config: Any, experts: eplb_policy.Experts) -> eplb_policy.Rebalance | None:
    """The planner of this process; None where the feature is not attached."""
    global _balancer
    section = _section(vllm_config)
    if section is None:
        return None
    config = vllm_config.parallel_config.eplb_config
    steps = min(config.window_size, config.step_interval)
    if _balancer is None:  # a draft model's experts are planned beside the model's
        machine = _machine(section, experts, steps, config.use_async)
        speaks = _is_first(vllm_config)
        eplb_phase.install(is_prefill)
        _balancer = Balancer(section.rules(), machine, section.phase, speaks=speaks)
    return _balancer.rebalance


def ascend_planner(vllm_config: Any) -> ascend_eplb.Replan | None:
    """The same for vllm-ascend, which plans in a child of each worker process."""
    section = _section(vllm_config)
    if section is None:
        return None
    settings: Any = ascend_eplb.settings()
    experts = ascend_eplb.experts_of(vllm_config)
    machine = _machine(section, experts, settings.eplb_config.expert_heat_collection_interval, True)
    balancer = Balancer(section.rules(), machine, speaks=_is_first(vllm_config))
    return functools.partial(replan, balancer)


def _machine(
    section: EplbSection, experts: eplb_policy.Experts, steps: int, asynchronous: bool
) -> Machine:
    return Machine(
        steps=steps,
        expert_bytes=experts.bytes,
        expert_weights=experts.weights,
        flops=section.device_tflops * 1e12,
        memory_bytes=section.memory_gb_s * 1e9,
        link_bytes=section.link_gb_s * 1e9,
        exposed=section.async_exposed if asynchronous else 1.0,
    )


def _is_first(vllm_config: Any) -> bool:
    parallel = vllm_config.parallel_config
    return bool(parallel.rank == 0 and parallel.data_parallel_rank == 0)


def _section(vllm_config: Any) -> EplbSection | None:
    """The settings with which the feature is attached; None where it is not."""
    from xllm_plugins.activation import active_features, section_of

    if FEATURE.name not in [feature.name for feature in active_features(vllm_config)]:
        return None
    section = section_of(FEATURE, vllm_config)
    assert isinstance(section, EplbSection)
    return section


def worker_books(worker: Any) -> dict[str, Any] | None:
    """Called in a worker process: what it has decided."""
    return None if _balancer is None else _balancer.books()


@now_and_then
def report(engine_core: Any) -> Report:
    """What the workers have decided."""
    books = eplb_policy.ask_worker(engine_core, worker_books)
    return Report() if books is None else report_of(books)


def worker_windows(after: int, worker: Any) -> list[dict[str, Any]]:
    """Called in a worker process: the loads that it planned from after plan number ``after``."""
    return [] if _balancer is None else _balancer.windows(after)


def worker_loads(worker: Any) -> dict[str, Any]:
    """Called in a worker process: what it has decided, and the load of each device."""
    return {} if _balancer is None else _balancer.loads()


def tell(engine_core: Any, command: Mapping[str, Any]) -> Mapping[str, Any]:
    """The last windows of loads, of plans after ``after``; without it the loads of devices."""
    if "after" not in command:
        loads: Mapping[str, Any] = eplb_policy.ask_worker(engine_core, worker_loads)
        return loads
    ask = functools.partial(worker_windows, int(command["after"]))
    return {"windows": eplb_policy.ask_worker(engine_core, ask)}


def endpoints(app: Any) -> None:
    """Let ``xllm eplb record`` and routers read the loads."""
    from xllm_eplb.api import add_endpoints

    add_endpoints(app)


FEATURE = Feature(
    name="eplb",
    summary="Experts of a mixture move where it pays: balanced devices at few moves.",
    section=EplbSection,
    prepare=prepare,
    attach=attach,
    install=install,
    seams=("eplb_policy", "eplb_phase"),
    metrics=METRICS,
    report=report,
    tell=tell,
    endpoints=endpoints,
)


@hookimpl
def xllm_features() -> list[Feature]:
    """The ``eplb`` feature."""
    return [FEATURE]


@hookimpl
def xllm_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``xllm eplb``."""
    command.add_command(subparsers)
