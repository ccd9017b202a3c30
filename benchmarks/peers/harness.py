"""Two ways to one result, timed turn by turn in one process, so that whatever slows the machine slows both.

The time that counts is the CPU time of this process (on a GPU the wall's): on a machine with other work, wall
time says little. A ratio is peer / ours; above 1 ours is the quicker, or the smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal

import torch

from shared.memory import peak_bytes

Run = Callable[[], Any]
LONG_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Our way and the peer's, ready to run. `difference`: how far the results are apart, relative to their
    size; `facts`: whatever else should be kept with the figures. Of them, `floor_seconds` is the least time
    that the memory allows, and `of_floor` its part of what ours took."""

    ours: Run
    peer: Run
    difference: Callable[[], float] | None = None
    close: Callable[[], None] = lambda: None  # what was started for it ends
    busiest: Callable[[], float] | None = None  # CPU seconds of our busiest process in the last run
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row. `build` makes the nets, only when the row is wanted; ImportError: the peer is not installed.
    "processes": ours takes several, and the CPU time of the busiest counts, without what it waits. `long`: a
    round takes minutes, thousands of steps; at most `LONG_ROUNDS` of them, and none to warm up."""

    name: str
    words: str
    build: Callable[[], Pair]
    kind: Literal["time", "processes", "memory"] = "time"
    device: Literal["cpu", "cuda"] = "cpu"
    long: bool = False


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of this process's CPU, and of the wall."""

    cpu: float
    wall: float


def seconds_of(run: Run, device: str) -> Seconds:
    """What one run takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return Seconds(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)


@torch.no_grad()
def measure(case: Case, repeats: int) -> dict[str, Any]:
    """The row of `case` as JSON values. A round runs both once; the first round only warms up."""
    pair = case.build()
    try:
        return _measured(case, pair, repeats)
    finally:
        pair.close()


def _measured(case: Case, pair: Pair, repeats: int) -> dict[str, Any]:
    row: dict[str, Any] = {"name": case.name, "kind": case.kind, "device": case.device, **pair.facts}
    if pair.difference is not None:
        row["difference"] = float(pair.difference())
    if case.kind == "memory":
        ours, peer = peak_bytes(pair.ours), peak_bytes(pair.peer)
        return row | {"ours_bytes": ours, "peer_bytes": peer, "ratio": peer / ours}
    count, warm_up = (min(repeats, LONG_ROUNDS), 0) if case.long else (repeats, 1)
    rounds = [(_ours(pair, case.device), seconds_of(pair.peer, case.device)) for _ in range(warm_up + count)]
    rounds = rounds[warm_up:]
    clock = clock_of(row)
    row |= _summary(rounds, clock)
    if "floor_seconds" in row:
        row["of_floor"] = row["floor_seconds"] / row[f"ours_{clock}"]
    return row


def clock_of(row: dict[str, Any]) -> str:
    """Whose time counts in a row."""
    return "wall" if row["device"] == "cuda" else "cpu"


def _ours(pair: Pair, device: str) -> Seconds:
    seconds = seconds_of(pair.ours, device)
    return seconds if pair.busiest is None else replace(seconds, cpu=pair.busiest())


def _summary(rounds: list[tuple[Seconds, Seconds]], clock: str) -> dict[str, Any]:
    """Medians by both clocks; the ratio of the medians, and the least and most of a round's ratio, by one."""
    medians = {
        f"{side}_{unit}": median(asdict(pair[i])[unit] for pair in rounds)
        for i, side in enumerate(("ours", "peer"))
        for unit in ("cpu", "wall")
    }
    ratios = sorted(getattr(peer, clock) / getattr(ours, clock) for ours, peer in rounds)
    ratio = medians[f"peer_{clock}"] / medians[f"ours_{clock}"]
    return {**medians, "rounds": len(rounds), "ratio": ratio, "spread": [ratios[0], ratios[-1]]}


def relative_difference(ours: torch.Tensor, peer: torch.Tensor) -> float:
    """|ours - peer| / |peer|, both as whole vectors."""
    peer = peer.double()
    return float((ours.double() - peer).norm() / peer.norm())
