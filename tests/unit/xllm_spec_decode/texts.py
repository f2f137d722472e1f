"""Requests of a step as drafters see them, made of plain lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm_spec_decode.drafters import Drafter, Drafts, Rows


def rows_of(
    texts: Sequence[Sequence[int]],
    *,
    prompts: Sequence[int] | None = None,
    known: Sequence[int] | None = None,
    tenants: Sequence[int] | None = None,
    slots: Sequence[int] | None = None,
) -> Rows:
    """One row for each text; all of it is new and output unless said otherwise."""
    n = len(texts)
    tokens = np.zeros((n, max(map(len, texts))), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text

    def column(values: Sequence[int] | None, default: Sequence[int]) -> np.ndarray:
        return np.array(default if values is None else values, np.int64)

    return Rows(
        tokens,
        rows=np.arange(n),
        slots=column(slots, range(n)),
        known=column(known, [0] * n),
        lengths=np.array([len(text) for text in texts], np.int64),
        prompts=column(prompts, [0] * n),
        tenants=column(tenants, [0] * n),
    )


def drafts_of(drafter: Drafter, rows: Rows, most: int = 8) -> list[list[int]]:
    """What a drafter proposes."""
    drafts = Drafts.empty(len(rows.rows), most)
    drafter.draft(rows, drafts)
    return [drafts.tokens[i, : drafts.lengths[i]].tolist() for i in range(len(rows.rows))]
