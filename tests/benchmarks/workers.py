"""What a worker process needs to build its models by itself: fakes that note every call in a file, and that
can take their process down. `python -m tests.benchmarks.workers FOLDER SEED` is one process of torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.engines import run_with
from benchmarks.storage import RunFolder
from benchmarks.suites import Suite
from shared.protocol import GenerationRequest, GenerationResult
from tests.benchmarks.fakes import FakeGenerator

SUITE = Suite(name="workers", models=("good", "poor"), num_prompts=6, num_clips=2)


class Noting(FakeGenerator):
    """Notes "MODEL SEED PROCESS" once a video is made. The first to make seed `fatal` dies in the middle."""

    def __init__(self, name: str, notes: Path, *, fatal: int = -1) -> None:
        super().__init__(name, kernel=None)
        self.notes, self.fatal = notes, fatal

    def generate(self, request: GenerationRequest) -> GenerationResult:
        time.sleep(0.05)  # long enough that several workers are at it
        died = self.notes.with_name("died")
        if request.seed == self.fatal and not died.exists():
            died.write_text(str(os.getpid()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        made = super().generate(request)
        with self.notes.open("a", encoding="utf-8") as notes:
            notes.write(f"{self.name} {request.seed} {os.getpid()}\n")
        return made


def noted(notes: Path) -> tuple[list[str], set[str]]:
    """What was made, sorted, and by which processes."""
    lines = [line.split() for line in notes.read_text(encoding="utf-8").splitlines()]
    return sorted(f"{model} {seed}" for model, seed, _ in lines), {process for *_, process in lines}


EVERYTHING = sorted(f"{model} {seed}" for model in SUITE.models for seed in range(SUITE.num_prompts))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    done = run_with(
        "torchrun",
        SUITE,
        RunFolder(path=folder / "run"),
        build=lambda name: Noting(name, folder / "notes", fatal=int(sys.argv[2])),
        quiet=True,
    )
    if done is not None:
        print(done.summary)
