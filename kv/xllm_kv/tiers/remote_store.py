"""What a tier asks of a store that instances share, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from urllib.parse import urlsplit


class StoreError(Exception):
    """A store was reached and did not do its work; one that is away raises OSError."""


class RemoteStore(ABC):
    """Values by name. Several threads call its methods, which raise StoreError or OSError."""

    @abstractmethod
    def held(self, names: Sequence[str]) -> list[bool]:
        """Which of these it has; those that it has stay for a while."""

    @abstractmethod
    def put(self, name: str, value: bytes) -> None:
        """Keep a value, at once or not at all."""

    @abstractmethod
    def get(self, name: str) -> bytes | None:
        """A value; None for none."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Keep it no longer."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""


def open_store(url: str, expiry_s: int) -> RemoteStore:
    """The store at an address; it need not be there yet.

    Args:
        url: ``redis://``, ``rediss://`` or ``mooncake://`` with what each of them takes.
        expiry_s: how long a value stays that nobody asks for, where the store can tell.
    """
    if urlsplit(url).scheme == "mooncake":
        from xllm_kv.tiers.mooncake_store import MooncakeStore

        return MooncakeStore(url)
    from xllm_kv.tiers.redis_store import RedisStore

    return RedisStore(url, expiry_s)
