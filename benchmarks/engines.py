"""Who makes the items of a run: this process, the processes of torchrun, or the workers of a Ray cluster.

All share one folder. Items are idempotent, so a worker that died leaves only what another has still to make.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.runner import Build, Outcome, Worker, make_share, run_suite, write_index
from benchmarks.storage import RunFolder
from benchmarks.suites import Suite, one_of
from shared.errors import SettingError

ENGINES = ("local", "torchrun", "ray")
RETRIES = 3  # of a share whose Ray worker died


def run_with(
    engine: str, suite: Suite, folder: RunFolder, *, build: Build, workers: int = 1, quiet: bool = False
) -> Outcome | None:
    """Run a suite with an engine. None in a torchrun process other than the first, which alone reports.

    `workers` is for Ray; torchrun brings its own number. Raises SettingError where the engine is not there.
    """
    match one_of("engine", engine, ENGINES):
        case "torchrun":
            return _torchrun(suite, folder, build, quiet)
        case "ray":
            return _ray(suite, folder, build, workers)
        case _:
            return run_suite(suite, folder, build=build, quiet=quiet)


def merged(outcomes: Iterable[Outcome]) -> Outcome:
    """The sum of what the workers did."""
    total = Outcome()
    for outcome in outcomes:
        total = replace(
            total,
            made=total.made + outcome.made,
            kept=total.kept + outcome.kept,
            remade=total.remade + outcome.remade,
            failed=total.failed | outcome.failed,
            models=total.models | outcome.models,
        )
    return total


def _torchrun(suite: Suite, folder: RunFolder, build: Build, quiet: bool) -> Outcome | None:
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        raise SettingError(
            "engine torchrun: start it as `torchrun --nproc_per_node N -m benchmarks run SUITE`"
        )
    dist.init_process_group("gloo")
    try:
        worker = Worker(index=dist.get_rank(), count=dist.get_world_size())
        own = make_share(suite, folder, build=build, worker=worker, quiet=quiet or worker.index > 0)
        outcomes: list[Any] = [None] * worker.count
        dist.all_gather_object(outcomes, own)
    finally:
        dist.destroy_process_group()
    if worker.index > 0:
        return None
    total = merged(outcomes)
    write_index(suite, folder, total)
    return total


def _ray(suite: Suite, folder: RunFolder, build: Build, workers: int) -> Outcome:
    try:
        import ray  # pyright: ignore[reportMissingImports]  (an optional extra)
    except ImportError as error:
        raise SettingError("engine ray needs the extra `ray` (pip install 'cogvideo-lab[ray]')") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    path = Path(folder.path).resolve()  # the workers start elsewhere

    @ray.remote(max_retries=RETRIES)
    def share(index: int) -> Outcome:
        worker = Worker(index=index, count=workers)
        return make_share(suite, RunFolder(path=path), build=build, worker=worker, quiet=True)

    total = merged(ray.get([share.remote(index) for index in range(workers)]))
    write_index(suite, folder, total)
    return total
