"""Memory: words for errors, live bytes, and what running out looks like."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from shared.errors import OutOfMemoryError
from shared.memory import (
    asked_bytes,
    free_bytes,
    in_words,
    memory_stage,
    peak_bytes,
    peak_resident_bytes,
    ran_out,
)

MESSAGES = {
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB": int(2.5 * 2**30),
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4096000 bytes. Error code 12 (Cannot allocate memory)": 4096000,
    "unable to mmap 1048576 bytes from file </x/a.safetensors>: Cannot allocate memory (12)": 2**20,
    "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": None,
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_the_allocators(message: str) -> None:
    error = RuntimeError(message)
    assert ran_out(error) and asked_bytes(error) == MESSAGES[message]


def test_one_line_says_where_how_much_and_what_to_try() -> None:
    with (
        pytest.raises(OutOfMemoryError) as caught,
        memory_stage("loading", lambda: ["nothing: the inner stage speaks"]),
        memory_stage("decode", lambda: ["--tiling on", "fewer frames"]),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. (hints)")
    assert str(caught.value) == (
        "out of memory in stage 'decode' (asked for 2.50 GiB more); try --tiling on; then fewer frames"
    )
    assert caught.value.exit_code == 4


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), memory_stage("model", lambda: ["x"]):
        raise RuntimeError("shapes differ")


def test_live_bytes_on_the_meta_device() -> None:
    def chain() -> None:
        x = torch.empty(1000, device="meta")
        for _ in range(5):
            x = torch.relu(x)  # two at once
        x.view(10, 100).add_(1)  # in place, and a view

    assert peak_bytes(chain) == 2 * 4000


def test_live_bytes_of_real_tensors() -> None:
    x = torch.randn(100, 100)
    assert peak_bytes(lambda: (x @ x) + (x @ x)) == 3 * 40000


def test_words() -> None:
    assert [in_words(n) for n in (12, 2048, 3 * 2**20, 1.5 * 2**30)] == [
        "12 B",
        "2.00 KiB",
        "3.00 MiB",
        "1.50 GiB",
    ]


def test_what_there_is() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert 2**20 < peak_resident_bytes() < 2**40


def test_a_real_limit() -> None:
    """In a process whose address space ends soon."""
    program = """
import resource, sys, torch
from shared.config_cli import run
from shared.memory import memory_stage
def main(argv):
    with memory_stage("model", lambda: ["--offload model", "fewer frames"]):
        torch.empty(2**33, dtype=torch.uint8).fill_(1)
torch.zeros(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
sys.exit(run(main, []))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 4, done.stderr
    asked = "error: out of memory in stage 'model' (asked for 8.00 GiB more); "
    assert done.stderr == asked + "try --offload model; then fewer frames\n"
