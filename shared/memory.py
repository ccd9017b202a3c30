"""What memory there is, what a computation takes, and what a user reads when there is too little."""

from __future__ import annotations

import errno
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.errors import OutOfMemoryError

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIGNS = (  # in the words of torch's allocators and libraries
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "cannot allocate memory",
    "failed to map segment from shared object",
    "bad_alloc",
    "could not create a primitive",  # oneDNN, which says no more
    "can't start new thread",
    "Resource temporarily unavailable",  # of threads too
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def in_words(count: float) -> str:
    """Bytes as "1.50 GiB"."""
    unit = next((u for u in ("GiB", "MiB", "KiB") if count >= UNITS[u]), "B")
    return f"{count / UNITS[unit]:.2f} {unit}" if unit != "B" else f"{count:.0f} B"


def free_bytes(device: torch.device) -> int | None:
    """What may still be allocated on `device`; None where nobody knows."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text()) if MEMINFO.exists() else None
    return int(found[1]) * 1024 if found and device.type == "cpu" else None


def peak_resident_bytes() -> int:
    """The most physical memory that this process has had so far, mapped files included."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    if found:
        return int(found[1]) * 1024
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


# ---- running out


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; on the CPU torch raises a plain RuntimeError."""
    if isinstance(error, OutOfMemoryError):
        return False
    kinds = (torch.OutOfMemoryError, MemoryError)
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError | ImportError) and any(sign in str(error) for sign in SIGNS)
    )


def asked_bytes(error: BaseException) -> int | None:
    """How much the allocation that failed was for, if the message says so."""
    number = r"(?:allocate|mmap) (\d+(?:\.\d+)?) (bytes|[KMGT]iB|B)\b"
    found = re.search(number, str(error))
    return round(float(found[1]) * UNITS[found[2]]) if found else None


@contextmanager
def memory_stage(stage: str, rungs: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Turn a lack of memory in the block into a one-line OutOfMemoryError: where, how much was asked for, and
    `rungs`, what to try, the best first. The innermost stage is the one that is named."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        asked = asked_bytes(error)
        size = f" (asked for {in_words(asked)} more)" if asked else ""
        first, *others = rungs()
        then = f"; then {', '.join(others)}" if others else ""
        raise OutOfMemoryError(f"out of memory in stage {stage!r}{size}; try {first}{then}") from error


# ---- what a computation takes


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, as long as somebody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (key := _key(x)) not in given and key not in self._known:
                self._add(key, x if x.is_mkldnn else x.untyped_storage())
        return result

    def _add(self, key: int, held: Tensor | torch.UntypedStorage) -> None:
        self._known.add(key)
        size = held.numel() * held.element_size() if isinstance(held, Tensor) else held.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(held, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _key(x: Tensor) -> int:
    """Names the memory of a tensor; what oneDNN has laid out has no storage, and no views either."""
    return id(x) if x.is_mkldnn else x.untyped_storage()._cdata


@torch.no_grad()
def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by `run` hold at once. On the meta device this costs no memory and
    next to no time; what libraries use inside an operator is not seen, nor what other threads of Python make:
    meanwhile torch has one (`shared.threads`)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _LiveBytes() as live:
            run()
    finally:
        torch.set_num_threads(threads)
    return live.peak
