"""Which instances there are and whether they are well; pure, the clock is passed in.

An instance is *ready* while its lease or its heartbeats last. Without a lease it is *unleased*: it
still serves, while it is probed. One that does not answer either is *suspect* and gets nothing new;
if that lasts, it is gone. An instance that comes again under a new incarnation is another one.
Source: the states and their order are those of xLLM's service (arXiv 2510.14686); there, requests
of an instance that is gone fail, here they are sent on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from xllm_plugins.errors import ConfigError
from xllm_scheduler.service.routing import Role


class Health(str, Enum):
    """How an instance is."""

    READY = "ready"
    UNLEASED = "unleased"
    SUSPECT = "suspect"


@dataclass(frozen=True)
class Record:
    """What an instance says about itself when it joins.

    Attributes:
        name: unique; its address unless it was given another one.
        url: where it serves OpenAI's API.
        models: the names under which it serves; the first is what its KV events are of, others
            are names for the same and LoRA adapters.
        role: what it begins as.
        incarnation: another one for each start.
        tokenizer: where its tokenizer is, a folder or a name; empty for the first model's name.
        dp_size: its data-parallel ranks, which requests may choose from.
        max_model_len: longest request, in tokens; 0 if not known.
        block_tokens: tokens of a KV block; 0 if it tells nothing of its KV.
        full_groups: KV cache groups with full attention.
        kv_events: ZMQ addresses of its KV events, one for each rank.
        kv_replay: likewise, of the replay sockets.
        kv_tokens: what its KV cache holds.
        step_tokens: most tokens of one step.
        step_time: coefficients of its step times, by name; empty if not known.
        pace_ms: the longest step while online requests generate; 0 if it keeps none.
        transfers: whether it sends and fetches KV, as far as is known.
        transfer_ms: what fetching takes beside the tokens; a guess until it was seen.
        transfer_token_ms: and for each token; likewise.
        loras: which of its models are adapters.
    """

    name: str
    url: str
    models: Sequence[str] = ()
    role: Role = Role.MIXED
    incarnation: str = ""
    tokenizer: str = ""
    dp_size: int = 1
    max_model_len: int = 0
    block_tokens: int = 0
    full_groups: Sequence[int] = (0,)
    kv_events: Sequence[str] = ()
    kv_replay: Sequence[str] = ()
    kv_tokens: int = 0
    step_tokens: int = 8192
    step_time: Mapping[str, float] = field(default_factory=dict)
    pace_ms: float = 0.0
    transfers: bool = True
    transfer_ms: float = 20.0
    transfer_token_ms: float = 0.01
    loras: Sequence[str] = ()

    def document(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "role": self.role.value}

    @classmethod
    def parsed(cls, document: Any) -> Record:
        """From plain JSON types; fields that are not known are from a newer version and ignored.

        Raises:
            ConfigError: a needed field is missing, or one has a wrong type.
        """
        if not isinstance(document, dict):
            raise ConfigError(f"An instance is {document!r}; allowed is an object.")
        known = {name: document[name] for name in cls.__dataclass_fields__ if name in document}
        for name in ("name", "url"):
            if not isinstance(known.get(name), str) or not known[name]:
                raise ConfigError(f"An instance has {name} {known.get(name)!r}; allowed is a text.")
        if not known["url"].startswith(("http://", "https://")):
            raise ConfigError(
                f"An instance has url {known['url']!r}; allowed is http://... or https://..."
            )
        role = known.get("role", Role.MIXED)
        if role not in [r.value for r in Role]:
            raise ConfigError(
                f"An instance has role {role!r}; allowed are {', '.join(r.value for r in Role)}."
            )
        models = known.get("models")
        named = isinstance(models, (list, tuple)) and all(type(one) is str for one in models)
        if not models or not named:
            raise ConfigError(f"An instance has models {models!r}; allowed are one name or more.")
        known["role"] = Role(role)
        return cls(**known)


@dataclass
class Member:
    """An instance as it is now.

    Attributes:
        record: what it said.
        role: what it does now.
        health: how it is.
        draining: whether it shall get nothing new.
        turning: whether it is just being given another role.
        leased: whether its lease is there, as far as it is known to have one.
        since_s: since when its health is as it is.
        heard_s: when it was last heard of.
    """

    record: Record
    role: Role
    health: Health
    draining: bool
    since_s: float
    heard_s: float
    leased: bool = True
    turning: bool = False

    @property
    def accepts(self) -> bool:
        """Whether it may be given requests."""
        return not (self.draining or self.turning) and self.health is not Health.SUSPECT


@dataclass(frozen=True)
class Patience:
    """How long is waited, in seconds.

    Attributes:
        silent_s: without lease, until one that is silent is suspect.
        suspect_s: until one that is suspect is gone.
    """

    silent_s: float = 3.0
    suspect_s: float = 15.0


class Registry:
    """All members.

    Args:
        patience: how long is waited.
    """

    def __init__(self, patience: Patience = Patience()) -> None:
        self._patience = patience
        self.members: dict[str, Member] = {}

    def joined(self, record: Record, now_s: float) -> str:
        """An instance is there, or its lease is back.

        Returns:
            The name of the member that it replaces, if it is another incarnation; else "".
        """
        there = self.members.get(record.name)
        if there is not None and there.record.incarnation == record.incarnation:
            there.record, there.leased = record, True
            self._is(there, Health.READY, now_s)
            there.heard_s = now_s
            return ""
        self.members[record.name] = Member(record, record.role, Health.READY, False, now_s, now_s)
        return record.name if there is not None else ""

    def heard(self, name: str, incarnation: str, now_s: float) -> bool:
        """A heartbeat has come, or a probe was answered.

        Returns:
            Whether it is of a member; one of another incarnation is not.
        """
        member = self.members.get(name)
        if member is None or member.record.incarnation != incarnation:
            return False
        member.heard_s = now_s
        if member.health is Health.SUSPECT:
            self._is(member, Health.READY if member.leased else Health.UNLEASED, now_s)
        return True

    def lease_lost(self, name: str, incarnation: str, now_s: float) -> bool:
        """The store has dropped a member.

        Returns:
            Whether it has to be probed now.
        """
        member = self.members.get(name)
        if member is None or member.record.incarnation != incarnation:
            return False  # of an earlier incarnation
        member.leased = False
        if member.health is Health.READY:
            self._is(member, Health.UNLEASED, now_s)
        return True

    def failed(self, name: str, now_s: float) -> None:
        """A probe was not answered, or a connection broke."""
        member = self.members.get(name)
        if member is not None and member.health is not Health.SUSPECT:
            self._is(member, Health.SUSPECT, now_s)

    def left(self, name: str) -> None:
        """A member has been taken away."""
        self.members.pop(name, None)

    def tick(self, now_s: float) -> list[str]:
        """Let time pass; the names of those that are gone now."""
        gone = []
        for name, member in self.members.items():
            silent_s, lasts_s = now_s - member.heard_s, now_s - member.since_s
            if member.health is Health.UNLEASED and silent_s > self._patience.silent_s:
                self._is(member, Health.SUSPECT, now_s)
            elif member.health is Health.SUSPECT and lasts_s > self._patience.suspect_s:
                gone.append(name)
        for name in gone:
            del self.members[name]
        return gone

    def _is(self, member: Member, health: Health, now_s: float) -> None:
        if member.health is not health:
            member.health, member.since_s = health, now_s
