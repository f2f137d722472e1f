"""Step-time profiles on disk: one per model and hardware, so that a restart does not start cold."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import threading
from pathlib import Path
from typing import Any

from xllm_plugins.latency import StepTimeModel

logger = logging.getLogger("vllm.xllm_scheduler")

_SAVE_STEPS = 500  # a profile is saved once so many steps were learned from, and at the end


def profile_key(vllm_config: Any) -> dict[str, Any]:
    """What makes step times of one server comparable with those of another."""
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return {
        "model": str(model.model),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "device": f"{current_platform.device_name} {platform.machine()} {os.cpu_count()}",
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
    }


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # there is no home
        return Path(name)


class Profile:
    """The file from which the step-time model starts and to which it is saved.

    Args:
        start: a profile to start from, whatever it was measured on; empty for the saved one.
        directory: where profiles are saved, one for each key; empty for nowhere.
        key: what step times depend on: the model, its precision, the device, the parallel sizes.
        model: what to restore and save.
    """

    def __init__(
        self, start: str, directory: str, key: dict[str, Any], model: StepTimeModel
    ) -> None:
        self._key = key
        self._model = model
        self._path: Path | None = None
        self._next_save = _SAVE_STEPS
        self.origin = "none"
        if directory:
            digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
            self._path = _expanded(directory) / f"step-time-{digest}.json"
        if start:
            self._load(_expanded(start), expected=True)
        elif self._path is not None:
            self._load(self._path, expected=False)

    def _load(self, path: Path, *, expected: bool) -> None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            self._model.restore(document["profile"])
        except FileNotFoundError as error:
            if expected:
                logger.warning("The step-time profile %s is not used: %s.", path, error)
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("The step-time profile %s is not used: %s.", path, error)
            return
        self.origin = str(path)

    def save_sometimes(self) -> None:
        """Save in the background, now and then; cheap to call in every step."""
        if self._path is not None and self._model.steps >= self._next_save:
            self._next_save = 10 * self._model.steps
            threading.Thread(target=self.save, name="xllm-profile", daemon=True).start()

    def save(self) -> None:
        """Write what was learned; a reader never sees half a file."""
        profile = self._model.saved()
        if self._path is None or not profile:
            return
        text = json.dumps({"key": self._key, "profile": profile}, indent=1)
        part = self._path.with_suffix(f".{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            part.replace(self._path)
        except OSError as error:
            logger.warning("The step-time profile %s could not be saved: %s.", self._path, error)
