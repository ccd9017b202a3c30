"""The verb `train` under torchrun, as a user starts it, with a recipe that takes no time."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.training_state import newest

ROOT = Path(__file__).parents[2]
PROGRAM = '''
"""Two stages: one that a single process must do, one that all share."""
import os, select, signal, sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import torch
from torch import nn
from shared.config_cli import FlagParser
from shared.training import TrainConfig, train
from shared.training_cli import add_training_flags, run_stages
from shared.training_parallel import ALONE, Strategy, whole_state
from shared.verbs import interruptible

@dataclass(frozen=True)
class Run:
    spread: ClassVar = frozenset({"net"})
    folder: Path
    second_step: Callable[[], object] = int  # is called in it
    strategy: Strategy = ALONE

    def stage(self, name):
        with open(self.folder / f"{name}.txt", "a") as file:
            file.write(f"{os.environ.get('RANK', 'only')} of {self.strategy.world.degree}\\n")
        if name == "net":
            self.net()

    def net(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

        def objective(micro):
            if micro >= config.accumulation:
                self.second_step()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(micro))
            return (model(x) - x.sum(1, keepdim=True)).square().mean(), {"samples": 8}

        config = TrainConfig(steps=6, accumulation=2, ema_decay=0.5, save_every=100, log_every=1)
        train(model, objective, config, self.folder / "net", strategy=self.strategy, quiet=True)
        if state := whole_state(model, self.strategy):
            torch.save(state, self.folder / "weights.pt")

def signalled():
    """A function that returns once this process has got a signal, however long ago."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    return lambda: select.select([reader], [], [], 120)

def main(argv):
    parser = FlagParser()
    add_training_flags(parser)
    parser.add_argument("--wait", action="store_true")
    options = parser.parse_args(argv)
    options.output_path.mkdir(parents=True, exist_ok=True)
    run = Run(options.output_path, signalled() if options.wait else int)
    run_stages(options, run, ["data", "net"], lambda folder: None)

if __name__ == "__main__":
    sys.exit(interruptible(main))
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return path


def start(program: Path, folder: Path, *flags: str) -> subprocess.Popen[str]:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return subprocess.Popen(
        [sys.executable, *torchrun, str(program), "--output_path", str(folder), "--json", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
    return process.returncode, out, err


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "net" / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_torchrun_stopped_and_resumed_learns_what_one_process_does(program: Path, tmp_path: Path) -> None:
    two = start(program, tmp_path / "two", "--parallel", "fsdp", "--wait")  # in the second step
    deadline = time.monotonic() + 150
    while not lines(tmp_path / "two") and time.monotonic() < deadline and two.poll() is None:
        time.sleep(0.05)
    two.send_signal(signal.SIGTERM)  # torchrun passes it on
    code, _, err = finished(two)
    assert code != 0, err
    path, step = newest(tmp_path / "two" / "net")
    assert path is not None and path.name == "state-2" and step == 2, err

    code, out, err = finished(start(program, tmp_path / "two", "--parallel", "ddp"))
    assert code == 0, err
    assert json.loads(out)["stages"] == ["data", "net"]  # said once
    assert (tmp_path / "two" / "data.txt").read_text().splitlines() == ["0 of 1"] * 2
    assert sorted((tmp_path / "two" / "net.txt").read_text().splitlines()) == ["0 of 2"] * 2 + ["1 of 2"] * 2
    assert [line["step"] for line in lines(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]
    (tmp_path / "one").mkdir()
    runpy.run_path(str(program))["Run"](tmp_path / "one").net()
    expected, got = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("one", "two"))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
