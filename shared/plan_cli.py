"""The verb `plan`, as far as it is the same for all models: what a call takes of a device, before any weights
are read, and the savers that would make it fit."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shared.costs import Device, OffloadMode, StageCost, cpu_device, find_device, most_memory, stored_weights
from shared.errors import OutOfMemoryError, SettingError
from shared.memory import in_words
from shared.verbs import add_output_flags, say

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to run the call: `flags` beside those that were given ("": as asked)."""

    flags: str
    mode: OffloadMode
    dtype: torch.dtype
    stages: Sequence[StageCost]

    @property
    def peak(self) -> int:
        return most_memory(self.stages, self.mode)[0]

    def seconds(self, device: Device) -> float:
        return sum(device.stage_seconds(stage, self.dtype, self.mode) for stage in self.stages)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a family hands over; `rungs` are made one by one, the first as asked."""

    title: str
    settings: dict[str, Any]
    device: Device
    rungs: Iterable[Rung]
    disk_weights: int
    video_bytes: int  # raw frames: no file is larger
    notes: Sequence[str] = field(default_factory=tuple)


# fmt: off
def add_plan_flags(parser: argparse.ArgumentParser, presets: Iterable[str]) -> None:
    """Flags of `generate` that change what a call takes, and the device to plan for."""
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--preset", help=f"a model by name: {', '.join(presets)}")
    given.add_argument("--model_path", default="demo", help="demo (the default) or a model folder")
    parser.add_argument("--device", default="auto",
                        help="auto (this machine), cpu, h200, h100, a100-80, a100-40, rtx4090, rtx3090, l4")
    parser.add_argument("--memory", type=float, metavar="GIB", help="free there (default: all it has)")
    parser.add_argument("--cpu_gflops", type=float, help="of a CPU: measured float32 matrix products")
    parser.add_argument("--cpu_gbytes", type=float, help="of a CPU: measured GB/s of copying")
    parser.add_argument("--num_frames", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch", type=int, default=1, help="videos at once (default: 1)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the model's own)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                        help="other sampling settings, by the names in the model's config.json")
    add_output_flags(parser)
# fmt: on


def planned_device(options: argparse.Namespace) -> Device:
    """The device of the flags. SettingError for numbers that are not positive."""
    for name in ("memory", "cpu_gflops", "cpu_gbytes", "batch"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise SettingError(f"{name} must be positive, got {value}")
    device = find_device(options.device)
    if device.name == "cpu":
        gflops = options.cpu_gflops or device.single / 1e9
        half = None if options.cpu_gflops else device.half / 1e9
        gbytes = options.cpu_gbytes or device.bandwidth / 1e9
        device = cpu_device(gflops, gbytes, device.memory, half_gflops=half)
    return device if options.memory is None else replace(device, memory=int(options.memory * GIB))


def run_plan(planned: Planned, options: argparse.Namespace) -> int | None:
    """Say the plan. OutOfMemoryError (4) when no rung fits."""
    tried: list[Rung] = []
    for rung in planned.rungs:
        tried.append(rung)
        if rung.peak <= planned.device.memory:
            break
    fits = tried[-1].peak <= planned.device.memory
    reason = "" if fits else _refusal(tried, planned.device)
    say(options, _content(planned, tried, fits, reason), _lines(planned, tried, fits))
    if fits:
        return None
    if options.json:
        return OutOfMemoryError.exit_code
    raise OutOfMemoryError(reason)


def _refusal(tried: Sequence[Rung], device: Device) -> str:
    least = min(tried, key=lambda rung: rung.peak)
    peak, stage = most_memory(least.stages, least.mode)
    how = f" with {least.flags}" if least.flags else ""
    return (
        f"nothing fits into {in_words(device.memory)} of {device.name}: {stage.name} takes "
        f"{in_words(peak)}{how}; try a smaller height and width, or a smaller model"
    )


# ---- words


def _content(planned: Planned, tried: Sequence[Rung], fits: bool, reason: str) -> dict[str, Any]:
    asked, device = tried[0], planned.device
    failed = {"error": "OutOfMemoryError", "reason": reason}
    return {
        "ok": fits,
        "exit_code": 0 if fits else OutOfMemoryError.exit_code,
        **({} if fits else failed),
        "settings": planned.settings,
        "device": {"name": device.name, "memory_bytes": device.memory},
        "stages": [_stage_content(stage, asked, device) for stage in asked.stages],
        "peak_bytes": asked.peak,
        "seconds": asked.seconds(device),
        "disk": {"weights_bytes": planned.disk_weights, "video_at_most_bytes": planned.video_bytes},
        "ladder": [_rung_content(rung, device) for rung in tried],
        "notes": list(planned.notes),
    }


def _stage_content(stage: StageCost, rung: Rung, device: Device) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "net": stage.net,
        "steps": stage.steps,
        "unit": stage.unit,
        "flops": stage.flops,
        "moved_bytes": stage.moved,
        "weights_bytes": stage.weights,
        "streamed_bytes": stage.streamed,
        "cache_bytes": stage.cache,
        "work_bytes": stage.work,
        "peak_bytes": stage.peak(rung.mode, stored_weights(rung.stages)),
        "seconds": device.stage_seconds(stage, rung.dtype, rung.mode),
    }


def _rung_content(rung: Rung, device: Device) -> dict[str, Any]:
    return {
        "flags": rung.flags,
        "peak_bytes": rung.peak,
        "stage": most_memory(rung.stages, rung.mode)[1].name,
        "seconds": rung.seconds(device),
        "fits": rung.peak <= device.memory,
    }


HEADER = ("stage", "steps", "TFLOP", "weights", "cache", "work", "peak", "seconds")


def _lines(planned: Planned, tried: Sequence[Rung], fits: bool) -> list[str]:
    asked, device = tried[0], planned.device
    rows = [HEADER, *(_stage_row(_stage_content(stage, asked, device)) for stage in asked.stages)]
    ladder = [_rung_row(_rung_content(rung, device)) for rung in tried]
    return [
        f"{planned.title}; {device.name} with {in_words(device.memory)}",
        *_table(rows),
        f"disk: {in_words(planned.disk_weights)} of weights; a video of at most "
        f"{in_words(planned.video_bytes)}",
        *planned.notes,
        *_table([("", "flags beside yours", "peak", "in", "seconds"), *ladder]),
    ]


def _stage_row(stage: dict[str, Any]) -> tuple[str, ...]:
    sizes = [in_words(stage[f"{name}_bytes"]) for name in ("weights", "cache", "work", "peak")]
    steps, tera = f"{stage['steps']} {stage['unit']}", f"{stage['flops'] / 1e12:.3g}"
    return (stage["stage"], steps, tera, *sizes, f"{stage['seconds']:.3g}")


def _rung_row(rung: dict[str, Any]) -> tuple[str, ...]:
    verdict = "fits" if rung["fits"] else "too much"
    peak, seconds = in_words(rung["peak_bytes"]), f"{rung['seconds']:.3g}"
    return (verdict, rung["flags"] or "(none)", peak, rung["stage"], seconds)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
