"""Files, batches and their requests, kept in SQLite, so that a restart goes on where it was.

A request's answer and the counts of its batch are written in one transaction: it is answered once,
or it is still to be asked.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  id TEXT PRIMARY KEY, filename TEXT, purpose TEXT, bytes INTEGER, created_at INTEGER);
CREATE TABLE IF NOT EXISTS batches (
  id TEXT PRIMARY KEY, endpoint TEXT, input_file_id TEXT, completion_window TEXT, metadata TEXT,
  status TEXT, created_at INTEGER, expires_at INTEGER, times TEXT, errors TEXT,
  output_file_id TEXT, error_file_id TEXT, total INTEGER DEFAULT 0, completed INTEGER DEFAULT 0,
  failed INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS requests (
  batch_id TEXT, line INTEGER, custom_id TEXT, body TEXT, answer TEXT, ok INTEGER,
  PRIMARY KEY (batch_id, line));
CREATE INDEX IF NOT EXISTS waiting ON requests (batch_id, line) WHERE answer IS NULL;
"""


@dataclass(frozen=True)
class Item:
    """A request of a batch.

    Attributes:
        batch_id: whose.
        line: of the input file, from 1.
        custom_id: the user's name for it.
        body: of the request, JSON.
    """

    batch_id: str
    line: int
    custom_id: str
    body: str


class BatchStore:
    """The store; may be called from several threads.

    Args:
        folder: where it is kept; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._files = folder / "files"
        self._files.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(folder / "batches.sqlite", check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Write everything and close."""
        with self._lock:
            self._db.close()

    # Files

    def add_file(self, filename: str, purpose: str, content: bytes) -> dict[str, Any]:
        """Keep a file; as OpenAI describes it."""
        name = f"file-{secrets.token_hex(12)}"
        path = self._files / name
        path.with_suffix(".part").write_bytes(content)
        path.with_suffix(".part").rename(path)
        with self._written() as db:
            db.execute(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?)",
                (name, filename, purpose, len(content), int(time.time())),
            )
        found = self.file(name)
        assert found is not None
        return found

    def file(self, name: str) -> dict[str, Any] | None:
        """A file's description; None if there is none."""
        rows = self._rows("SELECT * FROM files WHERE id = ?", name)
        return {**dict(rows[0]), "object": "file"} if rows else None

    def files(self) -> list[dict[str, Any]]:
        """All, newest first."""
        rows = self._rows("SELECT * FROM files ORDER BY created_at DESC, rowid DESC")
        return [{**dict(row), "object": "file"} for row in rows]

    def content(self, name: str) -> bytes:
        """What stands in a file."""
        return (self._files / name).read_bytes()

    def remove_file(self, name: str) -> None:
        """Forget a file."""
        with self._written() as db:
            db.execute("DELETE FROM files WHERE id = ?", (name,))
        (self._files / name).unlink(missing_ok=True)

    # Batches

    def add_batch(
        self,
        endpoint: str,
        input_file_id: str,
        window: str,
        window_s: int,
        metadata: Mapping[str, str] | None,
        items: Sequence[Item],
        errors: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Begin a batch, or note why it cannot be."""
        name, now = f"batch_{secrets.token_hex(12)}", int(time.time())
        status = "failed" if errors else "in_progress"
        times = {"failed_at" if errors else "in_progress_at": now}
        with self._written() as db:
            db.execute(
                "INSERT INTO batches (id, endpoint, input_file_id, completion_window, metadata, "
                "status, created_at, expires_at, times, errors, total) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (name, endpoint, input_file_id, window, json.dumps(metadata), status, now,
                 now + window_s, json.dumps(times), json.dumps(list(errors)), len(items)),
            )  # fmt: skip
            if not errors:
                db.executemany(
                    "INSERT INTO requests (batch_id, line, custom_id, body) VALUES (?, ?, ?, ?)",
                    [(name, item.line, item.custom_id, item.body) for item in items],
                )
        found = self.batch(name)
        assert found is not None
        return found

    def batch(self, name: str) -> dict[str, Any] | None:
        """A batch as OpenAI describes it; None if there is none."""
        rows = self._rows("SELECT * FROM batches WHERE id = ?", name)
        return _described(rows[0]) if rows else None

    def batches(self, limit: int, after: str = "") -> list[dict[str, Any]]:
        """The newest, or those older than ``after``."""
        rows = self._rows(
            "SELECT * FROM batches WHERE ? = '' OR rowid < "
            "(SELECT rowid FROM batches WHERE id = ?) ORDER BY rowid DESC LIMIT ?",
            after,
            after,
            limit,
        )
        return [_described(row) for row in rows]

    def open_batches(self) -> list[dict[str, Any]]:
        """Those that are not over, oldest first."""
        marks = ",".join("?" * len(OPEN))
        sql = f"SELECT * FROM batches WHERE status IN ({marks}) ORDER BY rowid"  # noqa: S608
        return [_described(row) for row in self._rows(sql, *OPEN)]

    def waiting(self, batch_id: str, limit: int, after_line: int) -> list[Item]:
        """Requests that have no answer yet, in order, behind a line."""
        rows = self._rows(
            "SELECT batch_id, line, custom_id, body FROM requests "
            "WHERE batch_id = ? AND answer IS NULL AND line > ? ORDER BY line LIMIT ?",
            batch_id,
            after_line,
            limit,
        )
        return [Item(*row) for row in rows]

    def answered(self, item: Item, answer: Mapping[str, Any], *, ok: bool) -> None:
        """Keep a request's answer; one that has one already keeps that."""
        column = "completed" if ok else "failed"
        with self._written() as db:
            changed = db.execute(
                "UPDATE requests SET answer = ?, ok = ? "
                "WHERE batch_id = ? AND line = ? AND answer IS NULL",
                (json.dumps(answer), ok, item.batch_id, item.line),
            ).rowcount
            if changed:
                sql = f"UPDATE batches SET {column} = {column} + 1 WHERE id = ?"  # noqa: S608
                db.execute(sql, (item.batch_id,))

    def set_status(self, name: str, status: str) -> None:
        """A batch has come to a status now."""
        with self._written() as db:
            row = db.execute("SELECT times FROM batches WHERE id = ?", (name,)).fetchone()
            times = {**json.loads(row["times"]), f"{status}_at": int(time.time())}
            db.execute(
                "UPDATE batches SET status = ?, times = ? WHERE id = ?",
                (status, json.dumps(times), name),
            )

    def finish(self, name: str, status: str) -> None:
        """Write a batch's output files and end it; may be done again after a crash.

        What was not asked before a batch expired or was cancelled stands in its error file.
        """
        rows = self._rows(
            "SELECT custom_id, answer, ok FROM requests WHERE batch_id = ? ORDER BY line", name
        )
        ids: dict[str, str | None] = {"output_file_id": None, "error_file_id": None}
        for column, ok, kind in (("output_file_id", 1, "output"), ("error_file_id", 0, "error")):
            lines = [
                row["answer"] or _not_asked(row["custom_id"], status)
                for row in rows
                if (row["ok"] or 0) == ok
            ]
            if lines:
                content = "".join(line + "\n" for line in lines).encode()
                ids[column] = self.add_file(f"{name}_{kind}.jsonl", "batch_output", content)["id"]
        with self._written() as db:
            db.execute(
                "UPDATE batches SET output_file_id = ?, error_file_id = ? WHERE id = ?",
                (ids["output_file_id"], ids["error_file_id"], name),
            )
        self.set_status(name, status)

    def _rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def _written(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._db:
            yield self._db


def _not_asked(custom_id: str, status: str) -> str:
    message = f"The batch was {status} before this request was answered."
    error = {"code": f"batch_{status}", "message": message}
    made = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id}
    return json.dumps({**made, "response": None, "error": error})


_TIMES = (
    "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at",
    "cancelled_at",
)  # fmt: skip


def _described(row: sqlite3.Row) -> dict[str, Any]:
    errors = json.loads(row["errors"])
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": row["input_file_id"],
        "completion_window": row["completion_window"],
        "status": row["status"],
        "output_file_id": row["output_file_id"],
        "error_file_id": row["error_file_id"],
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        **{name: json.loads(row["times"]).get(name) for name in _TIMES},
        "request_counts": {
            "total": row["total"],
            "completed": row["completed"],
            "failed": row["failed"],
        },
        "metadata": json.loads(row["metadata"]),
    }
