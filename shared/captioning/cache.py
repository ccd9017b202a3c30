"""Finished answers, kept in a file per clip: a run that was killed asks nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.captioning.protocols import Recipe
from shared.errors import OutputPathError
from shared.json_files import parse_json


class CaptionCache:
    """`folder/ab/abcd....jsonl` holds the answers on the content abcd..., an object a line: the key, and to
    be read by people, stage, recipe, inputs and text. A line is on the disk before `answer` returns; half a
    line, left by a process that was killed, is passed over. Threads may share it; counts are of this run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.num_asked = 0
        self.num_kept = 0
        self._lock = threading.Lock()
        self._busy: dict[str, threading.Lock] = {}

    @contextmanager
    def alone(self, content: str) -> Iterator[None]:
        """One thread at a time for one content, so that copies of a clip are asked about once."""
        with self._lock:
            busy = self._busy.setdefault(content, threading.Lock())
        with busy:
            yield

    def answer(
        self,
        content: str,
        stage: str,
        recipe: Recipe,
        inputs: Mapping[str, Any],
        ask: Callable[[], str],
        *,
        counted: bool = True,
    ) -> str:
        """The kept answer, or that of `ask`, which is then kept. What `ask` raises is not kept."""
        key = _key(content, stage, recipe, inputs)
        kept = self._read(content).get(key)
        if kept is not None:
            self._count(kept=int(counted))
            return kept
        self._count(asked=int(counted))
        text = ask()
        row = {"key": key, "stage": stage, "recipe": dict(recipe), "inputs": dict(inputs), "text": text}
        self._append(self._path(content), json.dumps(row, ensure_ascii=False))
        return text

    def _count(self, *, asked: int = 0, kept: int = 0) -> None:
        with self._lock:
            self.num_asked += asked
            self.num_kept += kept

    def _path(self, content: str) -> Path:
        return self.folder / content[:2] / f"{content}.jsonl"

    def _read(self, content: str) -> dict[str, str]:
        try:
            data = self._path(content).read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OutputPathError(f"cannot read {self._path(content)}: {error.strerror or error}") from error
        rows = [_parsed(line) for line in data.split(b"\n")]
        return {row["key"]: row["text"] for row in rows if row is not None}

    def _append(self, path: Path, line: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else "\n" + line
                file.write(f"{line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputPathError(f"cannot write {path}: {error.strerror or error}") from error


def _key(content: str, stage: str, recipe: Recipe, inputs: Mapping[str, Any]) -> str:
    text = json.dumps([content, stage, recipe, inputs], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:  # empty, or cut off
        return None
    texts = isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("text"), str)
    return row if texts else None
