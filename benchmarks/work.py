"""Pieces of work, shared by any number of workers: each is made once, and again where its worker died."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.claims import Claims
from benchmarks.metrics import digest
from benchmarks.storage import read_json
from shared.errors import UserError
from shared.files import write_json
from shared.interruptions import raise_if_interrupted

POLL = 0.1  # seconds between two looks at what others are making
DEATHS = 3  # of workers that were making an item, after which it counts as failed


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work: its name (MODEL/ID), whether it is done, how to do it, and was it there before?"""

    name: str
    done: Callable[[], bool]
    make: Callable[[], None]
    again: bool = False


@dataclass(kw_only=True)
class Outcome:
    """What a run did.

    `remade` items were there with other settings; `failed` maps MODEL/ID to the reason; `models` holds of
    each model its settings, their hash, its tasks and codec.
    """

    made: int = 0
    kept: int = 0
    remade: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        if not self.made and not self.failed:
            return f"nothing to do: all {self.kept} items are finished with these settings"
        words = [f"{self.made} items made", f"{self.kept} kept"]
        words += [f"{self.remade} of them again, because their settings changed"] if self.remade else []
        words += [f"{len(self.failed)} failed"] if self.failed else []
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Where one worker takes its work from, and notes what came of it."""

    claims: Claims
    failures: Path
    quiet: bool = False

    def work_off(self, tasks: list[Task], title: str = "") -> None:
        """Return when every task is done, here or elsewhere, or has failed in this run."""
        waiting = [task for task in tasks if not self.settled(task)]
        for task in tasks:
            if task.done():
                self._failure_path(task.name).unlink(missing_ok=True)  # of other settings, or mended
        bar = tqdm(desc=title, total=len(waiting), disable=self.quiet or not (waiting and title))
        with bar:
            while waiting:
                held = []
                for task in waiting:
                    if self._attempt(task):
                        bar.update()
                    else:
                        held.append(task)
                waiting = [task for task in held if not self.settled(task)]
                bar.update(bar.total - len(waiting) - bar.n)
                if waiting:
                    time.sleep(POLL)

    def settled(self, task: Task) -> bool:
        return task.done() or self._failure(task.name).get("run") == self.claims.run

    def _attempt(self, task: Task) -> bool:
        """Make the task, unless another worker has it: then False."""
        if not self.claims.take(task.name):
            return False
        try:
            if not self.settled(task):  # it may have been made since we looked
                self._make(task)
        finally:
            self.claims.release(task.name)
        return True

    def _make(self, task: Task) -> None:
        if (dead := self.claims.deaths(task.name) - 1) >= DEATHS:
            note_failure(self.failures, task.name, f"{dead} workers died making it", self.claims.run)
            return
        try:
            task.make()
        except (UserError, ValueError, RuntimeError) as error:  # of this item; the others are worth making
            raise_if_interrupted(error)
            note_failure(self.failures, task.name, f"{type(error).__name__}: {error}", self.claims.run)
            return
        self._failure_path(task.name).unlink(missing_ok=True)
        tally = self.claims.tally
        self.claims.tell(made=tally.get("made", 0) + 1, remade=tally.get("remade", 0) + task.again)

    def suspect(self, name: str) -> bool:
        """Did this item fail before?"""
        return self._failure_path(name).is_file()

    def _failure(self, name: str) -> dict[str, Any]:
        path = self._failure_path(name)
        return read_json(path) if path.is_file() else {}

    def _failure_path(self, name: str) -> Path:
        return failure_path(self.failures, name)


def failure_path(folder: Path, name: str) -> Path:
    return folder / f"{digest(name)[:32]}.json"


def note_failure(folder: Path, name: str, reason: str, run: str = "") -> None:
    """Say why an item is not there; the next run looks at it again."""
    write_json(failure_path(folder, name), {"item": name, "run": run, "reason": reason})


def failures(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Why items among `names` are not there."""
    paths = {name: failure_path(folder, name) for name in names}
    return {name: read_json(path)["reason"] for name, path in paths.items() if path.is_file()}


def outcome_of(claims: Claims, names: Iterable[str], folder: Path) -> Outcome:
    """What all workers of a run did together with the work `names`."""
    total = Outcome()
    for tally in claims.tallies():
        total = replace(
            total,
            made=total.made + tally.get("made", 0),
            remade=total.remade + tally.get("remade", 0),
            models=total.models | tally.get("models", {}),
        )
    names = list(names)
    failed = failures(folder, names)
    return replace(total, failed=failed, kept=len(names) - total.made - len(failed))
