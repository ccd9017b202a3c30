"""Primitives of the cost model against torch's counter, the roofline, devices, and what `plan` says."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from shared.costs import (
    DEVICES,
    GIB,
    Part,
    StageCost,
    attention,
    convolution,
    cpu_device,
    find_device,
    linear,
    most_memory,
    pointwise,
    stored_weights,
    total_flops,
)
from shared.errors import OutOfMemoryError, SettingError
from shared.plan_cli import Planned, Rung, planned_device, run_plan
from tests.shared.counting import counted_flops

SLOW = cpu_device(gflops=1.0, gbytes=1.0, memory=4 * GIB)


def stage(name: str, net: str, **sizes: int) -> StageCost:
    given = {"weights": 0, "streamed": 0, "steps": 1} | sizes
    return StageCost(name=name, net=net, unit="steps", parts=(pointwise(100, 1, 4),), **given)


# ---- operations


def test_a_linear_layer_has_the_counters_operations():
    x, weight = torch.randn(7, 5), torch.randn(3, 5)
    assert linear(7, 5, 3, 4).flops == counted_flops(lambda: F.linear(x, weight))


@pytest.mark.parametrize("keys", [6, 11])
def test_attention_has_the_counters_operations(keys: int):
    q, k = torch.randn(2, 3, 6, 8), torch.randn(2, 3, keys, 8)
    counted = counted_flops(lambda: F.scaled_dot_product_attention(q, k, k))
    assert attention(6, keys, 3 * 8, 4, batch=2).flops == counted > 0


def test_a_convolution_has_the_counters_operations():
    x, weight = torch.randn(2, 4, 5, 6, 7), torch.randn(3, 4, 3, 3, 3)
    counted = counted_flops(lambda: F.conv3d(x, weight, padding=1))
    assert convolution(2 * 5 * 6 * 7, 4, 3, 27, 4).flops == counted


def test_moved_bytes_are_inputs_weights_and_outputs():
    assert linear(7, 5, 3, 2).moved == 2 * (7 * 5 + 5 * 3 + 7 * 3)
    assert pointwise(10, 2.5, 4).moved == 100


def test_a_part_times_a_number_is_that_much_work():
    assert linear(2, 3, 4, 4, count=5) == linear(2, 3, 4, 4) * 5
    assert total_flops([linear(2, 3, 4, 4)] * 3) == 3 * 48


# ---- seconds


def test_a_part_takes_the_longer_of_computing_and_moving():
    device = replace(SLOW, stream_share=1.0)
    bound_by_compute = Part(kind="matmul", flops=3 * 10**9, moved=10**9)
    bound_by_memory = Part(kind="matmul", flops=10**9, moved=4 * 10**9)
    assert device.seconds([bound_by_compute], torch.float32) == pytest.approx(3.0)
    assert device.seconds([bound_by_compute, bound_by_memory], torch.float32) == pytest.approx(7.0)


def test_wider_numbers_are_slower():
    part = [Part(kind="matmul", flops=10**15)]
    times = [DEVICES["h100"].seconds(part, d) for d in (torch.bfloat16, torch.float32, torch.float64)]
    assert times == sorted(times) and times[2] == pytest.approx(2 * times[1])


def test_attention_with_small_heads_is_slower_than_a_matrix_product():
    matmul, attend = (Part(kind=kind, flops=10**15) for kind in ("matmul", "attention"))
    for device in DEVICES.values():
        assert device.seconds([attend], torch.bfloat16) > device.seconds([matmul], torch.bfloat16)


def test_offloading_adds_the_copying_of_weights():
    device = replace(DEVICES["l4"], link=1e9)
    one = stage("model", "net", weights=10**9, streamed=1, forwards=5)
    plain = device.stage_seconds(one, torch.bfloat16)
    assert device.stage_seconds(one, torch.bfloat16, "model") == pytest.approx(plain + 1)
    assert device.stage_seconds(one, torch.bfloat16, "sequential") == pytest.approx(plain + 5)


# ---- devices


def test_every_device_of_the_table_is_found_by_its_name():
    assert all(find_device(name.upper()) is device for name, device in DEVICES.items())


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(SettingError, match=r"unknown device 'h20'.*nearest: 'h200'.*legal: h200"):
        find_device("h20")


def test_this_machine_has_a_cpu_with_memory():
    assert find_device("cpu").memory > 0


# ---- memory


def test_weights_of_a_net_are_stored_once_and_shared_ones_by_the_first_stage():
    stages = [
        stage("a", "first", weights=10),
        stage("b", "first", weights=10),
        stage("c", "second", weights=12, shared=7),
    ]
    assert stored_weights(stages) == 15


def test_the_peak_is_that_of_the_greediest_stage():
    stages = [
        stage("text", "t5", weights=8 * GIB, streamed=GIB),
        stage("model", "net", weights=2 * GIB, streamed=GIB, cache=3 * GIB, work=GIB),
    ]
    assert most_memory(stages, "none")[1].name == "model"
    assert most_memory(stages, "model") == (stages[0].peak("model", 0), stages[0])
    assert most_memory(stages, "sequential")[0] < most_memory(stages, "model")[0]


# ---- what plan says


def planned(*weights: int) -> Planned:
    rungs = [
        Rung(flags=f"--saver {i}" if i else "", mode="none", dtype=torch.float32,
             stages=[stage("model", "net", weights=count * GIB)])
        for i, count in enumerate(weights)
    ]  # fmt: skip
    return Planned(
        title="a model", settings={"a": 1}, device=SLOW, rungs=rungs, disk_weights=5, video_bytes=7
    )


def options(**changes: object) -> argparse.Namespace:
    given = {"json": False, "device": "cpu", "memory": None, "batch": 1, "cpu_gflops": None}
    return argparse.Namespace(**given | {"cpu_gbytes": None} | changes)


def test_the_first_rung_that_fits_ends_the_ladder(capsys: pytest.CaptureFixture[str]):
    assert run_plan(planned(9, 5, 1, 0), options(json=True)) is None
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] and said["exit_code"] == 0
    assert [(rung["flags"], rung["fits"]) for rung in said["ladder"]] == [
        ("", False), ("--saver 1", False), ("--saver 2", True)
    ]  # fmt: skip
    assert said["peak_bytes"] == 10 * GIB and said["disk"]["weights_bytes"] == 5


def test_nothing_that_fits_is_refused_with_exit_code_4(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(OutOfMemoryError, match=r"nothing fits into 4.00 GiB .* 6.00 GiB with --saver 1") as e:
        run_plan(planned(9, 5), options())
    assert e.value.exit_code == 4
    assert "too much" in capsys.readouterr().out


def test_a_refusal_in_json_is_one_object_with_the_code(capsys: pytest.CaptureFixture[str]):
    assert run_plan(planned(9), options(json=True)) == 4
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["exit_code"], said["error"]) == (False, 4, "OutOfMemoryError")


def test_a_cpu_is_planned_by_the_figures_that_are_given():
    device = planned_device(options(cpu_gflops=50.0, cpu_gbytes=10.0, memory=2.0))
    assert (device.single, device.bandwidth, device.memory) == (50e9, 10e9, 2 * GIB)


@pytest.mark.parametrize("name", ["memory", "cpu_gflops", "batch"])
def test_figures_must_be_positive(name: str):
    with pytest.raises(SettingError, match=f"{name} must be positive, got -1"):
        planned_device(options(**{name: -1}))
