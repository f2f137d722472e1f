"""Registers the elastic scheduler, exactly as a third party's plugin would register its feature."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from collections.abc import Mapping
from typing import Any

from xllm_plugins.compat import dry_schedule, kv_events, request_class
from xllm_plugins.compat.scheduler_levers import Lever, effective_levers, possible_levers
from xllm_plugins.config import Mode
from xllm_plugins.errors import NotAvailableError
from xllm_plugins.features import Attachment, Feature, Policy
from xllm_plugins.hookspecs import hookimpl
from xllm_plugins.manager import registry
from xllm_plugins.status import Report
from xllm_scheduler.classes import complete_xargs
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine.books import METRICS
from xllm_scheduler.engine.elastic import ElasticPolicy
from xllm_scheduler.service import command as router
from xllm_scheduler.service import member, staged
from xllm_scheduler.service.aware import KvAware, SloAware
from xllm_scheduler.service.config import ROLES_KIND, ROUTING_KIND
from xllm_scheduler.service.member import Registration, ServiceSection
from xllm_scheduler.service.roles import DynamicRoles
from xllm_scheduler.simulate import command as simulate
from xllm_scheduler.simulate import measure

POLICY_KIND = "scheduler.step"
SCHEDULER = "xllm_scheduler.engine.scheduler.elastic_scheduler"
_LEVERS = frozenset({Lever.HOLD, Lever.BUDGET})  # without which no step can be shaped
logger = logging.getLogger("vllm.xllm_scheduler")


def check(section: SchedulerSection) -> None:
    """Refuse a policy that no installed plugin offers."""
    registry().policy(POLICY_KIND, section.policy)


def attach(attachment: Attachment) -> str:
    """Put the elastic scheduler over the class that vLLM would have used."""
    section = attachment.section
    assert isinstance(section, SchedulerSection)
    config = attachment.vllm_config
    if config.model_config.runner_type == "pooling":
        raise NotAvailableError("pooling models generate no tokens")
    own = attachment.engine_args.scheduler_cls
    if own is not None and section.mode is not Mode.ON:
        name = own if isinstance(own, str) else f"{own.__module__}.{own.__qualname__}"
        raise NotAvailableError(f"--scheduler-cls {name} is kept; scheduler.mode=on wraps it")
    base = config.scheduler_config.get_scheduler_cls()
    _check_levers(base, config)
    request_class.install(lambda said: complete_xargs(said, section))
    front_end = request_class.bypassed_by()
    if front_end and multiprocessing.parent_process() is None:
        logger.warning(
            "%s passes by vLLM's Python serving methods: only vllm_xargs and priority set a "
            "request's class and SLOs there, headers and service_tier do not.",
            front_end,
        )
    config.scheduler_config.scheduler_cls = SCHEDULER
    return f"{base.__module__}.{base.__qualname__}"


def _check_levers(base: type, vllm_config: Any) -> None:
    missing, verb = _LEVERS - possible_levers(base), "read"
    if not missing and _LEVERS - effective_levers(base):
        missing, verb = (
            _LEVERS - dry_schedule.obeyed_levers(base, vllm_config),
            "as configured obey",
        )
    if missing:
        names = ", ".join(sorted(lever.value for lever in missing))
        raise NotAvailableError(f"{base.__qualname__}.schedule() does not {verb} {names}")


FEATURE = Feature(
    name="scheduler",
    summary="Online and offline requests share one engine; online SLOs hold.",
    section=SchedulerSection,
    attach=attach,
    check=check,
    seams=("scheduler_levers", "request_class", "dry_schedule"),
    metrics=METRICS,
)


def report(engine_core: Any) -> Report:
    """What routers may know of an engine."""
    from xllm_scheduler.engine.load import report_of

    return report_of(engine_core)


def tell(engine_core: Any, command: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take a role, or say which KV is held."""
    from xllm_scheduler.engine.load import snapshot_of, take_role

    if "snapshot_of" in command:
        return snapshot_of(engine_core.scheduler, command["snapshot_of"])
    return take_role(engine_core.scheduler, command)


def install() -> None:
    """In every process: follow what a scheduler publishes of its KV, once there is one."""
    kv_events.install(followed)


def followed(scheduler: Any) -> Any:
    """What a scheduler shall publish its KV events by."""
    from xllm_scheduler.engine.load import followed

    return followed(scheduler)


def endpoints(app: Any) -> None:
    """Let routers tell the instance what to do."""
    from xllm_scheduler.service.instance_api import add_endpoints

    add_endpoints(app)


async def serve(engine_client: Any, args: Any, section: ServiceSection) -> None:
    """Register with routers and tell them how busy the instance is."""
    await Registration(engine_client, args, section).run()


SERVICE = Feature(
    name="service",
    summary="Registers this instance with routers and reports its load.",
    section=ServiceSection,
    attach=member.attach,
    check=member.check,
    install=install,
    seams=("engine_status", "kv_events"),
    report=report,
    tell=tell,
    endpoints=endpoints,
    serve=serve,
)


@hookimpl
def xllm_features() -> list[Feature]:
    """The ``scheduler`` and the ``service`` feature."""
    return [FEATURE, SERVICE]


@hookimpl
def xllm_policies() -> list[Policy]:
    """The step policy of the engine, and the router's policies."""
    return [
        Policy(POLICY_KIND, "elastic", ElasticPolicy),
        Policy(ROUTING_KIND, "round_robin", lambda section: staged.round_robin()),
        Policy(ROUTING_KIND, "least_loaded", lambda section: staged.least_loaded()),
        Policy(ROUTING_KIND, "power_of_two", lambda section: staged.power_of_two()),
        Policy(ROUTING_KIND, "session", lambda section: staged.session_affinity()),
        Policy(ROUTING_KIND, "kv_aware", lambda section: KvAware()),
        Policy(ROUTING_KIND, "slo_aware", lambda section: SloAware()),
        Policy(ROLES_KIND, "dynamic", DynamicRoles.of),
    ]


@hookimpl
def xllm_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``xllm router``, ``xllm simulate`` and ``xllm profile``."""
    router.add_command(subparsers)
    simulate.add_command(subparsers)
    measure.add_command(subparsers)
