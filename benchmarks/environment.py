"""What a timing depends on beside the model: machine and versions. Names no user, host or path."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.energy import energy_meter


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Machine, threads and versions of this process."""
    return {
        "cogvideo_lab": _version("cogvideo-lab"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "energy": ", ".join(counter.name for counter in energy_meter().counters) or "not reported",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or "unknown"
