"""Step-time profiles: how long a model's step takes on some hardware.

A profile file is JSON: ``name``, ``origin`` (who measured what, in a sentence), ``error`` (mean
relative error of prefill and decode times where it is known), ``step_time`` (the coefficients of
:class:`xllm_plugins.latency.StepTime`, ms) and what surrounds the model's forward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from xllm_plugins.errors import ConfigError
from xllm_plugins.latency import COEFFICIENTS, StepShape, StepTime
from xllm_scheduler.simulate.hardware import GPUS, named

_FITS_ORIGIN = (
    "own fits on kernel times of aiconfigurator-core 0.12.0 (vLLM 0.24, Apache-2.0): forward "
    "passes, not end-to-end runs"
)


@dataclass(frozen=True)
class Profile:
    """How long steps take.

    Attributes:
        name: ``GPU|MODEL|tpN`` for the shipped ones.
        origin: who measured what.
        error: mean relative errors of prefill and decode times, 0.02 for 2 %; empty if not known.
        step_time: the model's forward pass.
        prefill_base_ms: its base in a step without decodes; None if it is the same.
        host_ms: what the host adds to each step that is not hidden behind the step before.
        request_ms: what passes between a client's request and the scheduler, and back.
        jitter: the standard deviation of the logarithm of step times around their prediction.
    """

    name: str
    origin: str
    step_time: StepTime
    error: Mapping[str, float] = field(default_factory=dict)
    prefill_base_ms: float | None = None
    host_ms: float = 0.0
    request_ms: float = 0.0
    jitter: float = 0.0

    def step_ms(self, shape: StepShape) -> float:
        """How long a step of this shape takes, in ms."""
        took_ms = self.step_time.step_ms(shape) + self.host_ms
        if self.prefill_base_ms is not None and not shape.decodes:
            took_ms += self.prefill_base_ms - self.step_time.base
        return took_ms

    def document(self) -> dict[str, Any]:
        """As it is kept in a file."""
        values = dataclasses.asdict(self)
        values["step_time"] = {name: getattr(self.step_time, name) for name in COEFFICIENTS}
        return values


@functools.cache
def shipped() -> Mapping[str, Profile]:
    """The profiles that come with the package, by name."""
    text = files("xllm_scheduler.simulate").joinpath("data/step_time_fits.json").read_text("utf-8")
    return {name: _fitted(name, fit) for name, fit in json.loads(text).items()}


def load_profile(path: Path) -> Profile:
    """Read a profile file.

    Raises:
        ConfigError: it cannot be read, or a field is missing, unknown or not a number.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The profile {path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"The profile {path} holds no JSON object.")
    known = {f.name for f in dataclasses.fields(Profile)}
    for name in document:
        if name not in known:
            raise ConfigError(
                f"The profile {path} has {name!r}; allowed are {', '.join(sorted(known))}."
            )
    coefficients = document.get("step_time")
    if not isinstance(coefficients, dict) or "base" not in coefficients:
        raise ConfigError(f"The profile {path} has no step_time with at least a base.")
    for name, value in coefficients.items():
        if name not in COEFFICIENTS or not isinstance(value, (int, float)) or not value >= 0:
            raise ConfigError(
                f"The profile {path} has step_time.{name} {value!r}; allowed are numbers at least "
                f"0 for {', '.join(COEFFICIENTS)}."
            )
    values = {**document, "step_time": StepTime(**coefficients, ready=True)}
    values.setdefault("name", path.stem)
    values.setdefault("origin", "not stated")
    return Profile(**values)


def find_profile(gpu: str, model: str, tensor_parallel: int) -> Profile:
    """The shipped profile of a model on a GPU.

    Args:
        gpu: a name of :data:`xllm_scheduler.simulate.hardware.GPUS`.
        model: with or without its organisation, in any case.
        tensor_parallel: how many GPUs an instance has.

    Raises:
        ConfigError: there is none, or no such GPU.
    """
    named(GPUS, gpu, "gpu")
    wanted = model.rstrip("/").rsplit("/", 1)[-1].lower()
    for name, profile in shipped().items():
        has_gpu, has_model, has_tp = name.split("|")
        short = has_model.rsplit("/", 1)[-1].lower()
        if has_gpu.split("_")[0] == gpu and short == wanted and has_tp == f"tp{tensor_parallel}":
            return profile
    raise ConfigError(
        f"There is no shipped profile of {model} on {gpu} with --tp {tensor_parallel}; allowed are "
        f"{', '.join(shipped())}, or --profile FILE (made by xllm profile)."
    )


def _fitted(name: str, fit: Mapping[str, Any]) -> Profile:
    first, per_token, squared = fit["prefill_ms"]
    base, per_decode, per_context = fit["decode_ms"]
    experts, idle = 0.0, 1.0
    moe = fit.get("decode_moe_ms")
    if moe:
        base, per_decode, per_context, experts = moe["coef"]
        idle = 1.0 - moe["k"] / moe["E"]
    step_time = StepTime(
        base=base,
        token=per_token,
        # A chunk of d tokens after p costs (p + d)^2 - p^2 of the square term.
        square=squared,
        cross=2.0 * squared,
        decode=per_decode,
        context=per_context,
        experts=experts,
        idle_experts=idle,
        ready=True,
    )
    decode_error = moe["mape"] if moe else fit["decode_mape"]
    error = {"prefill": fit["prefill_mape"], "decode": decode_error}
    # A prefill reads all experts, so its base holds what they take.
    prefill_base_ms = max(0.0, first - experts)
    return Profile(name, _FITS_ORIGIN, step_time, error, prefill_base_ms)
