"""Rows that need a GPU or several processes, run where there is neither at sizes that take no time, and the
full sizes without memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.peers import diffusion, gpu, processes
from benchmarks.peers.harness import Case, measure
from benchmarks.peers.rows import all_cases, chosen_cases
from shared.graphs import Replay

pytestmark = pytest.mark.peers
pytest.importorskip("diffusers")


def eagerly(run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """As a graph: the same memory is written by every replay."""
    result = run().clone()
    return result, lambda: result.copy_(run())  # type: ignore[return-value,func-returns-value]


TINY = {
    "step": partial(gpu.step_pair, "cogvideox-5b", ""),
    "decode": gpu.decode_pair,
    "ar": gpu.ar_pair,
    "ar-graph": partial(gpu.ar_pair, recorder=lambda: eagerly),
}


@pytest.mark.parametrize("name", TINY)
def test_rows_of_a_gpu_at_no_size(name: str) -> None:
    case = Case(name=name, words="", build=partial(TINY[name], device="cpu", tiny=True))
    row = measure(case, 1)
    assert row["difference"] < (1e-4 if name.startswith("ar") else 0.05)
    assert row["of_floor"] == pytest.approx(row["floor_seconds"] / row["ours_cpu"])


@torch.no_grad()
@pytest.mark.parametrize("preset", gpu.PRESETS)
def test_steps_of_full_size_without_memory(preset: str) -> None:
    """Both sides fit together: shapes, weights and inputs."""
    pair = gpu.step_pair(preset, "", device="meta")
    assert pair.ours().shape == pair.peer().shape == (2, 13, 16, 60, 90)
    assert pair.facts["flops"] == pytest.approx(
        {"cogvideox-2b": 240e12, "cogvideox-5b": 664e12}[preset], rel=0.01
    )


@torch.no_grad()
def test_decoding_of_full_size_without_memory() -> None:
    pair = gpu.decode_pair(device="meta")
    assert pair.ours().shape == pair.peer().shape == (1, 3, 49, 480, 720)
    assert pair.facts["flops"] == pytest.approx(315e12, rel=0.05)


def test_the_demo_is_compared_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU, as the row is the CPU's."""
    seen: list[object] = []
    kind = diffusion.ours_of("pipeline").CogVideoXPipeline
    monkeypatch.setattr(kind, "from_pretrained", lambda *args, **options: seen.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diffusion.demo_pair()
    assert seen == [{"device": "cpu"}]


def test_rows_of_a_gpu_are_left_out_without_one() -> None:
    wanted = {name for name, case in all_cases().items() if case.device == "cuda"}
    assert {"diffusion/full-step-cogvideox-5b-graph", "diffusion/full-decode"} <= wanted
    assert {"ar/full-step", "ar/full-step-graph"} <= wanted
    chosen = {case.name for case in chosen_cases(["diffusion/full", "ar/full"])}
    assert chosen == (wanted if torch.cuda.is_available() else set())


@pytest.mark.distributed
@pytest.mark.parametrize("cut", processes.CUTS)
def test_two_processes_make_the_same_step(cut: str) -> None:
    case = Case(name=cut, words="", build=partial(processes.processes_pair, cut, tiny=True), kind="processes")
    row = measure(case, 1)
    assert row["difference"] < 1e-5
    assert row["ratio"] == row["peer_cpu"] / row["ours_cpu"] and row["ours_cpu"] > 0
