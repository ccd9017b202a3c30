"""Processes that work on one thing together: who they are, how they start, and exact exchanges between them.

Everything takes the group it acts on as a `ParallelContext`; nothing here is remembered between calls. The
exchanges are for inference: gradients do not pass between processes, and tensors that want them are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from shared.errors import SettingError

Backend = Literal["auto", "gloo", "nccl"]
Shape = Sequence[int]


# ---- arithmetic


def part_sizes(total: int, degree: int) -> tuple[int, ...]:
    """`total` things in `degree` runs as equal as can be; a remainder goes to the first (7, 3: 3, 2, 2)."""
    return tuple(total // degree + (place < total % degree) for place in range(degree))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def check_degree(what: str, degree: int, legal: Sequence[int]) -> None:
    """SettingError that lists the legal degrees, unless `degree` is one."""
    if degree not in legal:
        nearest = min(legal, key=lambda d: abs(d - degree))
        listed = ", ".join(map(str, legal))
        raise SettingError(f"{what}: {degree} processes are not legal; legal: {listed} (nearest {nearest})")


def group_ranks(size: int, degree: int, stride: int = 1) -> list[tuple[int, ...]]:
    """`size` ranks in groups of `degree` ranks that are `stride` apart (4, 2, 2: (0, 2), (1, 3)).

    SettingError where they do not come out even.
    """
    check_degree(f"groups in {size} processes", degree * stride, divisors(size))
    starts = (start for block in range(0, size, degree * stride) for start in range(block, block + stride))
    return [tuple(range(start, start + degree * stride, stride)) for start in starts]


# ---- groups


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """Processes that share one piece of work: `ranks` are their numbers in the world, `rank` this one's place
    among them."""

    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    group: dist.ProcessGroup | None = None  # None: a process on its own

    @property
    def degree(self) -> int:
        return len(self.ranks)

    @property
    def is_last(self) -> bool:
        return self.rank == self.degree - 1

    def split(self, degree: int, stride: int = 1) -> ParallelContext:
        """The group, of `degree` ranks `stride` apart, that this process is in.

        Every process of the context must call it, in the same order. SettingError lists the legal degrees.
        """
        own = self
        for places in group_ranks(self.degree, degree, stride):
            ranks = tuple(self.ranks[place] for place in places)
            group = dist.new_group(list(ranks)) if degree > 1 else None  # torch wants it called by all
            if self.rank in places and not isinstance(group, int):  # an int says: not a member
                own = ParallelContext(ranks=ranks, rank=places.index(self.rank), group=group)
        return own


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Who this process is among those that were started together."""

    rank: int
    world_size: int
    local_rank: int = 0  # among those on this machine: its GPU
    init_method: str = "env://"  # or file://PATH, a file that is not there yet

    @classmethod
    def from_torchrun(cls, environment: Mapping[str, str]) -> Launch:
        """From the variables that torchrun sets, e.g. `os.environ`; SettingError where one is missing."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in environment]
        if missing:
            raise SettingError(
                f"{', '.join(missing)} not set; start with: torchrun --nproc-per-node N -m ..."
            )
        rank, world_size, local_rank = (int(environment[name]) for name in names[:3])
        return cls(rank=rank, world_size=world_size, local_rank=local_rank)

    @classmethod
    def from_file(cls, store: Path, rank: int, world_size: int) -> Launch:
        """On one machine without torchrun: the processes meet in the file `store`, which is not there yet."""
        return cls(rank=rank, world_size=world_size, local_rank=rank, init_method=store.absolute().as_uri())


@contextmanager
def started(launch: Launch, backend: Backend = "auto", *, timeout: float = 600) -> Iterator[ParallelContext]:
    """The context of all processes within the block; ended after it. Blocks until all are there.

    "auto" is nccl where this process has a GPU of its own, else gloo. A process that waits longer than
    `timeout` seconds for another fails.
    """
    has_gpu = launch.local_rank < torch.cuda.device_count()
    name = ("nccl" if has_gpu else "gloo") if backend == "auto" else backend
    if name not in ("gloo", "nccl"):
        raise SettingError(f"unknown backend {name!r}; legal: auto, gloo, nccl")
    if name == "nccl":
        if not has_gpu:
            raise SettingError(
                f"nccl needs a GPU per process: no GPU {launch.local_rank} here, "
                f"{torch.cuda.device_count()} in all; legal: gloo"
            )
        torch.cuda.set_device(launch.local_rank)
    dist.init_process_group(
        name,
        init_method=launch.init_method,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        ranks = tuple(range(launch.world_size))
        yield ParallelContext(ranks=ranks, rank=launch.rank, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


# ---- exchanges; with one process each of them is the identity


def all_to_all(parts: Sequence[Tensor], shapes: Sequence[Shape], context: ParallelContext) -> list[Tensor]:
    """Send `parts[i]` to rank i and get from it the i-th result, of shape `shapes[i]`. Sizes may differ."""
    if context.degree == 1:
        _refuse_gradients(*parts)
        return list(parts)
    return all_to_all_stacked([(part,) for part in parts], shapes, context)


def all_to_all_stacked(
    parts: Sequence[Sequence[Tensor]], shapes: Sequence[Shape], context: ParallelContext
) -> list[Tensor]:
    """As `all_to_all` with several tensors for each rank, one behind the other; each is copied once."""
    tensors = [x for part in parts for x in part]
    _refuse_gradients(*tensors)
    sent = tensors[0].new_empty(sum(x.numel() for x in tensors))
    for x, room in zip(tensors, sent.split([x.numel() for x in tensors]), strict=True):
        room.view(x.shape).copy_(x)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    received = sent.new_empty(sum(sizes))
    # the single-tensor form is the one that gloo has always had, with uneven sizes as well
    counts = [sum(x.numel() for x in part) for part in parts]
    dist.all_to_all_single(received, sent, sizes, counts, group=context.group)
    return [x.view(*shape) for x, shape in zip(received.split(sizes), shapes, strict=True)]


def gather_parts(x: Tensor, context: ParallelContext, shapes: Sequence[Shape] | None = None) -> list[Tensor]:
    """The `x` of every rank, in order, on every rank; they may differ in size, not in their number of axes.

    Where all `shapes` are known, passing them saves an exchange.
    """
    _refuse_gradients(x)
    if context.degree == 1:
        return [x]
    if shapes is None:
        own = torch.tensor(x.shape, device=x.device)
        shapes = [shape.tolist() for shape in _all_gather(own, context)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    padded = x.new_zeros(max(sizes))  # gloo refuses unequal sizes
    padded[: x.numel()] = x.flatten()
    everyone = zip(_all_gather(padded, context), sizes, shapes, strict=True)
    return [flat[:size].view(*shape) for flat, size, shape in everyone]


def sum_over(x: Tensor, context: ParallelContext) -> Tensor:
    """Sum of the ranks' `x`, taken and returned in float32."""
    _refuse_gradients(x)
    total = x.to(torch.float32, copy=True).contiguous()
    if context.degree > 1:
        dist.all_reduce(total, group=context.group)
    return total


def exchange(
    context: ParallelContext,
    *,
    send: Mapping[int, Tensor] | None = None,
    receive: Mapping[int, Tensor] | None = None,
) -> None:
    """Send tensors to other places of the context and fill contiguous buffers from others, all at once.

    Returns when all is done: a handle that is dropped cancels its message, and the receiver waits for ever.
    """
    send = {place: x.contiguous() for place, x in (send or {}).items()}
    _refuse_gradients(*send.values())
    moves = [(dist.isend, place, x) for place, x in send.items()]
    moves += [(dist.irecv, place, x) for place, x in (receive or {}).items()]
    operations = [dist.P2POp(move, x, context.ranks[place], context.group) for move, place, x in moves]
    handles = dist.batch_isend_irecv(operations) if operations else []
    for handle in handles:
        handle.wait()


def _all_gather(x: Tensor, context: ParallelContext) -> list[Tensor]:
    everyone = [torch.empty_like(x) for _ in context.ranks]
    dist.all_gather(everyone, x, group=context.group)
    return everyone


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError("gradients do not pass between processes: run this under torch.no_grad()")
