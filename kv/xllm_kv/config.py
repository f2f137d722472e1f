"""Settings of the global KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from xllm_plugins.config import Section, option


class Transfer(str, Enum):
    """How KV moves between instances."""

    NONE = "none"
    NIXL = "nixl"


class Admission(str, Enum):
    """What is kept of what has been computed."""

    PREDICTED = "predicted"
    SECOND_USE = "second_use"


class Stop(str, Enum):
    """How long a request waits for a fetch that it has begun."""

    DEADLINE = "deadline"
    WAIT = "wait"
    BEST_EFFORT = "best_effort"


class Eviction(str, Enum):
    """What host memory gives up."""

    REUSE = "reuse"
    LRU = "lru"
    ARC = "arc"


@dataclass(frozen=True)
class KvSection(Section):
    """The ``kv`` section."""

    host_gib: float = option(
        0.0, "host memory that keeps KV which the device gave up, GiB; 0 for none", at_least=0.0
    )
    host_share: float = option(
        0.0,
        "in its place, a share of the memory that is free when the server starts",
        at_least=0.0,
        at_most=0.9,
    )
    disk: str = option("", "a directory for KV that host memory gave up; empty for none")
    disk_gib: float = option(32.0, "how much of that disk, GiB", above=0.0)
    remote: str = option(
        "",
        "a store that instances share: of Redis' kind, redis://[USER:PASSWORD@]HOST:PORT/DB or "
        "rediss:// with TLS, or Mooncake's, mooncake://MASTER:PORT; empty for none",
        secret=True,
    )
    remote_expiry_s: float = option(
        86400.0, "how long KV stays in a store of Redis' kind which nobody asks for, s", above=0.0
    )
    transfer: Transfer = option(
        Transfer.NONE, "how KV moves between instances: nixl, or none where they need not"
    )
    admission: Admission = option(
        Admission.PREDICTED,
        "what is kept: what is predicted to be used before what it would push out, or only what is "
        "used for the second time",
    )
    eviction: Eviction = option(
        Eviction.REUSE, "what host memory gives up: by predicted reuse, or vLLM's own lru or arc"
    )
    tenant_share: float = option(
        1.0,
        "of host memory, above which a tenant (a cache salt, or none) gives up its own first; 1 "
        "for no limit",
        above=0.0,
        at_most=1.0,
    )
    pin_share: float = option(
        0.25,
        "of host memory, which requests may pin with xllm_pin_s if kv.eviction is reuse; 0 for "
        "none",
        at_least=0.0,
        at_most=1.0,
    )
    stop: Stop = option(
        Stop.DEADLINE,
        "how long a request waits for what is fetched for it: twice as long as predicted, until it "
        "is there, or best_effort, not at all: what has come by its turn counts",
    )
    price: bool = option(
        True, "fetch only what is predicted to take less time than computing it; false for always"
    )
