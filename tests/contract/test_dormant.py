"""Installed is not active: what vLLM is with our package installed, and after it was chosen."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.lab.engine import write_model
from tests.contract.children import run_child

pytestmark = pytest.mark.vllm

# What `vllm serve` does to build its parser; it loads the general plugins on the way.
PARSER = """
import json, os, sys
from tests.contract.children import fingerprints, forked
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

def build_parser():
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
"""
WALK = """
build_parser()
modules = sorted(sys.modules)
print(json.dumps({"modules": modules, "attributes": fingerprints("vllm")}))
"""
CHOICES = """
from vllm.entrypoints.cli.serve import cmd_init
from xllm_plugins.compat import is_patched

model, settings, bad_settings = sys.argv[1:]
parser = build_parser()

def choose(*args):
    parser.parse_args(args)
    return {
        "wrapped": is_patched(EngineArgs, "create_engine_config"),
        "XLLM_PLUGINS": os.environ.get("XLLM_PLUGINS"),
        "XLLM_CONFIG": os.environ.get("XLLM_CONFIG"),
        "VLLM_PLUGINS": os.environ.get("VLLM_PLUGINS"),
    }

def configure(*args):
    chosen = parser.parse_args(["--model", model, "--skip-tokenizer-init", *args])
    config = AsyncEngineArgs.from_cli_args(chosen).create_engine_config()
    return {
        "scheduler_cls": config.scheduler_config.scheduler_cls,
        "additional_config": config.additional_config,
    }

def serve(*args):
    top = FlexibleArgumentParser()
    commands = top.add_subparsers(dest="subparser")
    for command in cmd_init():
        command.subparser_init(commands)
    read = top.parse_args(["serve", *args])
    return {"plugins": read.plugins, "XLLM_PLUGINS": os.environ.get("XLLM_PLUGINS")}

yaml = os.path.join(os.path.dirname(settings), "serve.yaml")
print(json.dumps({
    "nothing": forked(choose),
    "xllm": forked(lambda: choose("--plugins", "xllm")),
    "unknown": forked(lambda: choose("--plugins", "xlm")),
    "bad settings": forked(lambda: choose("--plugins", "xllm", "--xllm-config", bad_settings)),
    "no such file": forked(lambda: choose("--xllm-config", "/nowhere.yaml")),
    "plain": forked(configure),
    "configured": forked(lambda: configure("--plugins", "xllm", "--xllm-config", settings)),
    "left out": forked(lambda: configure("--plugins", "xllm", "--scheduler-cls", "their.Own")),
    "settings alone": forked(lambda: configure("--xllm-config", settings)),
    "yaml": forked(lambda: serve(model, "--config", yaml)),
}))
"""
LORA_RESOLVERS = "lora_filesystem_resolver,lora_hf_hub_resolver"


def test_nothing_but_the_options_is_there_until_plugins_are_chosen() -> None:
    # vLLM's own general plugins load in both.
    without = run_child(PARSER + WALK, env={"VLLM_PLUGINS": LORA_RESOLVERS})
    installed = run_child(PARSER + WALK)

    before, after = without["attributes"], installed["attributes"]
    assert len(before) > 10_000
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"vllm.engine.arg_utils:EngineArgs.add_cli_args"}

    imported = set(installed["modules"]) - set(without["modules"])
    assert {name for name in imported if not name.startswith("xllm_plugins")} == set()
    assert "xllm_plugins.activation" not in imported


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("choices")
    write_model(folder)
    (folder / "settings.yaml").write_text("scheduler: {tpot_ms: 77}\n", encoding="utf-8")
    (folder / "bad.yaml").write_text("scheduler: {tpot: 77}\n", encoding="utf-8")
    (folder / "serve.yaml").write_text("plugins: xllm\nmax-model-len: 64\n", encoding="utf-8")
    files = [str(folder), str(folder / "settings.yaml"), str(folder / "bad.yaml")]
    return run_child(PARSER + CHOICES, *files)


def _result(outcomes: Any, name: str) -> Any:
    assert outcomes[name]["error"] is None
    assert outcomes[name]["exit"] is None, outcomes[name]["stderr"]
    return outcomes[name]["result"]


def _decision(additional: Any, feature: str) -> Any:
    rows = additional["xllm_report"]["features"]
    return next(row for row in rows if row["feature"] == feature)


def test_choosing_nothing_leaves_the_environment_and_the_configuration_alone(outcomes: Any) -> None:
    assert set(_result(outcomes, "nothing").values()) == {False, None}
    plain = _result(outcomes, "plain")
    assert plain == {"scheduler_cls": None, "additional_config": {}}


def test_the_option_installs_the_rest_and_hands_itself_to_children(outcomes: Any) -> None:
    chosen = _result(outcomes, "xllm")
    assert chosen["wrapped"] is True
    assert chosen["XLLM_PLUGINS"] == "xllm"
    assert "xllm" in chosen["VLLM_PLUGINS"].split(",")
    assert "lora_filesystem_resolver" in chosen["VLLM_PLUGINS"].split(",")


def test_what_vllm_loads_only_by_name_is_not_named_by_us(outcomes: Any) -> None:
    # vLLM downloads LoRA adapters from the Hub only where an operator named this resolver.
    listed = _result(outcomes, "xllm")["VLLM_PLUGINS"].split(",")
    assert "lora_hf_hub_resolver" not in listed


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("unknown", "--plugins names 'xlm', which is not known; the nearest is xllm"),
        ("bad settings", "is not a setting; the nearest is scheduler.tpot_ms"),
        ("no such file", "--xllm-config is '/nowhere.yaml', which cannot be read"),
    ],
)
def test_a_bad_value_is_a_usage_error(outcomes: Any, name: str, sentence: str) -> None:
    assert outcomes[name]["exit"] == 2
    assert sentence in outcomes[name]["stderr"]


def test_settings_without_a_choice_stop_start_up(outcomes: Any) -> None:
    assert outcomes["settings alone"]["error"] == (
        "ConfigError: --xllm-config needs --plugins; allowed is --plugins xllm, for example."
    )


def test_the_configuration_carries_scheduler_settings_and_decisions(outcomes: Any) -> None:
    configured = _result(outcomes, "configured")
    assert configured["scheduler_cls"] == "xllm_scheduler.engine.scheduler.elastic_scheduler"
    additional = configured["additional_config"]
    assert additional["xllm"]["scheduler"]["tpot_ms"] == 77.0
    decision = _decision(additional, "scheduler")
    assert decision["active"] is True, decision["reason"]
    assert decision["attached_to"] == "vllm.v1.core.sched.scheduler.Scheduler"
    json.dumps(additional)  # vLLM hashes it as JSON


def test_a_scheduler_of_the_users_own_is_kept(outcomes: Any) -> None:
    kept = _result(outcomes, "left out")
    assert kept["scheduler_cls"] == "their.Own"
    decision = _decision(kept["additional_config"], "scheduler")
    assert (decision["active"], decision["reason"]) == (
        False,
        "--scheduler-cls their.Own is kept; scheduler.mode=on wraps it",
    )


def test_plugins_can_be_chosen_in_vllms_own_config_file(outcomes: Any) -> None:
    assert _result(outcomes, "yaml") == {"plugins": "xllm", "XLLM_PLUGINS": "xllm"}
