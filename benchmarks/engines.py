"""Who makes the items of a run: this process, the processes of torchrun, or the workers of a Ray cluster.

All share one folder and agree through it (`benchmarks.claims`): nothing is made twice, and what a dead worker
held is made by another.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from benchmarks.claims import Claims
from benchmarks.runner import Build, conclude, make_share, run_suite
from benchmarks.storage import RunFolder
from benchmarks.suites import Suite, one_of
from benchmarks.work import Outcome
from shared.errors import SettingError, UserError

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


def _torchrun(suite: Suite, folder: RunFolder, build: Build, quiet: bool) -> Outcome | None:
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        raise SettingError(
            "engine torchrun: start it as `torchrun --nproc_per_node N -m benchmarks run SUITE`"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    # no process group: a restart would have to rebuild it
    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives the processes
    if rank == 0:
        store.set(f"run {attempt}", os.urandom(16).hex())
    with Claims(folder.path, run=store.get(f"run {attempt}").decode()) as claims:
        store.set(f"ready {attempt} {rank}", "yes")
        store.wait(
            [f"ready {attempt} {other}" for other in range(world)]
        )  # all are known before the first can be done
        make_share(suite, folder, build=build, claims=claims, quiet=quiet or rank > 0)
        if rank > 0:
            return None
        return conclude(suite, folder, claims)


def _ray(suite: Suite, folder: RunFolder, build: Build, workers: int) -> Outcome:
    try:
        import ray  # pyright: ignore[reportMissingImports]  (an optional extra)
    except ImportError as error:
        raise SettingError("engine ray needs the extra `ray` (pip install 'cogvideo-lab[ray]')") from error
    ours = not ray.is_initialized()
    if ours:  # joins the cluster that RAY_ADDRESS names, else starts one on this machine
        local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, **local)
    try:
        return _on_cluster(ray, suite, folder, build, workers)
    finally:
        if ours:
            ray.shutdown()


def _on_cluster(ray: Any, suite: Suite, folder: RunFolder, build: Build, workers: int) -> Outcome:
    path = Path(folder.path).resolve()  # the workers start elsewhere
    gpus = 1 if ray.cluster_resources().get("GPU") else 0

    @ray.remote(max_retries=RETRIES, num_gpus=gpus)
    def share(run: str) -> None:
        with Claims(path, run=run) as claims:
            make_share(suite, RunFolder(path=path), build=build, claims=claims, quiet=True)

    with Claims(folder.path) as claims:
        try:
            ray.get([share.remote(claims.run) for _ in range(workers)])
        except ray.exceptions.RayTaskError as error:  # of our own code: the cause says it in one line
            raise error.cause if isinstance(error.cause, UserError) else error from None
        except ray.exceptions.WorkerCrashedError as error:
            raise UserError(
                f"a Ray worker died {RETRIES + 1} times; what was finished is kept: run it again"
            ) from error
        return conclude(suite, folder, claims)
