"""Reading public traces: what they say, and what is said of a line that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm_plugins.errors import ConfigError
from xllm_scheduler.simulate.traces import read_trace
from xllm_scheduler.simulate.workload import Ask


def written(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_mooncake_has_milliseconds_and_hash_ids(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "trace.jsonl",
        '{"timestamp": 1500, "input_length": 700, "output_length": 5, "hash_ids": [0, 4]}',
        '{"timestamp": 1000, "input_length": 600, "output_length": 7, "hash_ids": [0, 3]}',
    )
    assert read_trace(path) == [Ask(0.0, 600, 7, (0, 3)), Ask(0.5, 700, 5, (0, 4))]


def test_azure_has_timestamps_with_seven_digits(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "azure.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,4808,10",
        "2023-11-16 18:17:04.0319600,3180,8",
    )
    first, second = read_trace(path)
    assert (first, second.prompt_tokens) == (Ask(0.0, 4808, 10), 3180)
    assert second.at_s == pytest.approx(0.052)


def test_lengths_without_times_all_come_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "lengths.csv",
        "num_prefill_tokens,num_decode_tokens,pd_ratio",
        "3772,54,69.8",
        "2015,156,12.9",
    )
    assert read_trace(path) == [Ask(0.0, 3772, 54), Ask(0.0, 2015, 156)]


def test_an_answer_has_a_token_at_least(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", "prompt_tokens,output_tokens,at_s", "10,0,1.5")
    assert read_trace(path) == [Ask(0.0, 10, 1)]


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("t.jsonl", ["{}", "x"], "line 1: 'timestamp' is missing"),
        (
            "t.jsonl",
            ['{"timestamp": 0, "input_length": 1, "output_length": 1}', "x"],
            "line 2: Expecting value",
        ),
        ("t.jsonl", ["[1]"], "line 1"),
        ("t.csv", ["prompt_tokens,output_tokens", "12,5", "twelve,5"], "line 3: invalid literal"),
        ("t.csv", ["prompt_tokens,output_tokens", "12"], "line 2"),
        ("t.csv", ["prompt_tokens,output_tokens", "-1,5"], "the prompt's length is -1"),
        ("t.csv", ["a,b", "1,2"], "has the columns a, b; wanted"),
        ("t.csv", ["prompt_tokens,output_tokens"], "has no requests"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, lines: list[str], said: str
) -> None:
    path = written(tmp_path, name, *lines)
    with pytest.raises(ConfigError) as error:
        read_trace(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
