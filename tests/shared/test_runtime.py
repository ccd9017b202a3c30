"""Dtypes, devices, seeds and costs."""

from __future__ import annotations

import mmap
import time

import pytest
import torch
from torch import nn

from shared.errors import OutputCheckError, SettingError
from shared.runtime import (
    StageTimer,
    check_finite,
    finite_outputs,
    generator,
    parse_device,
    parse_dtype,
)

MEGABYTE = 2**20


def test_dtypes_by_both_names():
    assert parse_dtype("bf16") is parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype("fp16") is parse_dtype("float16") is torch.float16
    assert parse_dtype("fp32") is parse_dtype("float32") is torch.float32
    with pytest.raises(SettingError, match="unknown dtype 'half'; legal: float32, fp32, bfloat16"):
        parse_dtype("half")


def test_devices():
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cuda:x", "cpu:1", ""):
        with pytest.raises(SettingError, match="unknown device"):
            parse_device(name)
    with pytest.raises(SettingError, match="not available"):
        parse_device("cuda:99")


def draw(seed: int, sample: int, stream: str) -> list[float]:
    return torch.randn(4, generator=generator(seed, sample, stream)).tolist()


def test_streams_repeat_and_differ_in_each_of_their_parts():
    assert draw(0, 0, "noise") == draw(0, 0, "noise")
    draws = [
        draw(*key) for key in ((0, 0, "noise"), (1, 0, "noise"), (0, 1, "noise"), (0, 0, "text"), (10, 0, ""))
    ]
    assert len({tuple(values) for values in draws}) == len(draws)


def test_a_seed_means_the_same_on_every_machine():
    assert generator(0, 0, "noise").initial_seed() == 3996060282951318774
    assert generator(-1, 3, "noise").device.type == "cpu"


def test_stage_times_and_units_add_up():
    timer = StageTimer()
    for _ in range(2):
        with timer.stage("model", unit="steps") as stage:
            time.sleep(0.02)
            stage.units += 5
    stats = timer.stages["model"]
    assert 0.04 <= stats.seconds and (stats.units, stats.unit) == (10, "steps")


def fresh_memory(size: int) -> mmap.mmap:
    """Asked of the system: an allocator may give what earlier tests left to it, which is resident already."""
    memory = mmap.mmap(-1, size)
    memory[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
    return memory


def test_stage_peak_sees_memory_that_is_gone_at_the_end_and_not_what_was_there_before():
    kept = fresh_memory(64 * MEGABYTE)
    timer = StageTimer()
    with timer.stage("idle"):
        time.sleep(0.02)
    with timer.stage("outer"), timer.stage("inner"):
        spent = fresh_memory(64 * MEGABYTE)
        time.sleep(0.5)  # the watcher gets a turn on a busy machine too
        spent.close()
    assert timer.stages["idle"].peak_bytes < 16 * MEGABYTE
    for name in ("inner", "outer"):
        assert 60 * MEGABYTE < timer.stages[name].peak_bytes < 128 * MEGABYTE
    kept.close()


def test_a_stage_that_fails_is_still_counted():
    timer = StageTimer()
    with pytest.raises(RuntimeError), timer.stage("model"):
        raise RuntimeError
    assert timer.stages["model"].seconds > 0


def test_check_finite_counts_and_names():
    x = torch.zeros(4)
    assert check_finite("step 1", x) is x
    x[0], x[1] = float("nan"), float("inf")
    with pytest.raises(OutputCheckError, match=r"step 1: 1 NaN and 1 infinite of 4 values \(float32\)$"):
        check_finite("step 1", x)
    with pytest.raises(OutputCheckError, match=r"try bfloat16 or float32"):
        check_finite("step 1", x.half())


def test_the_first_bad_module_is_named_and_hooks_go_away():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.constant_(model[1].bias, float("nan"))
    with pytest.raises(OutputCheckError, match=r"^1: "), finite_outputs(model):
        model(torch.zeros(1, 2))
    assert model(torch.zeros(1, 2)).isnan().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peaks_of_nested_stages():
    timer = StageTimer("cuda")
    with timer.stage("outer"):
        first = torch.ones(64 * MEGABYTE // 4, device="cuda")
        del first
        with timer.stage("inner"):
            second = torch.ones(16 * MEGABYTE // 4, device="cuda")
            del second
    assert timer.stages["outer"].peak_bytes >= 64 * MEGABYTE
    assert 16 * MEGABYTE <= timer.stages["inner"].peak_bytes < 64 * MEGABYTE
