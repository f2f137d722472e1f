"""Reads the public traces: Mooncake's JSONL, Azure's CSV, and CSV files of lengths."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from xllm_plugins.errors import ConfigError
from xllm_scheduler.simulate.workload import Ask

# The columns of known CSV files: prompt, output and, where there is one, time.
_COLUMNS = (
    ("ContextTokens", "GeneratedTokens", "TIMESTAMP"),
    ("num_prefill_tokens", "num_decode_tokens", "arrived_at"),
    ("prompt_tokens", "output_tokens", "at_s"),
)


def read_trace(path: Path) -> list[Ask]:
    """The requests of a trace, in order of time; the first comes at 0.

    ``.jsonl`` is Mooncake's form: ``timestamp`` (ms), ``input_length``, ``output_length`` and,
    optionally, ``hash_ids``. Anything else is CSV: Azure's ``TIMESTAMP, ContextTokens,
    GeneratedTokens``, Vidur's ``num_prefill_tokens, num_decode_tokens`` with or without
    ``arrived_at``, or ``prompt_tokens, output_tokens, at_s``. Without times all come at 0, as in a
    backlog.

    Raises:
        ConfigError: the file cannot be read, or a line of it; the message names the line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            read = _mooncake if path.suffix == ".jsonl" else _csv
            asks = read(path, lines)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The trace {path} cannot be read: {error}") from error
    if not asks:
        raise ConfigError(f"The trace {path} has no requests.")
    asks.sort(key=lambda ask: ask.at_s)
    start_s = asks[0].at_s
    return [ask._replace(at_s=ask.at_s - start_s) for ask in asks]


def _mooncake(path: Path, lines: Iterable[str]) -> list[Ask]:
    asks = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            asks.append(_parsed(path, number, line, _mooncake_ask))
    return asks


def _mooncake_ask(line: str) -> Ask:
    row = json.loads(line)
    ids = tuple(int(i) for i in row.get("hash_ids", ()))
    return Ask(row["timestamp"] / 1e3, row["input_length"], row["output_length"], ids)


def _csv(path: Path, lines: Iterable[str]) -> list[Ask]:
    reader = csv.DictReader(lines)
    names = reader.fieldnames or []
    known = next((c for c in _COLUMNS if c[0] in names and c[1] in names), None)
    if known is None:
        wanted = " or ".join(f"{c[0]}, {c[1]}" for c in _COLUMNS)
        raise ConfigError(f"The trace {path} has the columns {', '.join(names)}; wanted {wanted}.")
    prompt, output, time = known

    def ask(row: Mapping[str, str]) -> Ask:
        at_s = _seconds(row[time]) if row.get(time) else 0.0
        return Ask(at_s, int(row[prompt]), int(row[output]))

    return [_parsed(path, reader.line_num, row, ask) for row in reader]


def _parsed(path: Path, number: int, source: Any, parse: Callable[[Any], Ask]) -> Ask:
    try:
        ask = parse(source)
    except KeyError as error:
        raise ConfigError(f"{path}, line {number}: {error} is missing.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}, line {number}: {error}.") from error
    # Some traces have requests without an answer; a server generates one token at least.
    ask = ask._replace(output_tokens=max(1, ask.output_tokens))
    if not (isinstance(ask.prompt_tokens, int) and ask.prompt_tokens > 0):
        raise ConfigError(
            f"{path}, line {number}: the prompt's length is {ask.prompt_tokens!r}; "
            "allowed are whole numbers above 0."
        )
    return ask


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        whole, _, fraction = text.partition(".")  # Azure's has more digits than Python reads
        moment = datetime.fromisoformat(whole).replace(tzinfo=timezone.utc)
        return moment.timestamp() + float(f"0.{fraction or 0}")
