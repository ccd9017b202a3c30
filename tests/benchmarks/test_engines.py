"""Several workers on one folder: nothing lost, nothing made twice, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from benchmarks.claims import Claims
from benchmarks.engines import run_with
from benchmarks.runner import conclude, make_share
from benchmarks.storage import RunFolder, read_json
from benchmarks.suites import Suite, items
from benchmarks.work import DEATHS, Desk, Task, failures
from shared.errors import SettingError
from tests.benchmarks.conftest import Models
from tests.benchmarks.fakes import FakeGenerator
from tests.benchmarks.workers import EVERYTHING, SUITE, Noting, noted

Build = Callable[[str], FakeGenerator]


def check_whole(folder: RunFolder) -> None:
    """Every item is there, and nothing of the work is left lying about."""
    for model in SUITE.models:
        there = sorted(path.stem for path in folder.videos(model).glob("*.json"))
        assert there == sorted(item.id for item in items(SUITE))
    assert not [path for path in folder.path.rglob("*") if path.name.startswith(".") or "tmp" in path.name]
    assert not (folder.path / "claims").exists() and not (folder.path / "workers").exists()


# ---- claims


def test_one_worker_gets_a_piece_of_work(tmp_path: Path) -> None:
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("a") and not second.take("a") and second.take("b")
        first.release("a")
        assert second.take("a") and not first.take("a")


def test_only_one_of_many_gets_it(tmp_path: Path) -> None:
    got: list[str] = []
    start = threading.Barrier(8)

    def reach() -> None:
        with Claims(tmp_path) as claims:
            start.wait()
            got.extend(what for what in "abcdef" if claims.take(what))
            start.wait()  # nobody ends before all have tried

    threads = [threading.Thread(target=reach) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list("abcdef")


def test_a_silent_worker_loses_its_claims(tmp_path: Path) -> None:
    with Claims(tmp_path, lease=60) as lively, Claims(tmp_path, lease=1000) as silent:
        assert silent.take("a") and not lively.take("a")
        os.utime(tmp_path / "workers" / f"{silent.name}.json", (1, 1))
        assert lively.take("a") and not silent.take("a")


def test_a_beating_worker_keeps_its_claims_longer_than_a_lease(tmp_path: Path) -> None:
    with Claims(tmp_path, lease=3) as holder, Claims(tmp_path, lease=60) as other:
        assert holder.take("a")
        life = tmp_path / "workers" / f"{holder.name}.json"
        os.utime(life, (1, 1))  # as if a lease had passed
        deadline = time.monotonic() + 60
        while life.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not other.take("a")


def test_a_killed_process_loses_its_claims_at_once(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with Claims(tmp_path) as claims:
            claims.take("a")
            os.kill(os.getpid(), signal.SIGKILL)
    with Claims(tmp_path) as claims:
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT) is None:
            pass
        assert claims.take("a")  # although nobody collected it yet
    os.waitpid(child, 0)


def test_work_that_kills_its_workers_fails_in_the_end(tmp_path: Path) -> None:
    made: list[str] = []
    for _ in range(DEATHS):
        dead = Claims(tmp_path, run="one")
        dead.__enter__()
        assert dead.take("poison")
        dead._stop.set()
        os.utime(tmp_path / "workers" / f"{dead.name}.json", (1, 1))
    with Claims(tmp_path, run="one") as claims:
        task = Task(name="poison", done=lambda: bool(made), make=lambda: made.append("x"))
        Desk(claims=claims, failures=tmp_path / "failures", quiet=True).work_off([task])
        assert failures(tmp_path / "failures", ["poison"]) == {"poison": f"{DEATHS} workers died making it"}
    with Claims(tmp_path) as another:  # another run tries again
        Desk(claims=another, failures=tmp_path / "failures", quiet=True).work_off([task])
    assert made == ["x"] and not failures(tmp_path / "failures", ["poison"])


def test_workers_in_one_folder_share_the_items(suite: Suite, folder: RunFolder, tmp_path: Path) -> None:
    build = partial(Noting, notes=tmp_path / "notes")
    with Claims(folder.path) as main:

        def share() -> None:
            with Claims(folder.path, run=main.run) as claims:
                make_share(SUITE, folder, build=build, claims=claims, quiet=True)

        threads = [threading.Thread(target=share) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outcome = conclude(SUITE, folder, main)
    assert noted(tmp_path / "notes")[0] == EVERYTHING
    assert (outcome.made, outcome.kept, outcome.failed) == (12, 0, {})
    check_whole(folder)


def test_a_failing_item_is_tried_once_by_all_workers_together(
    suite: Suite, folder: RunFolder, models: Models, build: Build
) -> None:
    models["good"].fail_on = (1,)
    with Claims(folder.path, run="one") as first, Claims(folder.path, run="one") as second:
        for claims in (first, second):
            make_share(suite, folder, build=build, claims=claims, quiet=True)
        second.tell(ended=True)
        outcome = conclude(suite, folder, first)
    assert models["good"].calls.count(1) == 1
    assert list(outcome.failed) == [f"good/{items(suite)[1].id}"] and outcome.made == 9


# ---- engines


def test_engines_that_are_not_there_say_so(
    suite: Suite, folder: RunFolder, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SettingError, match="torchrun --nproc_per_node"):
        run_with("torchrun", suite, folder, build=build)
    with pytest.raises(SettingError, match="'torchrun'"):
        run_with("torchrum", suite, folder, build=build)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingError, match=r"cogvideo-lab\[ray\]"):
        run_with("ray", suite, folder, build=build)


@pytest.mark.distributed
def test_torchrun_with_two_processes_one_of_which_dies(tmp_path: Path, root: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    done = subprocess.run(
        [sys.executable, *words, "-m", "tests.benchmarks.workers", str(tmp_path), "3"],
        cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "made" in done.stdout and "failed" not in done.stdout
    made, processes = noted(tmp_path / "notes")
    assert set(made) == set(EVERYTHING) and len(processes) > 1
    assert (tmp_path / "died").is_file()
    check_whole(RunFolder(path=tmp_path / "run"))


@pytest.mark.distributed
def test_ray_with_two_workers_one_of_which_is_killed(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(root))  # for the workers
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else other tests on this machine starve the workers
    folder = RunFolder(path=tmp_path / "run")
    build = partial(Noting, notes=tmp_path / "notes", fatal=3)
    outcome = run_with("ray", SUITE, folder, build=build, workers=2)
    assert outcome is not None and outcome.failed == {}
    made, processes = noted(tmp_path / "notes")
    killed = (tmp_path / "died").read_text(encoding="utf-8")
    assert made == EVERYTHING and len(processes - {killed}) >= 1
    assert (outcome.made, outcome.kept) == (12, 0)
    assert list(read_json(folder.index)["models"]) == ["good", "poor"]
    check_whole(folder)
    assert json.dumps(outcome.models, sort_keys=True)
