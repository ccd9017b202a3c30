"""Who makes what, agreed on through files: any number of workers on any machines that share the folder.

RUN/claims/KEY.N  the N-th worker that took the piece of work KEY; the last one has it
RUN/workers/ID.json  what a worker did so far; its age is the worker's sign of life

A file is created by linking it into place, which succeeds for one worker alone. What a dead worker held is
taken by creating the next N, so that no claim is ever replaced and nobody loses one that is alive.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from shared.errors import SettingError
from shared.files import machine, running, write_json
from shared.json_files import read_object

LEASE = 60.0  # seconds without a sign of life, by the shared folder's own clock, after which work is redone
BEATS = 6  # signs of life per lease


class Claims:
    """One worker's hold on pieces of work; a context manager that keeps its sign of life beating.

    `run` names what several workers do together; `tally` is what this worker tells the others.
    """

    def __init__(self, folder: Path, *, run: str = "", lease: float = LEASE) -> None:
        self.run = run or uuid.uuid4().hex
        self.lease = lease
        self.name = uuid.uuid4().hex
        self.tally: dict[str, Any] = {}
        self._claims, self._workers = folder / "claims", folder / "workers"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claims:
        self._claims.mkdir(parents=True, exist_ok=True)
        self.tell()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._file(self.name).is_file():  # nobody swept in the meantime
            self.tell(ended=True)

    def take(self, what: str) -> bool:
        """Is this piece of work now ours? False where another living worker has it."""
        number = 0
        while (path := self._path(what, number)).exists():
            number += 1
        if number and self._alive(_read(self._path(what, number - 1)).get("worker", "")):
            return False
        mine = self._claims / f".{self.name}"
        mine.write_text(json.dumps({"worker": self.name, "run": self.run, "what": what}), encoding="utf-8")
        try:
            os.link(mine, path)
        except FileExistsError:
            return False
        finally:
            mine.unlink(missing_ok=True)
        return True

    def release(self, what: str) -> None:
        """Give up what `take` gave, done or not."""
        number = 0
        while self._path(what, number + 1).exists():
            number += 1
        last = self._path(what, number)
        if _read(last).get("worker") == self.name:
            last.unlink(missing_ok=True)

    def deaths(self, what: str) -> int:
        """How many workers of this run had this piece of work and did not give it up, us included."""
        found, number = 0, 0
        while (path := self._path(what, number)).exists():
            found += _read(path).get("run") == self.run
            number += 1
        return found

    def tell(self, *, ended: bool = False, **news: Any) -> None:
        """Renew this worker's file, with `news` added to its tally."""
        self.tally |= news
        who = {"run": self.run, "machine": machine(), "process": os.getpid(), "ended": ended}
        write_json(self._file(self.name), {**who, "tally": self.tally})

    def tallies(self) -> list[dict[str, Any]]:
        """What each worker of this run has told, the dead included."""
        found = [_read(path) for path in sorted(self._workers.glob("*.json"))]
        return [worker["tally"] for worker in found if worker.get("run") == self.run]

    def others(self) -> bool:
        """Is another worker of this run still at it?"""
        names = [path.stem for path in self._workers.glob("*.json") if _read(path).get("run") == self.run]
        return any(self._alive(name) for name in names)

    def sweep(self) -> bool:
        """Remove all claims, unless a worker of another run is at work here: then False."""
        for path in self._workers.glob("*.json"):
            if _read(path).get("run") != self.run and self._alive(path.stem):
                return False
        for folder in (self._claims, self._workers):
            shutil.rmtree(folder, ignore_errors=True)
        return True

    def _alive(self, worker: str) -> bool:
        said = _read(self._file(worker))
        if not said or said.get("ended") or worker == self.name:
            return False
        if said.get("machine") == machine() and not running(said.get("process", 0)):
            return False
        with suppress(OSError):
            self._touch()  # so that both times are of one clock
            mine, other = (self._file(name).stat().st_mtime for name in (self.name, worker))
            return mine - other < self.lease
        return False

    def _beat(self) -> None:
        while not self._stop.wait(self.lease / BEATS):
            with suppress(OSError):  # the folder was removed, or its machine is away: not ours to report
                self._touch()

    def _touch(self) -> None:
        os.utime(self._file(self.name))

    def _file(self, worker: str) -> Path:
        return self._workers / f"{worker}.json"

    def _path(self, what: str, number: int) -> Path:
        return self._claims / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.{number}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, SettingError)
    except SettingError:
        return {}
