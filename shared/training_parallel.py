"""Training on several processes: who takes which micro-batches, and how gradients and parameters meet.

A step has `accumulation` micro-batches however many processes there are; process r of n takes r, r + n, and
so on. As a micro-batch is a function of its number, any number of processes learns from the same batches.

`ddp` keeps everything whole everywhere and sums the gradients; `fsdp` (torch's FSDP2) shards parameters,
gradients, optimizer and average over the processes and gathers a block's parameters while it runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.distributed import Launch, ParallelContext, check_degree, divisors, started
from shared.errors import SettingError
from shared.offload import blocks_of, is_called
from shared.training_memory import Recompute

Parallelism = Literal["none", "ddp", "fsdp"]
PARALLEL = ("none", "ddp", "fsdp")
BUCKET = 25_000_000  # elements of gradients that travel at once
PATIENCE = timedelta(days=30)  # one process may do a whole stage alone while the others wait


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a run is carried out. Nothing of it changes what is learnt, but for rounding.

    `control` is a group for numbers and objects in CPU memory; None for a process on its own. `device` None:
    the model stays where it is.
    """

    parallel: Parallelism = "none"
    world: ParallelContext = field(default_factory=ParallelContext)
    control: dist.ProcessGroup | None = None
    device: torch.device | None = None
    activation_checkpointing: Recompute = "none"

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all have in common."""
        return self.world.rank == 0

    @property
    def is_spread(self) -> bool:
        return self.parallel != "none"

    def micro_steps(self, step: int, accumulation: int) -> range:
        """Numbers of this process's micro-batches of a step, counted over all steps; SettingError lists how
        many processes `accumulation` can be dealt out to."""
        degree, first = self.world.degree, step * accumulation
        check_degree(f"accumulation={accumulation} in --parallel", degree, divisors(accumulation))
        return range(first + self.world.rank, first + accumulation, degree)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def total(self, value: float) -> float:
        """Sum of the processes' values."""
        if self.control is None:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return float(total)

    def totals(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum by name; names may differ between the processes."""
        everyone: list[Any] = [dict(values)] * self.world.degree
        if self.control is not None:
            dist.all_gather_object(everyone, dict(values), group=self.control)
        names = dict.fromkeys(name for one in everyone for name in one)
        return {name: sum(one.get(name, 0.0) for one in everyone) for name in names}


@contextmanager
def started_strategy(
    parallel: Parallelism,
    environment: Mapping[str, str],
    *,
    activation_checkpointing: Recompute = "none",
    device: torch.device | None = None,
) -> Iterator[Strategy]:
    """The strategy of this process within the block; `environment` has torchrun's variables where `parallel`
    asks for several processes. On CUDA each process has the GPU of its local rank."""
    if parallel == "none":
        if (size := int(environment.get("WORLD_SIZE", "1"))) > 1:
            raise SettingError(f"{size} processes were started: --parallel ddp or fsdp says how they share")
        yield Strategy(device=device, activation_checkpointing=activation_checkpointing)
        return
    launch = Launch.from_torchrun(environment)
    on_gpu = device is not None and device.type == "cuda"
    with started(launch, "nccl" if on_gpu else "gloo") as world, warnings.catch_warnings():
        # nets may end in a view; losses never change it in place, which is what FSDP warns of
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert not isinstance(control, int)  # that would say: not a member
        yield Strategy(
            parallel=parallel,
            world=world,
            control=control,
            device=torch.device("cuda", launch.local_rank) if on_gpu else device,
            activation_checkpointing=activation_checkpointing,
        )


ALONE = Strategy()


# ---- models


def place(model: nn.Module, strategy: Strategy) -> None:
    """Move the model to its device and, with fsdp, shard it in place: every block and, for what is left,
    every net. All processes must come with equal weights; ValueError where they do not."""
    if strategy.is_spread:
        _require_equal(model, strategy)
    if strategy.parallel == "fsdp":
        _shard(model, strategy)
    elif strategy.device is not None:
        model.to(strategy.device)


def _require_equal(model: nn.Module, strategy: Strategy) -> None:
    sums = torch.tensor([float(p.detach().double().sum()) for p in model.parameters()], dtype=torch.float64)
    first = sums.clone()
    dist.broadcast(first, src=strategy.world.ranks[0], group=strategy.control)
    if strategy.total(float(not torch.equal(sums, first))):
        raise ValueError("the processes start from different weights: seed before the model is built")


def _shard(model: nn.Module, strategy: Strategy) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    assert strategy.world.group is not None
    device = strategy.device or next(model.parameters()).device
    mesh = DeviceMesh.from_group(strategy.world.group, device.type)
    for net in nets_of(model):
        for block in blocks_of(net):
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # losses are divided by the accumulation: gradients only add up
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def nets_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are called: `model`, or where it is a mere container, what it contains.

    SettingError for a container with parameters of its own, which nobody would gather.
    """
    if is_called(model):
        return [model]
    if any(True for _ in model.parameters(recurse=False)):
        raise SettingError(f"{type(model).__name__} has parameters but no forward: fsdp cannot gather them")
    return [net for child in model.children() for net in nets_of(child)]


def whole_state(model: nn.Module, strategy: Strategy) -> dict[str, Tensor]:
    """The state dict with whole CPU tensors on the main process, {} on the others. All must call it."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor)
        if strategy.is_main:
            state[name] = tensor.detach().cpu()
    return state


# ---- tensors that may be sharded (torch's DTensor)


def whole(x: Tensor) -> Tensor:
    """`x` from all its shards. All processes must call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]


def local(x: Tensor) -> Tensor:
    """The shard that is here, sharing memory with `x`."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[operator]


def like(x: Tensor, target: Tensor) -> Tensor:
    """A whole `x`, which every process has, sharded and placed as `target` is."""
    x = x.to(target.device)
    if not hasattr(target, "to_local"):
        return x
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    return distribute_tensor(x, mesh, placements, src_data_rank=None)  # None: nothing is sent


# ---- gradients


@torch.no_grad()
def add_gradients(parameters: Iterable[nn.Parameter], strategy: Strategy) -> None:
    """Every gradient becomes its sum over the processes, taken in float32. A process that did not use a
    parameter counts as zero; one that nobody used stays without gradient. (FSDP has done it by itself.)"""
    if strategy.parallel != "ddp":
        return
    trained, group = [p for p in parameters if p.requires_grad], strategy.world.group
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    for p in (p for p, u in zip(trained, used.tolist(), strict=True) if u and p.grad is None):
        p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in trained if p.grad is not None]):
        flat = torch.cat([grad.flatten().float() for grad in bucket])
        dist.all_reduce(flat, group=group)
        for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(part.view(grad.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel()
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
