"""Registers the adaptive proposer, exactly as a third party's plugin would register its feature."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from xllm_plugins.activation import active_features
from xllm_plugins.compat import (
    ascend_proposer,
    inspect_seam,
    spec_beside,
    spec_proposer,
    spec_width,
)
from xllm_plugins.config import Mode
from xllm_plugins.errors import NotAvailableError
from xllm_plugins.features import Attachment, Feature
from xllm_plugins.hookspecs import hookimpl
from xllm_plugins.status import Report, now_and_then
from xllm_spec_decode.books import METRICS, report_of
from xllm_spec_decode.config import Choice, SpecDecodeSection

logger = logging.getLogger("vllm.xllm_spec_decode")

# Imported by vLLM's model runner and nobody before: numba in the process breaks what vLLM's CPU
# worker does when it starts, so nothing here imports what loops over tokens.
_MODULE = "xllm_spec_decode.proposer"
PROPOSERS = {
    Choice.BEST: f"{_MODULE}.XllmProposer",
    Choice.NGRAM: f"{_MODULE}.NgramProposer",
    Choice.SUFFIX: f"{_MODULE}.SuffixProposer",
}
_MODELS = ("draft_model", "eagle", "eagle3", "mtp")
_METHODS = {"ngram": Choice.NGRAM, "[ngram]": Choice.NGRAM, "suffix": Choice.SUFFIX}


def prepare(engine_args: Any, section: SpecDecodeSection) -> Mapping[str, Any]:
    """The arguments with our proposer, where nothing that the user set speaks against it."""
    choice, most = section.drafter, section.most_tokens
    own = engine_args.speculative_config
    if own:
        method = str(own.get("method") or own.get("model"))
        if section.mode is not Mode.ON:
            raise NotAvailableError(
                f"--speculative-config with {method} is kept; spec_decode.mode=on steers ngram, "
                f"suffix, {', '.join(_MODELS)}"
            )
        if method in _MODELS:
            return {"speculative_config": _steered(engine_args, own)}
        if method not in _METHODS:
            raise NotAvailableError(
                f"--speculative-config with {method} is kept; ngram, suffix, {', '.join(_MODELS)} "
                "can be steered"
            )
        choice, most = _METHODS[method], own.get("num_speculative_tokens", most)
    _check_arguments(engine_args, section, most)
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": PROPOSERS[choice],
            "num_speculative_tokens": most,
        }
    }


def _steered(engine_args: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """A user's config of a drafting model, so that vLLM asks in each step how far to draft."""
    problem, most = "", own.get("num_speculative_tokens", 0)
    if spec_width.SCHEDULE in own:
        problem = f"it has {spec_width.SCHEDULE}"
    elif own.get("parallel_drafting"):
        problem = "it drafts all its tokens in one pass"
    elif not most:
        problem = "steering it needs its num_speculative_tokens, the most that are drafted"
    elif engine_args.data_parallel_size > 1:
        problem = "vLLM drafts equally far in all ranks of data parallelism"
    else:
        seam = inspect_seam("spec_width")
        problem = "" if seam.holds else f"seam spec_width does not hold: {seam.reason}"
    if problem:
        raise NotAvailableError(f"--speculative-config with {own['method']} is kept; {problem}")
    return {**own, spec_width.SCHEDULE: spec_width.whole_schedule(int(most))}


def _check_arguments(engine_args: Any, section: SpecDecodeSection, most: int) -> None:
    from vllm.platforms import current_platform

    if engine_args.async_scheduling:
        raise NotAvailableError(
            "--async-scheduling is kept; drafts from texts need the last step's tokens first"
        )
    if section.mode is Mode.ON:
        if current_platform.is_out_of_tree():
            _check_runner(current_platform.device_name)
        return
    if not current_platform.is_cpu():
        raise NotAvailableError(
            f"on {current_platform.device_name} drafts from texts give up asynchronous scheduling "
            "and vLLM's V2 runner; spec_decode.mode=on takes that"
        )
    if engine_args.pipeline_parallel_size > 1:
        raise NotAvailableError("pipeline stages would wait for drafts; spec_decode.mode=on lets")
    tokens, requests = engine_args.max_num_batched_tokens, engine_args.max_num_seqs
    if engine_args.enable_lora and (tokens or 0) < (requests or tokens or 1) * (most + 1):
        raise NotAvailableError(
            "with --enable-lora vLLM wants --max-num-batched-tokens to be at least --max-num-seqs "
            f"times {most + 1}, spec_decode.most_tokens and one; both have to be given"
        )


def _check_runner(device: str) -> None:
    found = inspect_seam("ascend_proposer")
    if not found.holds:
        raise NotAvailableError(
            f"the runner of {device} takes no proposer of another's class: seam ascend_proposer "
            f"does not hold: {found.reason}"
        )


def install() -> None:
    """In every process: have runners draft with ours, and drafting models as far as we say."""
    spec_proposer.install()
    ascend_proposer.install()
    spec_width.install(_steered_width)
    spec_beside.install(_beside_model)


def _is_beside(vllm_config: Any) -> bool:
    """Whether texts draft beside a model: one worker of V1 decides, knowing what a step said.

    A text that is too long for the model would have vLLM ask nobody for drafts.
    """
    speculative = vllm_config.speculative_config
    longest = vllm_config.model_config.max_model_len
    reach = getattr(speculative.draft_model_config, "max_model_len", None) or longest
    return (
        not vllm_config.scheduler_config.async_scheduling
        and not vllm_config.use_v2_model_runner
        and vllm_config.parallel_config.world_size == 1
        and speculative.draft_sample_method == "greedy"
        and reach >= longest
        and inspect_seam("spec_beside").holds
    )


def _is_steered(vllm_config: Any) -> bool:
    """Whether a model's drafts are ours to steer, and not as the user's own schedule has them."""
    if not any(feature.name == FEATURE.name for feature in active_features(vllm_config)):
        return False
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.method in _MODELS


def _beside_model(vllm_config: Any) -> Any:
    if not _is_steered(vllm_config) or not _is_beside(vllm_config):
        return None
    from xllm_spec_decode.proposer import XllmProposer

    try:
        made = XllmProposer(vllm_config, str(vllm_config.speculative_config.method))
        made.load_model()
    except Exception:  # the model drafts as it was set to
        logger.exception("Nothing is drafted from texts beside the model")
        return None
    return made


def _steered_width(vllm_config: Any) -> Any:
    if not _is_steered(vllm_config) or _is_beside(vllm_config):
        return None  # the user's schedule, or what the worker chooses
    from xllm_spec_decode.steered import SteeredWidth

    try:
        return SteeredWidth(vllm_config)
    except Exception:  # requests are under way
        logger.exception("Drafts are as long as they were set to be")
        return None


def attach(attachment: Attachment) -> str:
    """Say which drafters propose, or why none do."""
    section = attachment.section
    assert isinstance(section, SpecDecodeSection)
    prepare(attachment.engine_args, section)
    config = attachment.vllm_config
    if config.model_config.runner_type == "pooling":
        raise NotAvailableError("pooling models generate no tokens")
    speculative = config.speculative_config
    if speculative is not None and speculative.model in PROPOSERS.values():
        return "vllm.v1.spec_decode.custom_class_proposer"
    if speculative is None or speculative.method not in _MODELS:
        raise NotAvailableError("vLLM's configuration was built without our proposer")
    if not getattr(speculative, spec_width.SCHEDULE):
        raise NotAvailableError("vLLM's configuration was built without a schedule of lengths")
    if _is_beside(config):
        return "vllm.v1.spec_decode.llm_base_proposer"
    return "vllm.v1.core.sched.scheduler"


def worker_facts(worker: Any) -> dict[str, Any] | None:
    """Called in a worker process: what its proposer has done; None where there is none."""
    module = sys.modules.get(_MODULE)
    proposer = None if module is None else module.current()
    return None if proposer is None else proposer.facts()


@now_and_then
def report(engine_core: Any) -> Report:
    """What the worker has drafted, or how far the scheduler had it draft."""
    width = spec_width.steered(engine_core.scheduler)
    if width is not None:
        return report_of(width.facts())
    facts = spec_proposer.ask_worker(engine_core, worker_facts)
    return Report() if facts is None else report_of(facts)


FEATURE = Feature(
    name="spec_decode",
    summary="Each request is drafted for by whom and as far as it gains, and not where it costs.",
    section=SpecDecodeSection,
    prepare=prepare,
    attach=attach,
    install=install,
    seams=("spec_proposer", "spec_sampling"),
    metrics=METRICS,
    report=report,
)


@hookimpl
def xllm_features() -> list[Feature]:
    """The ``spec_decode`` feature."""
    return [FEATURE]
