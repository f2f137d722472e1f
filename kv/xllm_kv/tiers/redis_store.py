"""Redis, Valkey, or what speaks their protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from xllm_kv.tiers.remote_store import RemoteStore, StoreError

_CONNECT_S, _ANSWER_S = 1.0, 5.0
_READ_BYTES = 1 << 20


class RedisStore(RemoteStore):
    """``redis://[USER:PASSWORD@]HOST[:PORT][/DB]``, or ``rediss://`` with TLS."""

    def __init__(self, url: str, expiry_s: int) -> None:
        self._expiry_s = expiry_s
        self._client = redis.Redis.from_url(
            url,
            protocol=2,
            socket_connect_timeout=_CONNECT_S,
            socket_timeout=_ANSWER_S,
            socket_read_size=_READ_BYTES,
            retry=Retry(NoBackoff(), 0),
        )

    def held(self, names: Sequence[str]) -> list[bool]:
        """See the class above; in one exchange, where their time begins anew."""
        with _failures(), self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.expire(name, self._expiry_s)
            return [bool(found) for found in pipeline.execute()]

    def put(self, name: str, value: bytes) -> None:
        """See the class above."""
        with _failures():
            self._client.set(name, value, ex=self._expiry_s)

    def get(self, name: str) -> bytes | None:
        """See the class above."""
        with _failures():
            value = self._client.get(name)
        assert value is None or isinstance(value, bytes)
        return value

    def delete(self, name: str) -> None:
        """See the class above."""
        with _failures():
            self._client.delete(name)

    def close(self) -> None:
        """See the class above."""
        self._client.close()


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise ConnectionError(str(error)) from error
    except redis.RedisError as error:
        raise StoreError(str(error)) from error
