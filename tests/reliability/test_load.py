"""Hundreds of prompts in one process: nothing is lost and memory stays where it was."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reliability.families import Family

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")

WARM_UP = 0.4  # share of the videos during which every length of text comes for the first time
COUNT = 500
MOST_GROWTH = 0.01  # of all memory, over the rest of the videos; the run's index is a part of it
MIB = 2**20


def own_memory() -> int:
    """Physical memory that is this process's own, after the allocator gave back what it only keeps. Pages of
    libraries do not count: a forked process maps them one by one as it first uses them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def made_by(family: Family, folder: Path, count: int) -> tuple[int, list[int]]:
    """In a process of its own: the exit code, and its memory when each video was finished."""
    prompts, sizes = folder / "prompts.txt", folder / "sizes.json"
    said = ("red", "blue", "green", "a circle", "a square", "moving left", "standing still")
    lines = [f"{said[i % 7]} {said[i // 7 % 7]} {said[i // 49 % 7]} {i}" for i in range(count)]
    random.Random(0).shuffle(lines)  # else new lengths of text, and what libraries prepare for them, go on
    prompts.write_text("".join(f"{line}\n" for line in lines))
    child = os.fork()
    if child == 0:
        found: list[int] = []

        def hook(event: str, given: tuple[Any, ...]) -> None:
            name = os.path.basename(str(given[1])) if event == "os.rename" else "."
            if name.endswith(".mp4") and not name.startswith("."):
                found.append(own_memory())

        code = 99
        try:
            sys.addaudithook(hook)
            short = ("--num_frames", 1, "--set", "num_inference_steps=1")
            words = ("--num_frames", 5) if family.package == "cogvideo_ar" else short
            code = family.main(
                "generate", "--prompt_file", prompts, "--output_path", folder / "out",
                "--model_path", family.model,
                "--device", "cpu", "--quiet", *words,
            )  # fmt: skip
            sizes.write_text(json.dumps(found))
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, json.loads(sizes.read_text())


def growth(family: Family, folder: Path, count: int) -> float:
    """By which share memory grew after the warm-up, by a straight line through all its values."""
    code, sizes = made_by(family, folder, count)
    assert code in (0, 5), "5: random weights may draw a video of one colour"
    assert len(sizes) == count
    index = json.loads((folder / "out" / "run.json").read_text())["items"]
    assert [item["status"] for item in index] == ["made"] * count
    assert len({item["prompt"] for item in index}) == count
    for suffix in ("mp4", "json"):
        assert len(list((folder / "out").glob(f"[0-9]*.{suffix}"))) == count
    kept = np.array(sizes[int(count * WARM_UP) :], float)
    slope = float(np.polyfit(np.arange(len(kept)), kept, 1)[0])
    print(
        f"\n{family.package}: {sizes[0] / MIB:.1f} MiB after the first video, {kept[0] / MIB:.1f} after the "
        f"warm-up, {sizes[-1] / MIB:.1f} after {count}; then {slope:.0f} bytes per video"
    )
    return slope * len(kept) / float(kept.mean())


@pytest.mark.campaign
@pytest.mark.slow
def test_five_hundred_prompts_leave_memory_flat(family: Family, tmp_path: Path) -> None:
    assert growth(family, tmp_path, COUNT) < MOST_GROWTH


def test_a_few_prompts_are_all_there(family: Family, tmp_path: Path) -> None:
    growth(family, tmp_path, 12)
