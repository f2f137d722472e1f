"""KV transfers take latency and bandwidth, and share links."""

from __future__ import annotations

import pytest

from xllm_plugins.errors import ConfigError
from xllm_scheduler.simulate.hardware import GPUS, LINKS, Link, named
from xllm_scheduler.simulate.network import Network

LINK = Link(bytes_s=1e9, latency_ms=2.0)


def test_a_transfer_takes_its_bytes_over_the_bandwidth_and_the_latency() -> None:
    network = Network(LINK)
    assert network.transfer("a", "b", 500_000_000, 10.0) == pytest.approx(10.502)
    assert network.bytes_moved == 500_000_000


@pytest.mark.parametrize(
    ("sender", "receiver", "end_s"),
    [("a", "c", 2.002), ("c", "b", 2.002), ("b", "a", 1.002), ("c", "d", 1.002)],
)
def test_a_second_transfer_waits_for_the_sides_that_it_needs(
    sender: str, receiver: str, end_s: float
) -> None:
    network = Network(LINK)
    network.transfer("a", "b", 1_000_000_000, 0.0)
    assert network.transfer(sender, receiver, 1_000_000_000, 0.0) == pytest.approx(end_s)


def test_a_lost_instance_leaves_no_queue_behind() -> None:
    network = Network(LINK)
    network.transfer("a", "b", 1_000_000_000, 0.0)
    network.forget("a")
    assert network.transfer("a", "c", 1_000_000_000, 0.0) == pytest.approx(1.002)


def test_links_and_gpus_have_names() -> None:
    speeds = [LINKS[name].bytes_s for name in ("nvlink", "rdma-400g", "ethernet-25g", "tcp")]
    assert speeds == sorted(speeds, reverse=True)
    with pytest.raises(ConfigError, match="gpu is 'h300'; allowed are a100, b200, cpu, h100, h200"):
        named(GPUS, "h300", "gpu")
