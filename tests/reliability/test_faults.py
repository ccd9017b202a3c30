"""A short form of examples/inject_faults.py: processes that are killed, disks that are full, what is left.

The long one is a campaign whose figures are in docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shared.files import atomic_path, remove_leftovers, running
from tests.reliability.families import PROMPT, ROOT, Family, example

GENERATE = "generate, CogVideo"
SHORT = [  # (kind, scenario): about a second each
    ("kills", "generate, CogVideo"),
    ("kills", "convert, CogVideoX"),
    ("full_disk", "generate, CogVideo"),
    ("full_disk", "convert, CogVideo"),
    ("file_limit", "generate, CogVideo"),
    ("read_only", "precompute, CogVideo"),
    ("memory", "generate, CogVideo"),
    ("dead_worker", "precompute, CogVideo"),
    ("damaged_shard", "precompute, CogVideo"),
]


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    if sys.platform != "linux":
        pytest.skip("processes are counted and limited as Linux does it")
    return example("inject_faults")


@pytest.fixture(scope="module")
def campaign(faults: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("faults")
    faults.preload([one for one in faults.SCENARIOS if one.name in dict(SHORT).values()])
    faults.prepare(folder / "world", {"converted_x"})
    return faults.Campaign(folder / "world", folder / "out")


@pytest.mark.parametrize(("kind", "scenario"), SHORT)
def test_after_a_fault_the_same_command_ends_as_if_nothing_had_been(
    kind: str, scenario: str, faults: ModuleType, campaign: Any
) -> None:
    if kind in ("full_disk", "read_only") and not faults.may_mount(campaign.out):
        pytest.skip("a disk of one's own needs root")
    chosen = next(one for one in faults.SCENARIOS if one.name == scenario)
    seed = random.randrange(2**32)  # the same every time, as every test's; the campaign takes others
    verdict = getattr(campaign, kind)(chosen, random.Random(seed))
    assert verdict.wrong == [], f"seed {seed}, hits {verdict.hits}"


@pytest.mark.campaign
@pytest.mark.slow
def test_a_campaign_over_all_verbs_loses_nothing_and_goes_on_where_it_was(
    faults: ModuleType, tmp_path: Path
) -> None:
    faults.inject(10, tmp_path / "run", seed=random.SystemRandom().randrange(2**32))
    result = faults.inject(20, tmp_path / "run")
    assert result["summary"]["trials"] == 20
    assert result["summary"]["wrong"] == 0, [row for row in result["rows"] if row["wrong"]]


@pytest.mark.campaign
@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["generate, CogVideo", "convert, CogVideoX", "precompute, CogVideoX"])
def test_killed_before_every_single_file_operation(scenario: str, faults: ModuleType, campaign: Any) -> None:
    chosen = next(one for one in faults.SCENARIOS if one.name == scenario)
    _, whole, _ = campaign.reference(chosen)
    assert whole.operations > 10
    for operation in range(1, whole.operations + 1):
        campaign.begin(chosen)
        fault = faults.Fault(signal=faults.SIGNALS["SIGKILL"], operation=operation)
        verdict = faults.Verdict()
        ended = faults.run(chosen, campaign.world, campaign.out, fault)
        campaign.look(verdict, ended, f"before operation {operation}", [-9, 0])
        campaign.finish(verdict, chosen)
        assert verdict.wrong == []


def test_every_verdict_can_be_bad(faults: ModuleType, campaign: Any) -> None:
    """The campaign sees what it looks for."""
    chosen = next(one for one in faults.SCENARIOS if one.name == GENERATE)
    content, _, _ = campaign.reference(chosen)
    campaign.begin(chosen)
    (campaign.out / "half.mp4").write_bytes(b"\0" * 99)
    (campaign.out / "half.json").write_text('{"a": ')
    assert len(faults.half_written(campaign.out)) == 2
    other = {name: x for name, x in content.items() if not name.endswith("run.json")} | {"videos/.a.tmp": b""}
    first = next(name for name in content if name.endswith("0.json"))
    other[first] = {**other[first], "seed": 99}
    found = " ".join(faults.differences(content, other))
    assert "run.json: missing" in found and ".a.tmp: left over" in found and "seed: 0 is now 99" in found
    verdict, traceback = faults.Verdict(), "Traceback (most recent call last): ..."
    campaign.look(verdict, faults.Ended(code=1, said=traceback, seconds=0, operations=0), "it", [2])
    assert len(verdict.wrong) == 4


def test_figures_of_several_campaigns_as_a_table(
    faults: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"kind": "kills", "scenario": GENERATE, "hits": {"SIGINT": 3, "SIGKILL": 1}, "wrong": []}
    other = {
        "kind": "full_disk",
        "scenario": GENERATE,
        "hits": {"disk full": 1},
        "wrong": ["lost: a.mp4: missing"],
    }
    for name in ("a", "b"):
        (tmp_path / name).write_text(json.dumps({"rows": [row, other]}))
    assert faults.main(["--table", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "| disk full | 2 | 2 | 0 | 0 |" in said and f"8 in all: {GENERATE} 8." in said


# ---- what the faults found, each by itself


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    with atomic_path(tmp_path / "a.json") as mine:
        dead = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{child.pid}."))
        elsewhere = mine.with_name(mine.name.replace(mine.name.split(".")[2], "00000000"))
        for path in (mine, dead, elsewhere):
            path.write_text("{}")
        assert running(os.getpid()) and not running(child.pid) and dead != mine
        remove_leftovers(tmp_path, "b")
        assert dead.exists()
        remove_leftovers(tmp_path)
        assert mine.exists() and elsewhere.exists() and not dead.exists()


def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time is there none; where the system cannot swap, the old one is kept aside until the end."""
    for swaps in (True, False):
        if not swaps:
            monkeypatch.setattr("shared.files._exchanged", lambda a, b: False)
        target = tmp_path / "folder"
        target.mkdir(exist_ok=True)
        (target / "old").write_text("old")
        with atomic_path(target) as fresh:
            fresh.mkdir()
            (fresh / f"new {swaps}").write_text("new")
        assert [path.name for path in target.iterdir()] == [f"new {swaps}"]
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_prompt_file_goes_on_where_no_index_was_written(family: Family, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text(f"{PROMPT}\na blue square\n")
    words = ("generate", "--prompt_file", prompts, "--output_path", out, "--model_path", family.model,
             "--device", "cpu", "--quiet")  # fmt: skip
    assert family.main(*words) == 0
    (out / "run.json").unlink()
    video = next(out.glob("001-*.mp4"))
    video.unlink()  # as after a kill between the sidecar and the video
    made = {path: path.stat().st_mtime_ns for path in out.glob("000-*")}
    assert family.main(*words) == 0 and video.is_file()
    assert made == {path: path.stat().st_mtime_ns for path in out.glob("000-*")}
    (out / "run.json").unlink()
    assert family.main(*words) == 0
    assert len(json.loads((out / "run.json").read_text())["items"]) == 2


def test_output_that_nobody_reads_and_a_full_one_end_quietly(cogvideo: Family, tmp_path: Path) -> None:
    """Standard output that is closed (`| head -0`), and one on a full disk."""
    words = [sys.executable, "-m", cogvideo.package, "plan", "--preset", "cogvideo"]
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    with open("/dev/full", "w") as full:
        no_space = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (gone.returncode, gone.stderr) == (2, "")
    assert no_space.returncode == 2 and no_space.stderr.count("\n") == 1
    assert "No space left on device" in no_space.stderr


def test_a_log_that_ends_in_the_middle_of_a_line_goes_on(tmp_path: Path) -> None:
    from shared.training_log import Logbook

    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with Logbook(tmp_path, steps=3, start=1, active=True, quiet=True) as book:
        book.report(2, {"loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_a_model_folder_that_is_being_replaced_is_not_whole(
    cogvideo: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a kill would leave a mixture of two models that loads."""
    from cogvideo_ar import parts

    made = parts.load_parts(cogvideo.model, parts.own_dtype(cogvideo.model), made_on())
    folder = parts.save_parts(made, tmp_path / "model")
    save = parts.save_tensors

    def interrupted(tensors: Any, path: Path, *more: Any) -> Path:
        if path.name == "vqvae.safetensors":
            raise KeyboardInterrupt
        return save(tensors, path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "save_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            parts.save_parts(made, folder)
    assert cogvideo.generate(tmp_path / "a.mp4", model=folder) == 3
    assert "config.json" in capsys.readouterr().err
    parts.save_parts(made, folder)
    assert cogvideo.generate(tmp_path / "a.mp4", model=folder) in (0, 5)


def made_on() -> Any:
    import torch

    return torch.device("cpu")
