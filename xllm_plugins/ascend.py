"""What of Ascend's software is here, and what of it cannot work together; for ``xllm doctor``."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from xllm_plugins.compat import distribution_version, vllm_version
from xllm_plugins.names import ENV_ALLOW_LIST

_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")  # as CANN's set_env.sh sets them
_PLACES = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")
_VERSION = re.compile(r"^version=(.+)$", re.M)


def environment() -> dict[str, str | None]:
    """Versions where vllm-ascend is installed, else nothing; None for what is not here."""
    if distribution_version("vllm-ascend") is None:
        return {}
    return {"torch-npu": distribution_version("torch-npu"), "CANN": cann_version()}


def cann_version() -> str | None:
    """CANN's version by its own record of its installation; None if there is none."""
    named = [os.environ[name] for name in _HOMES if os.environ.get(name)]
    for home in named or _PLACES:
        record = Path(home) / f"{platform.machine()}-linux" / "ascend_toolkit_install.info"
        try:
            found = _VERSION.search(record.read_text())
        except OSError:
            continue
        if found:
            return found[1].strip()
    return None


def problems() -> list[str]:
    """What keeps vllm-ascend from running, each in a sentence; none where it is not installed."""
    try:
        installed = distribution("vllm-ascend")
    except PackageNotFoundError:
        return []
    found = []
    wants, here = _release(installed.version), vllm_version()
    if here is not None and _release(here) != wants:
        found.append(
            f"vllm-ascend {installed.version} needs vLLM {wants}; vLLM {here} is installed."
        )
    allowed = os.environ.get(ENV_ALLOW_LIST)
    if allowed is not None:
        theirs = {e.name for e in installed.entry_points if e.group.startswith("vllm.")}
        missing = sorted(theirs - {name.strip() for name in allowed.split(",")})
        if missing:
            found.append(
                f"{ENV_ALLOW_LIST} is {allowed!r}, which keeps vLLM from loading vllm-ascend's "
                f"{', '.join(missing)}; add them or unset it."
            )
    if distribution_version("torch-npu") is None:
        found.append(f"torch-npu is not installed, which vllm-ascend {installed.version} needs.")
    if cann_version() is None:
        found.append(
            "CANN is not found; its set_env.sh, which sets ASCEND_HOME_PATH, has to be sourced."
        )
    return found


def _release(version: str) -> str:
    """``0.23.0`` of ``0.23.0rc1``, ``0.23.0.post1`` and ``0.23.0+cpu``."""
    found = re.match(r"\d+(?:\.\d+){2}", version)
    return found[0] if found else version
