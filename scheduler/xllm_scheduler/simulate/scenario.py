"""A scenario: everything that one simulation is made of, as a YAML file or the command line says.

Relative paths are relative to the file that names them.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xllm_plugins.config import parse_section
from xllm_plugins.errors import ConfigError
from xllm_scheduler.service.config import RouterSection, roles_of, routing_of
from xllm_scheduler.service.routing import Role
from xllm_scheduler.simulate import generate
from xllm_scheduler.simulate.cluster import Cluster, Progress
from xllm_scheduler.simulate.engine import ELASTIC, Engine, EngineSpec
from xllm_scheduler.simulate.hardware import LINKS, named
from xllm_scheduler.simulate.members import ClusterSpec, Failure
from xllm_scheduler.simulate.outcomes import Run
from xllm_scheduler.simulate.profiles import Profile, find_profile, load_profile
from xllm_scheduler.simulate.traces import read_trace
from xllm_scheduler.simulate.workload import Ask, Session, Slo, Stream, between, scaled

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SloPart(_Strict):
    """What an online request is promised."""

    ttft_ms: Positive
    tpot_ms: Positive


class ArrivalsPart(_Strict):
    """When generated requests come; see :class:`generate.Arrivals`."""

    rate: Positive
    burstiness: Positive = 1.0
    diurnal: Annotated[float, Field(ge=0, le=1)] = 0.0
    period_s: Positive = 86400.0

    def made(self, factor: float) -> generate.Arrivals:
        """At ``factor`` times the rate."""
        return generate.Arrivals(self.rate * factor, self.burstiness, self.diurnal, self.period_s)


class LengthsPart(_Strict):
    """Token counts; see :class:`generate.Lengths`."""

    mean: Positive
    spread: Annotated[float, Field(ge=0)] = 0.0
    most: Count = 1 << 30

    def made(self) -> generate.Lengths:
        """As it is drawn from."""
        return generate.Lengths(self.mean, self.spread, self.most)


class ConversationsPart(_Strict):
    """Closed-loop conversations of several turns."""

    turns: LengthsPart
    think_s: Positive = 10.0


class StreamPart(_Strict):
    """Requests of one class, from a trace or generated."""

    name: str
    kind: Literal["online", "offline"] = Field("online", alias="class")
    slo: SloPart | None = None
    trace: Path | None = None
    arrivals: ArrivalsPart | None = None
    prompt: LengthsPart | None = None
    output: LengthsPart | None = None
    conversations: ConversationsPart | None = None
    rate: Positive = 1.0
    from_s: Annotated[float, Field(ge=0)] = 0.0
    to_s: Positive = math.inf
    outstanding: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _complete(self) -> StreamPart:
        if self.kind == "online" and self.slo is None:
            raise ValueError("slo is missing; an online stream has ttft_ms and tpot_ms")
        if self.trace is None and not (self.prompt and self.output):
            raise ValueError("trace is missing; else prompt and output are needed")
        if self.trace is None and not (self.arrivals or self.outstanding):
            raise ValueError("arrivals or outstanding is missing; without a trace one is needed")
        if self.conversations and (self.trace or self.outstanding or not self.arrivals):
            raise ValueError("conversations go with arrivals alone")
        return self

    def made(self, seconds: float, seed: int) -> Stream:
        """The stream itself."""
        slo = Slo(self.slo.ttft_ms, self.slo.tpot_ms) if self.slo else Slo()
        asks, sessions = self._items(seconds, seed)
        return Stream(
            self.name, self.kind == "online", slo, asks, sessions, outstanding=self.outstanding
        )

    def _items(self, seconds: float, seed: int) -> tuple[list[Ask], list[Session]]:
        arrivals = self.arrivals.made(self.rate) if self.arrivals else None
        if self.trace is not None:
            asks = _trace(self.trace)
            if self.to_s < math.inf or self.from_s:
                asks = between(asks, self.from_s, self.to_s)
            if arrivals is None:
                return scaled(asks, self.rate), []
            return generate.drawn(asks, arrivals, seconds=seconds, seed=seed), []
        assert self.prompt is not None
        assert self.output is not None
        prompt, output = self.prompt.made(), self.output.made()
        if self.conversations is not None and arrivals is not None:
            turns, think_s = self.conversations.turns.made(), self.conversations.think_s
            sessions = generate.conversations(
                arrivals, turns, prompt, output, think_s, seconds=seconds, seed=seed
            )
            return [], sessions
        # A backlog is never empty: more of it than any run can take in.
        arrivals = arrivals or generate.Arrivals(max(100.0, 10.0 * self.outstanding / seconds))
        return generate.requests(arrivals, prompt, output, seconds=seconds, seed=seed), []


class FailurePart(_Strict):
    """An instance that is lost, and comes back."""

    instance: str
    at_s: Annotated[float, Field(ge=0)]
    back_s: Positive = math.inf


class Scenario(_Strict):
    """See the module."""

    model: str
    gpu: str = "h200"
    tp: Count = 1
    instances: Count = 1
    roles: dict[Role, Count] = {}
    scheduler: str = ELASTIC
    settings: dict[str, Any] = {}
    vllm: dict[str, Any] = {}
    kv_gib: Positive | None = None
    profile: Path | None = None
    routing: str = "least_loaded"
    role_policy: str = ""
    router: dict[str, Any] = {}
    link: str = "nvlink"
    role_change_ms: Annotated[float, Field(ge=0)] = 100.0
    failures: list[FailurePart] = []
    seconds: Positive | None = None
    seed: int = 0
    streams: Annotated[list[StreamPart], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        if self.roles and sum(self.roles.values()) != self.instances and self.instances != 1:
            raise ValueError("roles and instances say different numbers of instances")
        ends = any(not s.outstanding for s in self.streams)
        if self.seconds is None and not ends:
            raise ValueError("seconds is missing; a backlog alone has no end")
        if self.seconds is None and any(s.arrivals for s in self.streams):
            raise ValueError("seconds is missing; generated arrivals have no end")
        names = [s.name for s in self.streams]
        if len(set(names)) < len(names):
            raise ValueError("two streams have the same name")
        return self

    def run(self, progress: Progress | None = None) -> Run:
        """Simulate it."""
        roles = [role for role, count in self.roles.items() for _ in range(count)]
        failures = [Failure(f.instance, f.at_s, f.back_s) for f in self.failures]
        for failure in failures:
            if failure.instance not in {f"i{n}" for n in range(len(roles) or self.instances)}:
                raise ConfigError(
                    f"failures names {failure.instance!r}; allowed are i0 to "
                    f"i{(len(roles) or self.instances) - 1}."
                )
        spec = ClusterSpec(
            roles or [Role.MIXED] * self.instances,
            named(LINKS, self.link, "link"),
            role_change_ms=self.role_change_ms,
            failures=failures,
        )
        step_times = self.step_times()  # before vLLM's configuration, which takes seconds
        values = {"routing": self.routing, "roles": self.role_policy, **self.router}
        section = parse_section(RouterSection, "router", values)
        routing, role_policy = routing_of(section), roles_of(section)
        engine = _engine(self, routing.reads_cached)
        cluster = Cluster(spec, engine, step_times, routing, role_policy)
        seconds = self.seconds or math.inf
        streams = [stream.made(seconds, self.seed) for stream in self.streams]
        return cluster.run(streams, seconds=self.seconds, progress=progress)

    def step_times(self) -> Profile:
        """The profile that it names, or the shipped one of its model and GPU."""
        if self.profile is not None:
            return load_profile(self.profile)
        return find_profile(self.gpu, self.model, self.tp)

    def at_rate(self, factor: float) -> Scenario:
        """With all requests that come at their times at ``factor`` times the rate."""
        streams = [
            s if s.outstanding else s.model_copy(update={"rate": s.rate * factor})
            for s in self.streams
        ]
        return self.model_copy(update={"streams": streams})


def parse_scenario(document: Any, where: str, base: Path = Path()) -> Scenario:
    """A scenario from plain data.

    Args:
        document: what a YAML file holds.
        where: the file's name, for messages.
        base: what relative paths are relative to.

    Raises:
        ConfigError: it cannot be used; names the field, the value and what is allowed.
    """
    try:
        return Scenario.model_validate(_absolute(document, base))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the scenario"
        given = "" if first["type"] in ("missing", "value_error") else f" is {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {field}{given}: {message}.") from error


def load_scenario(path: Path) -> Scenario:
    """A scenario from a file.

    Raises:
        ConfigError: it cannot be read or used.
    """
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"The scenario {path} cannot be read: {error}") from error
    return parse_scenario(document, str(path), path.parent)


def _absolute(document: Any, base: Path) -> Any:
    """With the paths in it made independent of the current directory."""
    if not isinstance(document, dict):
        return document
    made = dict(document)
    if isinstance(made.get("profile"), str):
        made["profile"] = base / made["profile"]
    if isinstance(made.get("streams"), list):
        made["streams"] = [
            {**s, "trace": base / s["trace"]}
            if isinstance(s, dict) and isinstance(s.get("trace"), str)
            else s
            for s in made["streams"]
        ]
    return made


@functools.lru_cache(maxsize=8)
def _trace(path: Path) -> list[Ask]:
    return read_trace(path)


_engines: dict[str, Engine] = {}


def _engine(scenario: Scenario, kv_events: bool) -> Engine:
    """One for all runs that differ in load alone; vLLM takes seconds to make its configuration."""
    spec = EngineSpec(
        scenario.model,
        scenario.gpu,
        scenario.tp,
        scenario.scheduler,
        scenario.settings,
        scenario.vllm,
        scenario.kv_gib,
        kv_events,
    )
    key = repr(spec)
    if key not in _engines:
        _engines[key] = Engine(spec)
    return _engines[key]
