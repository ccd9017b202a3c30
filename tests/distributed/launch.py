"""Run a function or a program on several gloo processes of this machine, and never wait for ever. Not a test
file."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shared.distributed import Launch, ParallelContext, started

Worker = Callable[[ParallelContext], Any]
ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run_program(*words: object, processes: int = 1) -> str:
    """What `python -m WORDS` says on stdout, by itself or under torchrun, if it ends well."""
    launcher = (*TORCHRUN, str(processes)) if processes > 1 else ()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_ranks(worker: Worker, folder: Path, *, world_size: int = 2, timeout: float = 180) -> list[Any]:
    """What `worker(world)`, a module's own function, returns in each process, in the order of the ranks.

    A process that fails, or has not ended after `timeout` seconds, fails the test with its traceback.
    """
    server = multiprocessing.get_context("forkserver")  # imports once, for all tests of this process
    server.set_forkserver_preload(["cogvideox_diff.parallel"])
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        server.Process(target=_run, args=(worker, folder, rank, world_size, timeout), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        _wait(processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
    errors = sorted(folder.glob("error-*.txt"))
    assert not errors, "\n".join(path.read_text(encoding="utf-8") for path in errors)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world_size, f"exit codes {codes} (negative: killed after {timeout} s)"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _wait(processes: list[Any], deadline: float) -> None:
    """Until all have ended or one has failed: the others would only wait for it."""
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            return
        time.sleep(0.02)


def _run(worker: Worker, folder: Path, rank: int, world_size: int, timeout: float) -> None:
    torch.set_num_threads(1)
    try:
        launch = Launch.from_file(folder / "store", rank, world_size)
        with started(launch, "gloo", timeout=timeout) as world, torch.no_grad():
            torch.save(worker(world), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise
