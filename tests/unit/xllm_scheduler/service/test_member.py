"""What an instance says of itself."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from xllm_scheduler.service.member import _free_ports, _transfers


def test_ports_for_later_are_none_that_outgoing_connections_take() -> None:
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(20):
        port = _free_ports(4)
        assert port + 4 <= first_outgoing
        for offset in range(4):
            with socket.socket() as probe:
                probe.bind(("", port + offset))


def test_ports_that_are_taken_are_passed_over() -> None:
    port = _free_ports(1)
    with socket.socket() as taken:
        taken.bind(("", port))
        assert all(_free_ports(1) != port for _ in range(50))


@pytest.mark.parametrize(
    ("connector", "role", "children", "transfers"),
    [
        ("NixlConnector", "kv_both", (), True),
        ("NixlConnector", "kv_producer", (), False),
        ("OffloadingConnector", "kv_both", (), False),
        ("MultiConnector", "kv_both", ("NixlConnector", "TiersConnector"), True),
        ("MultiConnector", "kv_both", ("TiersConnector",), False),
    ],
)
def test_an_instance_transfers_where_a_connector_reaches_others(
    connector: str, role: str, children: tuple[str, ...], transfers: bool
) -> None:
    extra = {"connectors": [{"kv_connector": name} for name in children]} if children else {}
    config = SimpleNamespace(kv_connector=connector, kv_role=role, kv_connector_extra_config=extra)
    assert _transfers(config) is transfers
    assert not _transfers(None)
