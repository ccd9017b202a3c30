"""Rows of several processes beside one: a guided step of the diffusion transformer on two gloo processes.

Every process has one thread. What counts is the CPU time of the busiest, since the wall's says nothing where
others want the cores; with as many free cores the wall's ratio, which is kept too, is that less the waiting.
The processes are started once and wait between the rounds without work.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.diffusion import guided_step, ours_of, step_config
from benchmarks.peers.harness import Case, Pair, relative_difference
from shared.distributed import Launch, started

PROCESSES = 2
PATIENCE = 600.0  # seconds that a process waits for another
CUTS = {"guidance": {"guidance": 2, "sequence": 1}, "ulysses": {"guidance": 1, "sequence": 2}}


def cases() -> list[Case]:
    words = "the float32 step on two processes of one thread beside one process of one thread: "
    said = {"guidance": "each has one half of guidance", "ulysses": "each has half of the tokens and heads"}
    return [
        Case(
            name=f"diffusion/{cut}-2-processes",
            words=words + said[cut],
            build=partial(processes_pair, cut, tiny=False),
            kind="processes",
        )
        for cut in CUTS
    ]


def processes_pair(cut: str, *, tiny: bool) -> Pair:
    """`tiny`: a net that takes no time, for tests."""
    team = Team(cut, tiny)
    _, step = guided_step(*step_config(tiny=tiny), torch.float32, "cpu")
    return Pair(
        ours=team.step,
        peer=step,
        difference=lambda: relative_difference(team.step(), step()),
        close=team.close,
        busiest=lambda: max(team.seconds),
    )


class Team:
    """Processes that each hold the same net and make a step together when told to."""

    def __init__(self, cut: str, tiny: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.seconds: list[float] = []  # of CPU, that each took for the last step
        self.pipes: list[Connection] = []
        self.members: list[Any] = []
        for rank in range(PROCESSES):
            ours, theirs = context.Pipe()
            member = context.Process(
                target=work, args=(theirs, Path(self.folder.name), rank, cut, tiny), daemon=True
            )
            member.start()
            theirs.close()  # so that the end of the process ends the pipe
            self.pipes.append(ours)
            self.members.append(member)

    def step(self) -> Tensor:
        for pipe in self.pipes:
            pipe.send(True)
        results, self.seconds = map(list, zip(*(pipe.recv() for pipe in self.pipes), strict=True))
        return torch.from_numpy(results[0])

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for member in self.members:
            member.join(10)
            member.kill()
        self.folder.cleanup()


@torch.no_grad()
def work(pipe: Connection, folder: Path, rank: int, cut: str, tiny: bool) -> None:
    """One process: a step for every message, until there are no more. The first answers with its result."""
    torch.set_num_threads(1)
    parallel = ours_of("parallel")
    with started(Launch.from_file(folder / "store", rank, PROCESSES), "gloo", timeout=PATIENCE) as world:
        groups = parallel.InferenceGroups.of(world, clip=False, **CUTS[cut])
        share = partial(parallel.ParallelTransformer.of, groups=groups)
        _, step = guided_step(*step_config(tiny=tiny), torch.float32, "cpu", share=share)
        while _told(pipe):
            start = time.process_time()
            result = step()
            pipe.send((result.numpy() if rank == 0 else None, time.process_time() - start))


def _told(pipe: Connection) -> bool:
    try:
        return pipe.recv()
    except EOFError:
        return False
