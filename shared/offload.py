"""Where nets wait and where they compute. Only this module moves weights between devices.

A net's weights are never moved for a visit: copies on the computing device stand in for them and are dropped
afterwards, so that what waits stays where it is (perhaps still a mapped file) and nothing is copied back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from shared.errors import SettingError

OffloadMode = Literal["none", "model", "sequential"]
OFFLOADS = (*get_args(OffloadMode), "auto")  # what may be asked for

Copies = dict[int, Tensor]  # id of a waiting tensor -> its copy on the computing device


def check_offload(name: str) -> str:
    """`name` itself; SettingError lists the legal ones."""
    if name not in OFFLOADS:
        raise SettingError(f"unknown offload {name!r}; legal: {', '.join(OFFLOADS)}")
    return name


def tensor_bytes(x: Tensor) -> int:
    """Bytes of a tensor's values; of a quantized one, those of its parts."""
    if hasattr(x, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])  # type: ignore[attr-defined]
    return x.numel() * x.element_size()


def is_called(module: nn.Module) -> bool:
    """Whether it has a forward; else it only holds others, which are called one by one."""
    return type(module).forward is not nn.Module.forward


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The items of the outermost module lists: what a net runs one after the other. For an item that is not
    called (the VAE's levels) stand those of its own lists: nothing would happen at its turn."""
    blocks: list[nn.Module] = []
    for child in net.children():
        is_block = isinstance(net, nn.ModuleList) and is_called(child)
        blocks += [child] if is_block else blocks_of(child)
    return blocks


@dataclass(frozen=True)
class Weights:
    """The parameters and buffers of `modules` where they hang, but for those below `without`."""

    slots: list[tuple[dict[str, Any], str, Tensor]]  # (a module's table, name in it, what waits)

    @classmethod
    def of(cls, modules: Iterable[nn.Module], without: Iterable[nn.Module] = ()) -> Weights:
        left_out = {part for module in without for part in module.modules()}
        parts = [part for module in modules for part in module.modules() if part not in left_out]
        tables = [table for part in parts for table in (part._parameters, part._buffers)]
        return cls([(table, name, x) for table in tables for name, x in table.items() if x is not None])

    @property
    def nbytes(self) -> int:
        return sum(map(tensor_bytes, self._waiting.values()))

    @property
    def _waiting(self) -> dict[int, Tensor]:
        """Each tensor once, however many names it has."""
        return {id(x): x for _, _, x in self.slots}

    def copied(self, device: torch.device, *, aside: bool = False) -> Copies:
        """Copies on `device`; `aside`: the computer does not wait for them."""
        return {key: x.detach().to(device, copy=True, non_blocking=aside) for key, x in self._waiting.items()}

    def replace(self, copies: Copies) -> None:
        """Let the copies stand in for what waits."""
        for table, name, x in self.slots:
            is_parameter = isinstance(x, nn.Parameter)
            copy = copies[id(x)]
            table[name] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy

    def restore(self) -> None:
        for table, name, x in self.slots:
            table[name] = x

    def pin(self) -> None:
        """Page-lock what waits, which makes copying to a GPU faster and possible while it computes."""
        for x in self._waiting.values():
            if type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and not x.is_pinned():
                x.data = x.data.pin_memory()


class Placement:
    """Where modules compute and where they wait.

    `mode`: "none", always on the computing device; "model", on the CPU until a net's turn comes;
    "sequential", a net's blocks visit the device one by one, on CUDA the next one while this one computes.
    Results are the same bit for bit. Where the CPU computes all three are "none".
    """

    def __init__(self, compute: torch.device | str, mode: OffloadMode = "none") -> None:
        self.compute = torch.device(compute)
        self.mode: OffloadMode = "none" if self.compute.type == "cpu" else mode
        self.peak_bytes = 0  # of weights visiting at once, in all visits so far

    def place(self, *modules: nn.Module, pin: bool = True) -> None:
        """Put modules where they wait. `pin`: see `Weights.pin`; without it a mapped file stays one."""
        for module in modules:
            module.to(self.compute if self.mode == "none" else "cpu")
        if pin and self.mode != "none" and self.compute.type == "cuda":
            Weights.of(modules).pin()

    @contextmanager
    def computing(self, *modules: nn.Module) -> Iterator[torch.device]:
        """In the block the modules compute on the device that is yielded."""
        if self.mode == "none":
            yield self.compute
            return
        blocks = [block for m in modules for block in blocks_of(m)] if self.mode == "sequential" else []
        resident = Weights.of(modules, without=blocks)
        visits = Visits([Weights.of([block]) for block in blocks], self.compute)
        try:
            resident.replace(resident.copied(self.compute))
            with visits.hooked(blocks):
                yield self.compute
        finally:
            resident.restore()
            self.peak_bytes = max(self.peak_bytes, resident.nbytes + visits.peak_bytes)
            if self.compute.type == "cuda":
                torch.cuda.empty_cache()


@dataclass
class Visits:
    """Brings each block's weights for its own forward. Two blocks' weights are on the device at most (three
    on CUDA for the moment in which a block's kernels end): `peak_bytes` is the most at once.

    The order of blocks is learned from the first run, after a guess that it is that of definition.
    """

    weights: Sequence[Weights]
    device: torch.device
    peak_bytes: int = 0
    _next: dict[int, int] = field(default_factory=dict)
    _ready: dict[int, tuple[Copies, Any]] = field(default_factory=dict)  # fetched ahead, with their event
    _here: dict[int, Copies] = field(default_factory=dict)
    _leaving: tuple[Copies, Any] | None = None  # the last block's copies, until its kernels have ended
    _last: int | None = None

    def __post_init__(self) -> None:
        self._next = {i: i + 1 for i in range(len(self.weights) - 1)}
        self._on_cuda = self.device.type == "cuda"
        self._side = torch.cuda.Stream(self.device) if self._on_cuda and self.weights else None

    @contextmanager
    def hooked(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        handles = []
        for i, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(self._entering(i)))
            handles.append(block.register_forward_hook(self._leaving_hook(i), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for i in list(self._here):
                self.weights[i].restore()
            if self._on_cuda and self.weights:
                torch.cuda.synchronize(self.device)  # before what is still being copied is dropped
            self._ready.clear()
            self._here.clear()
            self._leaving = None

    def _entering(self, i: int) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: self._enter(i)

    def _leaving_hook(self, i: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: self._leave(i)

    def _enter(self, i: int) -> None:
        if self._last is not None:
            self._next[self._last] = i
        self._last = i
        self._forget_leaving()
        copies, event = self._ready.pop(i, None) or self._fetch(i)
        self._ready.clear()  # a wrong guess
        if event is not None:
            event.wait(torch.cuda.current_stream(self.device))
        self._here[i] = copies
        self.weights[i].replace(copies)
        ahead = self._next.get(i)
        if self._side is not None and ahead is not None and ahead != i:
            self._ready[ahead] = self._fetch(ahead)
        self._count()

    def _leave(self, i: int) -> None:
        self.weights[i].restore()
        copies = self._here.pop(i, None)
        if self._on_cuda and copies is not None:
            self._leaving = copies, torch.cuda.current_stream(self.device).record_event()

    def _forget_leaving(self) -> None:
        """The memory of the block before may be used again only when its kernels have ended."""
        if self._leaving is not None:
            self._leaving[1].synchronize()
            self._leaving = None

    def _fetch(self, i: int) -> tuple[Copies, Any]:
        if self._side is None:
            return self.weights[i].copied(self.device), None
        with torch.cuda.stream(self._side):
            copies = self.weights[i].copied(self.device, aside=True)
            return copies, self._side.record_event()

    def _count(self) -> None:
        held = [*self._here, *self._ready]
        self.peak_bytes = max(self.peak_bytes, sum(self.weights[i].nbytes for i in held))
