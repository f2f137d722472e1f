"""What all tests of tiers share."""

from __future__ import annotations

import pytest

from xllm_plugins.compat import inspect_seam


@pytest.fixture(autouse=True)
def hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    if inspect_seam("kv_tiers").holds:
        from vllm.v1.core import kv_cache_utils

        monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"seed", raising=False)
