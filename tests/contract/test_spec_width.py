"""vLLM's scheduler asks us how far its drafting model drafts, and we see what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from tests.contract.engine import build, request
from tests.contract.test_spec_proposer import arguments, config_of
from xllm_plugins.compat import inspect_seam, spec_width
from xllm_plugins.config import Mode
from xllm_plugins.errors import NotAvailableError
from xllm_plugins.features import Attachment
from xllm_spec_decode import plugin
from xllm_spec_decode.config import SpecDecodeSection
from xllm_spec_decode.steered import SteeredWidth

MOST = 3
DRAFT = {"method": "draft_model", "model": "/some/model", "num_speculative_tokens": MOST}
STEERED = {**DRAFT, "num_speculative_tokens_per_batch_size": [[1, 1 << 20, MOST]]}
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not inspect_seam("spec_width").holds, reason="vLLM 0.23 has no such lookup"),
]


class Clock:
    """A step of two requests takes 10 ms and 1 ms for each token."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    original = Scheduler.update_from_output
    yield
    Scheduler.update_from_output = original


def scheduler_of(base: type, **settings: Any) -> Any:
    scheduler = build(base, seqs=4)
    config = scheduler.vllm_config
    config.additional_config = config_of(**settings).additional_config
    config.speculative_config = SimpleNamespace(
        method="draft_model", num_speculative_tokens=MOST, max_num_new_slots_for_drafting=0
    )
    scheduler.num_spec_tokens = MOST
    scheduler.dynamic_sd_lookup = [0, *[MOST] * 4]
    return scheduler


def run(scheduler: Any, steps: int, clock: Clock | None = None) -> list[int]:
    """Two requests for whom every draft is right; the lengths that vLLM was told to draft."""
    for name in ("one", "two"):
        scheduler.add_request(request(name, max_tokens=80))
    widths = []
    for _ in range(steps):
        output = scheduler.schedule()
        drafts = output.scheduled_spec_decode_tokens
        ids = list(output.num_scheduled_tokens)
        said = [[7] * (1 + len(drafts.get(one, ()))) for one in ids]
        if clock is not None:
            clock.now_s += (10 + output.total_num_scheduled_tokens) / 1e3
        scheduler.update_from_output(
            output, ModelRunnerOutput(ids, {one: i for i, one in enumerate(ids)}, said)
        )
        width = output.num_spec_tokens_to_schedule
        widths.append(width)
        scheduler.update_draft_token_ids(DraftTokenIds(ids, [[7] * width for _ in ids]))
    return widths


def test_vllm_drafts_as_far_as_it_is_told() -> None:
    class OneLess:
        def __getitem__(self, requests: int) -> int:
            return requests - 1

        def xllm_see(self, output: Any, said: Any) -> None:
            pass

    spec_width.install(lambda config: OneLess())
    spec_width.install(lambda config: None)  # every process may, several times
    assert run(scheduler_of(Scheduler), 4) == [MOST, 1, 1, 1]


def test_placeholders_of_asynchronous_scheduling_are_as_many() -> None:
    scheduler = scheduler_of(AsyncScheduler)
    scheduler.dynamic_sd_lookup = [0, 1, 2, 2, 2]
    scheduler.add_request(request("one", max_tokens=80))
    scheduler.schedule()
    assert scheduler.requests["one"].spec_token_ids == [-1]


def test_a_schedule_that_nobody_steers_is_vllms() -> None:
    spec_width.install(lambda config: None)
    scheduler = scheduler_of(Scheduler)
    assert run(scheduler, 3) == [MOST] * 3
    assert spec_width.steered(scheduler) is None


def test_what_was_accepted_and_how_long_it_took_is_seen() -> None:
    clock = Clock()
    spec_width.install(lambda config: SteeredWidth(config, clock))
    scheduler = scheduler_of(Scheduler)
    widths = run(scheduler, 22, clock)
    found = spec_width.steered(scheduler).facts()
    assert set(widths[1:9]) == {0, 1, 2, 3}  # each is tried
    assert set(widths[-8:]) == {MOST}  # all are right: as far as allowed
    assert found["drafted"] == found["accepted"] == {"draft_model": 2 * sum(widths[:-1])}
    assert found["step_ms"]["error"] < 0.1
    report = plugin.report.__wrapped__(SimpleNamespace(scheduler=scheduler))  # type: ignore[attr-defined]
    assert report.facts == found


def test_a_tpot_that_is_too_short_for_drafts_has_none() -> None:
    clock = Clock()
    spec_width.install(lambda config: SteeredWidth(config, clock))
    assert set(run(scheduler_of(Scheduler, tpot_ms=13.0), 25, clock)[-10:]) == {0}


def test_a_failure_leaves_the_users_length(monkeypatch: pytest.MonkeyPatch) -> None:
    spec_width.install(lambda config: SteeredWidth(config, Clock()))
    scheduler = scheduler_of(Scheduler)
    monkeypatch.setattr("xllm_spec_decode.width.BatchWidth.choose", lambda *a: 1 / 0)
    assert run(scheduler, 4) == [MOST] * 4
    assert "ZeroDivisionError" in spec_width.steered(scheduler).facts()["stands_back"]


def test_a_drafting_model_of_the_users_is_steered_when_asked_for() -> None:
    given = arguments(speculative_config=DRAFT)
    section = SpecDecodeSection(mode=Mode.ON)
    assert plugin.prepare(given, section) == {"speculative_config": STEERED}
    config = config_of()
    config.speculative_config = SimpleNamespace(**STEERED, draft_model_config=None)
    config.scheduler_config.async_scheduling = True
    assert plugin.attach(Attachment(given, config, section)) == "vllm.v1.core.sched.scheduler"
    config.speculative_config.num_speculative_tokens_per_batch_size = None
    with pytest.raises(NotAvailableError, match="without a schedule of lengths"):
        plugin.attach(Attachment(given, config, section))


@pytest.mark.parametrize(
    ("fields", "mode", "reason"),
    [
        ({"speculative_config": DRAFT}, Mode.AUTO, "with draft_model is kept; spec_decode.mode=on"),
        ({"speculative_config": STEERED}, Mode.ON, "kept; it has num_speculative_tokens_per_batch"),
        ({"speculative_config": {"method": "eagle3"}}, Mode.ON, "needs its num_speculative_tokens"),
        (
            {"speculative_config": {**DRAFT, "parallel_drafting": True}},
            Mode.ON,
            "drafts all its tokens in one pass",
        ),
        ({"speculative_config": {"method": "medusa"}}, Mode.ON, "eagle3, mtp can be steered"),
        ({"speculative_config": DRAFT, "data_parallel_size": 2}, Mode.ON, "data parallelism"),
    ],
)
def test_it_stands_back_from_drafting_models(fields: Any, mode: Mode, reason: str) -> None:
    with pytest.raises(NotAvailableError, match=reason):
        plugin.prepare(arguments(**fields), SpecDecodeSection(mode=mode))


def test_a_configuration_without_us_makes_nothing() -> None:
    assert plugin._steered_width(SimpleNamespace(additional_config={})) is None
