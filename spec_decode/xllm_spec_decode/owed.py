"""Our settings in a process of vLLM's, and the TPOT that a request is owed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from xllm_plugins.activation import SETTINGS_KEY, active_features, section_of
from xllm_plugins.config import Section
from xllm_plugins.errors import XllmError
from xllm_spec_decode.config import SpecDecodeSection


def settings(vllm_config: Any) -> tuple[SpecDecodeSection, Callable[[Any], float]]:
    """Our section, and what says which TPOT a new request is owed, ms; infinite for none."""
    sections: dict[str, Section] = {
        feature.name: section_of(feature, vllm_config) for feature in active_features(vllm_config)
    }
    section = sections.get("spec_decode")
    if not isinstance(section, SpecDecodeSection):
        raise XllmError(
            f"XllmProposer was asked for, and xllm.spec_decode is not active; it is by "
            f"--plugins xllm.spec_decode ({SETTINGS_KEY} in --additional-config has its settings)."
        )
    if section.tpot_ms:
        return section, lambda request: section.tpot_ms
    scheduler = sections.get("scheduler")
    if scheduler is None:
        return section, lambda request: math.inf
    return section, lambda request: _owed_tpot_ms(request, scheduler)


def _owed_tpot_ms(request: Any, scheduler: Any) -> float:
    from xllm_scheduler.classes import classify

    xargs: Mapping[str, Any] = getattr(request.sampling_params, "extra_args", None) or {}
    service = classify(xargs, 0, scheduler)
    return service.tpot_ms if service.online else math.inf
