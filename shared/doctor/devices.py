"""What a device makes of a model's types."""

from __future__ import annotations

import torch

from shared.config_cli import pick
from shared.costs import DEVICES

WITHOUT_BFLOAT16 = ("p100", "v100", "t4", "gtx1080ti", "rtx2080ti")
FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability


def lacks_bfloat16(device: str) -> str:
    """What the device is called if it does not compute in bfloat16, else "". `device`: auto (this machine),
    cpu, cuda, mps or a GPU by name; SettingError for another."""
    known = {**dict.fromkeys(("auto", "cpu", "cuda", "mps", *WITHOUT_BFLOAT16, *DEVICES))}
    name = device.lower()
    pick("device", name, known)
    if name in WITHOUT_BFLOAT16:
        return name
    if name in ("auto", "cuda") and torch.cuda.is_available():
        old = torch.cuda.get_device_capability(0) < FIRST_WITH_BFLOAT16
        return torch.cuda.get_device_name(0) if old else ""
    return ""
