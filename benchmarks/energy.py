"""What the machine's own counters say of energy: RAPL on Linux, NVML on NVIDIA's GPUs; else nothing.

A counter counts all that its part of the machine does, whoever asked for it, and none is exact.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
ZONES = ("package", "dram")  # of RAPL; cores are inside a package, and "psys" around it
NVML = "libnvidia-ml.so.1"


@dataclass(frozen=True, kw_only=True)
class Counter:
    """`read` gives joules since some start; at `span` it begins anew (0: never)."""

    name: str
    read: Callable[[], float]
    span: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EnergyMeter:
    """Counters that are read before and after a piece of work."""

    counters: Sequence[Counter]

    def measured(self, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """What `work` returns, and by how many joules each counter rose; a counter that fails is left out."""
        before = self._read()
        result = work()
        after = self._read()
        rises = {
            c.name: after[c.name] - before[c.name] for c in self.counters if c.name in before.keys() & after
        }
        spans = {c.name: c.span for c in self.counters}
        return result, {n: rise + spans[n] if rise < 0 else rise for n, rise in rises.items()}

    def _read(self) -> dict[str, float]:
        found = {}
        for counter in self.counters:
            with suppress(OSError, ValueError):
                found[counter.name] = counter.read()
        return found


@lru_cache(maxsize=1)
def energy_meter() -> EnergyMeter:
    """With all counters that this process may read."""
    return EnergyMeter(counters=(*rapl_counters(POWERCAP), *nvml_counters()))


def rapl_counters(powercap: Path) -> list[Counter]:
    """The packages and memories of /sys/class/powercap that can be read (often by root alone)."""
    found = []
    for zone in sorted(powercap.glob("*rapl:*")):
        with suppress(OSError, ValueError):
            name = (zone / "name").read_text(encoding="ascii").strip()
            if name.startswith(ZONES):
                whole = zone.name.partition(":")[2]
                span = _microjoules(zone / "max_energy_range_uj")
                _microjoules(zone / "energy_uj")  # may it be read?
                read = lambda path=zone / "energy_uj": _microjoules(path)  # noqa: E731
                found.append(Counter(name=f"RAPL {whole} {name}", read=read, span=span))
    return found


def _microjoules(path: Path) -> float:
    return int(path.read_text(encoding="ascii")) / 1e6


def nvml_counters() -> list[Counter]:
    """The GPU that torch works on, where its driver counts energy (Volta and later)."""
    if not torch.cuda.is_available():
        return []
    try:
        library: Any = ctypes.CDLL(NVML)
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle = ctypes.c_void_p()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
            return []
    except (OSError, AttributeError):  # no such library, or an old one
        return []

    def read() -> float:
        torch.cuda.synchronize()
        millijoules = ctypes.c_ulonglong()
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise OSError("this GPU does not count energy")
        return millijoules.value / 1e3

    counter = Counter(name=f"NVML {torch.cuda.get_device_name()}", read=read)
    return [counter] if EnergyMeter(counters=(counter,)).measured(lambda: None)[1] else []
