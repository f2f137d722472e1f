"""Registers the global KV cache, exactly as a third party's plugin would register its feature."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from xllm_kv import command
from xllm_kv.config import Eviction, KvSection, Transfer
from xllm_kv.report import METRICS, report_of
from xllm_kv.tiers.mooncake_store import OPTIONS, MooncakeStore
from xllm_plugins.compat import inspect_seam
from xllm_plugins.config import Mode
from xllm_plugins.errors import ConfigError, NotAvailableError
from xllm_plugins.features import Attachment, Feature
from xllm_plugins.hookspecs import hookimpl

CONNECTOR, MODULE = "MultiConnector", "xllm_kv.connector"
NIXL = "NixlConnector"
TIERS, TIERS_MODULE = "TiersConnector", "xllm_kv.tiers.connector"
_GIB = 1 << 30
_PACKAGES = {"redis": "redis", "rediss": "redis", "mooncake": "mooncake"}  # by kv.remote's scheme
_SHARED = Path("/dev/shm")  # noqa: S108 - where vLLM keeps what scheduler and workers share


def check(section: KvSection) -> None:
    """Refuse a store without host memory before it; stand back where nothing is asked for."""
    behind = [name for name in ("disk", "remote") if getattr(section, name)]
    if section.host_gib and section.host_share:
        raise ConfigError(
            f"kv.host_gib is {section.host_gib:g} and kv.host_share is {section.host_share:g}; "
            "allowed is one of them."
        )
    if behind and not _wants_host(section):
        raise ConfigError(
            f"kv.{behind[0]} is set, and kv.host_gib and kv.host_share are 0; allowed is more than "
            "0, since KV comes and goes through host memory."
        )
    if section.remote and not _is_address(section.remote):
        raise ConfigError(
            "kv.remote is not an address; allowed is redis://[USER:PASSWORD@]HOST[:PORT][/DB], the "
            f"same with rediss://, or mooncake://MASTER[:PORT] with ?{'=, '.join(OPTIONS)}=."
        )
    if section.tenant_share < 1.0 and section.eviction is not Eviction.REUSE:
        raise ConfigError(
            f"kv.tenant_share is {section.tenant_share:g} and kv.eviction is "
            f"{section.eviction.value}, which knows no tenants; allowed is reuse."
        )
    if not _wants_host(section) and section.transfer is Transfer.NONE:
        raise NotAvailableError("none of kv.host_gib, kv.host_share and kv.transfer is set")


def _wants_host(section: KvSection) -> bool:
    return bool(section.host_gib or section.host_share)


def _is_address(url: str) -> bool:
    try:
        found = urlsplit(url)
        if found.scheme == "mooncake":
            MooncakeStore(url)
        return found.scheme in _PACKAGES and bool(found.hostname) and found.port != 0
    except ValueError:  # its port is none, or an option
        return False


def prepare(engine_args: Any, section: KvSection) -> Mapping[str, Any]:
    """The arguments with our connector, over what the user gave where that is asked for."""
    check(section)
    own = engine_args.kv_transfer_config
    if own is not None and section.mode is not Mode.ON:
        raise NotAvailableError(
            f"--kv-transfer-config with {own.kv_connector} is kept; kv.mode=on stands beside it"
        )
    if getattr(engine_args, "kv_offloading_size", None):
        raise NotAvailableError("--kv-offloading-size is kept; kv.host_gib is what we would keep")
    children = _own_children(own)
    if section.transfer is Transfer.NIXL:
        if importlib.util.find_spec("nixl") is None:
            raise NotAvailableError("kv.transfer is nixl, which is not installed")
        children.append({"kv_connector": NIXL, "kv_role": "kv_both"})
    if _wants_host(section):
        children.append(_tiers(section))
    from vllm.config import KVTransferConfig

    return {
        "kv_transfer_config": KVTransferConfig(
            kv_connector=CONNECTOR,
            kv_connector_module_path=MODULE,
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"connectors": children},
        )
    }


def _own_children(own: Any) -> list[dict[str, Any]]:
    if own is None:
        return []
    if own.kv_connector == CONNECTOR:
        return list(own.kv_connector_extra_config["connectors"])
    given = {f.name: getattr(own, f.name) for f in dataclasses.fields(own)}
    # The engine id is the whole connector's.
    return [{name: value for name, value in given.items() if name != "engine_id"}]


def _tiers(section: KvSection) -> dict[str, Any]:
    package = _PACKAGES.get(urlsplit(section.remote).scheme)
    if package is not None and importlib.util.find_spec(package) is None:
        raise NotAvailableError(f"kv.remote is set, and {package} is not installed; it is an extra")
    broken = inspect_seam("kv_tiers")
    if not broken.holds:
        raise NotAvailableError(f"seam kv_tiers does not hold: {broken.reason}")
    free = shutil.disk_usage(_SHARED).free
    wanted = _host_bytes(section, free)
    if wanted > free:
        raise NotAvailableError(
            f"kv.host_gib is {section.host_gib:g}, and {_SHARED} has {free / _GIB:.1f} GiB free; "
            "it is where vLLM shares host memory"
        )
    extra: dict[str, Any] = {
        "spec_name": "TiersSpec",
        "spec_module_path": "xllm_kv.tiers.spec",
        "cpu_bytes_to_use": wanted,
        "self_describing_kv_events": True,
        "eviction_policy": section.eviction.value,
        "xllm": {
            "admission": section.admission.value,
            "tenant_share": section.tenant_share,
            "pin_share": section.pin_share,
            "stop": section.stop.value,
            "price": section.price,
        },
    }
    if section.eviction is Eviction.REUSE:
        extra["eviction_policy"] = "ReuseCachePolicy"
        extra["cache_policy_module_path"] = "xllm_kv.tiers.cache_policy"
    extra["secondary_tiers"] = _behind(section)
    return {
        "kv_connector": TIERS,
        "kv_connector_module_path": TIERS_MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


def _host_bytes(section: KvSection, shared_free: int) -> int:
    if not section.host_share:
        return int(section.host_gib * _GIB)
    import psutil  # which vLLM brings

    return int(section.host_share * min(shared_free, psutil.virtual_memory().available))


def _behind(section: KvSection) -> list[dict[str, Any]]:
    """The tiers behind host memory, the faster one first."""
    tiers: list[dict[str, Any]] = []
    if section.disk:
        disk = {
            "type": "DiskTier",
            "module_path": "xllm_kv.tiers.disk",
            "folder": str(Path(section.disk).expanduser().absolute()),
            "capacity": int(section.disk_gib * _GIB),
        }
        tiers.append(disk)
    if section.remote:
        # The address may hold a password, and vLLM logs this: the tier reads it from the settings.
        if remote_url() != section.remote:
            raise ConfigError(
                "kv.remote is in --additional-config, which vLLM logs; allowed are --xllm-config "
                "and XLLM_KV_REMOTE."
            )
        remote = {
            "type": "RemoteTier",
            "module_path": "xllm_kv.tiers.remote",
            "expiry_s": section.remote_expiry_s,
        }
        tiers.append(remote)
    return tiers


def remote_url() -> str:
    """The remote store's address, as it was given to this process or its parent."""
    from xllm_plugins.activation import load_settings  # which loads this module

    section = load_settings({}).sections["kv"]
    assert isinstance(section, KvSection)
    return section.remote


def attach(attachment: Attachment) -> str:
    """Say what vLLM built the connector of, or why it has none of ours."""
    prepare(attachment.engine_args, attachment.section)  # type: ignore[arg-type]
    config = attachment.vllm_config.kv_transfer_config
    if config is None or config.kv_connector_module_path != MODULE:
        raise NotAvailableError("vLLM's configuration was built without our connector")
    children = [child["kv_connector"] for child in config.kv_connector_extra_config["connectors"]]
    if children == [TIERS]:
        refuse_embeddings(attachment.vllm_config, attachment.engine_args)
    return " and ".join(children)


def refuse_embeddings(vllm_config: Any, engine_args: Any) -> None:
    """Take embeddings in place of images only where the user has it so, as without tiers.

    vLLM has every engine that may be given KV accept them, even without their tensors, since the KV
    made of them comes from another engine. Of what tiers do not hold the tensors are needed here.
    """
    images = getattr(vllm_config.model_config, "multimodal_config", None)
    if images is None or not getattr(images, "allow_missing_mm_embeddings", False):
        return
    encoder = vllm_config.ec_transfer_config
    if encoder is None or not encoder.is_ec_consumer:
        images.allow_missing_mm_embeddings = False
        images.enable_mm_embeds = engine_args.enable_mm_embeds


FEATURE = Feature(
    name="kv",
    summary="KV that the device gives up is kept, and fetched where that beats computing it.",
    section=KvSection,
    prepare=prepare,
    attach=attach,
    check=check,
    seams=("kv_connector",),
    metrics=METRICS,
    report=report_of,
)


@hookimpl
def xllm_features() -> list[Feature]:
    """The ``kv`` feature."""
    return [FEATURE]


@hookimpl
def xllm_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``xllm kv``."""
    command.add_command(subparsers)
