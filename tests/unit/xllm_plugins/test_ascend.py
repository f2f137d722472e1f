"""What ``xllm doctor`` says where vllm-ascend is installed, over its installed files alone."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.doubles import write_distribution
from xllm_plugins import ascend
from xllm_plugins.compat import vllm_version

pytestmark = pytest.mark.vllm

ENTRY_POINTS = {
    "vllm.platform_plugins": {"ascend": "vllm_ascend:register"},
    "vllm.general_plugins": {"ascend_model": "vllm_ascend:register_model"},
}
Made = Callable[..., None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Installs vllm-ascend for this vLLM, torch-npu and CANN, or only some of them."""
    monkeypatch.setattr(ascend, "_PLACES", ())
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)

    def make(version: str = f"{vllm_version()}rc1", *, npu: bool = True, cann: bool = True) -> None:
        write_distribution(tmp_path, "vllm_ascend", ENTRY_POINTS, {}, version)
        if npu:
            write_distribution(tmp_path, "torch_npu", {}, {}, "2.10.0.post4")
        if cann:
            record = tmp_path / f"{platform.machine()}-linux" / "ascend_toolkit_install.info"
            record.parent.mkdir()
            record.write_text("package_name=Ascend-cann-toolkit\nversion=8.5.1\narch=aarch64\n")
            monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))

    return make


def test_without_vllm_ascend_nothing_is_said() -> None:
    assert (ascend.environment(), ascend.problems()) == ({}, [])


def test_versions_are_told_and_what_fits_is_no_problem(installed: Made) -> None:
    installed()
    assert ascend.environment() == {"torch-npu": "2.10.0.post4", "CANN": "8.5.1"}
    assert ascend.problems() == []


def test_what_is_missing_is_named(installed: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("0.1.0", npu=False, cann=False)
    monkeypatch.setenv("VLLM_PLUGINS", "ascend, xllm")
    assert ascend.environment() == {"torch-npu": None, "CANN": None}
    assert ascend.problems() == [
        f"vllm-ascend 0.1.0 needs vLLM 0.1.0; vLLM {vllm_version()} is installed.",
        "VLLM_PLUGINS is 'ascend, xllm', which keeps vLLM from loading vllm-ascend's "
        "ascend_model; add them or unset it.",
        "torch-npu is not installed, which vllm-ascend 0.1.0 needs.",
        "CANN is not found; its set_env.sh, which sets ASCEND_HOME_PATH, has to be sourced.",
    ]
