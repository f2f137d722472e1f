"""Settings of the router."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_plugins.config import Group, option
from xllm_plugins.manager import registry
from xllm_scheduler.service.routing import RolePolicy, RoutingPolicy

ROUTING_KIND, ROLES_KIND = "service.routing", "service.roles"


@dataclass(frozen=True)
class RouterSection(Group):
    """The ``router`` section."""

    routing: str = option("slo_aware", "the routing policy, by the name a plugin offers it under")
    roles: str = option("", "the policy that changes roles, likewise; empty for fixed roles")
    ttft_ms: float = option(
        2000.0, "what roles are judged by: the usual SLO for the time to first token, ms", above=0.0
    )
    tpot_ms: float = option(100.0, "likewise, for the mean time per output token, ms", above=0.0)
    role_margin: float = option(
        0.1,
        "by how much of it the pressure has to fall for a change of roles",
        at_least=0.0,
        at_most=1.0,
    )
    role_patience: int = option(2, "how many looks in a row have to agree to one", at_least=1)
    role_cool_down_s: float = option(10.0, "time between two changes of roles, s", at_least=0.0)
    roles_every_s: float = option(1.0, "how often roles are looked at, s", above=0.0)
    instances: str = option("", "addresses of instances, separated by commas")
    etcd: str = option("", "etcd's address, for several routers; empty for this one alone")
    etcd_prefix: str = option("/xllm", "what all keys in etcd begin with")
    address: str = option(
        "", "where instances reach this router, told to them through etcd; empty for host and port"
    )
    instance_key: str = option(
        "", "the API key that instances want; clients' own is then not passed on", secret=True
    )
    api_keys: str = option(
        "", "keys that clients may use, separated by commas; empty for no check", secret=True
    )
    admin_token: str = option(
        "", "what the admin paths want; empty closes them but for the status", secret=True
    )
    most_requests: int = option(
        10000, "requests under way, beyond which others get 429", at_least=1
    )
    most_body_bytes: int = option(16 << 20, "the longest body of a request", at_least=1)
    most_file_bytes: int = option(200 << 20, "the longest file of a batch", at_least=1)
    queue_s: float = option(60.0, "how long a request waits for an instance, s", at_least=0.0)
    prefill_timeout_s: float = option(
        120.0, "how long an instance may take that only computes a prompt, s", above=0.0
    )
    retries: int = option(3, "how often a request is sent again at most", at_least=0)
    probe_s: float = option(1.0, "how often instances are probed that do not report, s", above=0.0)
    suspect_s: float = option(15.0, "how long one that does not answer is remembered, s", above=0.0)
    data: str = option("", "the folder of files and batches; empty for no Batch API")
    offline_requests: int = option(
        16, "offline requests that wait at an instance at most; others wait here", at_least=1
    )
    tokenizers: str = option(
        "auto",
        "where prompts are tokenised for routing by KV: auto for the model's files if they are "
        "here, else the instances; off for no tokens, by text alone",
    )


def routing_of(section: RouterSection) -> RoutingPolicy:
    """The routing policy that settings name.

    Raises:
        ConfigError: no plugin offers it.
    """
    made: RoutingPolicy = registry().policy(ROUTING_KIND, section.routing).factory(section)
    return made


def roles_of(section: RouterSection) -> RolePolicy | None:
    """The policy that changes roles; None for fixed ones.

    Raises:
        ConfigError: no plugin offers it.
    """
    if not section.roles:
        return None
    made: RolePolicy = registry().policy(ROLES_KIND, section.roles).factory(section)
    return made
