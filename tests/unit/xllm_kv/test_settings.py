"""Settings that cannot work are refused in one sentence."""

from __future__ import annotations

import psutil
import pytest

from xllm_kv.config import Eviction, KvSection
from xllm_kv.plugin import _host_bytes, check
from xllm_plugins.errors import ConfigError, NotAvailableError


@pytest.mark.parametrize(
    "url",
    [
        "kv.example:6379",
        "http://kv.example",
        "redis://",
        "redis://kv.example:port",
        "mooncake://",
        "mooncake://kv.example?segment=4",
        "mooncake://kv.example?segment_gib=much",
        "mooncake://kv.example?4",
    ],
)
def test_what_is_no_address_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="is not an address") as error:
        check(KvSection(host_gib=1.0, remote=url))
    assert "kv.example" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://kv",
        "rediss://user:pass@kv.example:6380/2?ssl_ca=x",
        "mooncake://kv",
        "mooncake://kv.example:50052?segment_gib=0.5&protocol=rdma",
    ],
)
def test_addresses_are_accepted(url: str) -> None:
    check(KvSection(host_gib=1.0, remote=url))


@pytest.mark.parametrize("behind", [{"disk": "/kv"}, {"remote": "redis://kv"}])
def test_what_lies_behind_host_memory_needs_it(behind: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"kv.{next(iter(behind))} is set, and kv.host_gib"):
        check(KvSection(**behind))  # type: ignore[arg-type]


def test_shares_of_tenants_need_our_eviction() -> None:
    with pytest.raises(ConfigError, match=r"kv.tenant_share is 0.5 and kv.eviction is lru"):
        check(KvSection(host_gib=1.0, tenant_share=0.5, eviction=Eviction.LRU))


def test_host_memory_is_a_size_or_a_share() -> None:
    check(KvSection(host_share=0.5, disk="/kv"))
    with pytest.raises(ConfigError, match=r"kv.host_gib is 1 and kv.host_share is 0.5; allowed is"):
        check(KvSection(host_gib=1.0, host_share=0.5))


def test_a_share_is_of_what_is_free_in_memory_and_where_it_is_shared() -> None:
    available = psutil.virtual_memory().available
    assert _host_bytes(KvSection(host_share=0.5), 1000) == 500
    assert _host_bytes(KvSection(host_share=0.5), 1 << 60) == pytest.approx(available / 2, rel=0.1)
    assert _host_bytes(KvSection(host_gib=2.0), 1000) == 2 << 30


def test_without_anything_to_do_it_stands_back() -> None:
    with pytest.raises(NotAvailableError):
        check(KvSection())
