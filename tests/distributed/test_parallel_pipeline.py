"""Whole pipelines on two processes against one, and the command line under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideox_diff.__main__ import main
from cogvideox_diff.acceleration import Acceleration
from cogvideox_diff.lora import inject, save_lora
from cogvideox_diff.parallel_pipeline import Sharing, Team, share
from cogvideox_diff.pipeline import CogVideoXPipeline
from cogvideox_diff.planning import CallSettings, check_request
from shared.distributed import Launch, ParallelContext
from shared.errors import SettingError, WeightsError
from shared.protocol import GenerationRequest
from shared.video_io import read_video
from tests.cogvideox_diff.tiny_lora import randomise
from tests.cogvideox_diff.tiny_pipeline import PROMPT, clip, make, picture, tiny_config, write_tokenizer
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5  # of the largest value, in float32
SHARINGS = {
    "guidance": Sharing(cfg_parallel=True),
    "attention": Sharing(ulysses_degree=2),
    "vae": Sharing(vae_parallel=True),
    "all": Sharing(cfg_parallel=True, vae_parallel=True),
}
CASES: dict[str, tuple[str, str]] = {
    "2b t2v": ("2b", "t2v"),
    "5b t2v": ("5b", "t2v"),
    "5b v2v": ("5b", "v2v"),
    "5b-i2v i2v": ("5b-i2v", "i2v"),
    "1.5-5b t2v": ("1.5-5b", "t2v"),
    "1.5-5b-i2v i2v": ("1.5-5b-i2v", "i2v"),
}


def made(pipe: CogVideoXPipeline, task: str) -> Tensor:
    """Pixels in 0..1 of a guided run of the stochastic sampler."""
    given: dict[str, Any] = {"t2v": {}, "i2v": {"image": picture()}, "v2v": {"video": clip()}}[task]
    options = {"num_inference_steps": 3, "scheduler": "dpm", "dynamic_cfg": True, "output_type": "pt"}
    return pipe(PROMPT, **options, **given)


def on_two_ranks(folder: Path, world: ParallelContext) -> dict[str, Tensor]:
    spiece, results = folder / "spiece.model", {}
    for name, (variant, task) in CASES.items():
        for kind, sharing in SHARINGS.items():
            pipe = share(make(variant, spiece), sharing.groups(world))
            results[f"{name}, {kind}"] = made(pipe, task)
    pipe = share(make("5b", spiece), SHARINGS["attention"].groups(world))
    pipe.load_lora(folder / "lora", scale=0.7)
    results["adapter"] = made(pipe, "t2v")
    for kind in ("guidance", "attention"):
        pipe = share(make("5b", spiece), SHARINGS[kind].groups(world))
        pipe.accelerate(Acceleration(attention="math"))
        results[f"5b t2v, {kind} by another kernel"] = made(pipe, "t2v")
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and an adapter of the tiny 5B."""
    folder = tmp_path_factory.mktemp("pipeline")
    model = make("5b", write_tokenizer(folder)).parts.transformer
    inject(model, 2, 4.0)
    randomise(model)
    save_lora(model, folder / "lora")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return run_ranks(partial(on_two_ranks, folder), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", [*CASES, "adapter"])
def test_two_processes_are_one(case: str, results: list[dict[str, Tensor]], folder: Path) -> None:
    variant, task = CASES.get(case, ("5b", "t2v"))
    pipe = make(variant, folder / "spiece.model")
    if case == "adapter":
        pipe.load_lora(folder / "lora", scale=0.7)
    wanted = made(pipe, task)
    names = [name for name in results[0] if name == case or name.startswith(f"{case}, ")]
    assert names
    for name in names:
        error = ((results[0][name] - wanted).abs().max() / wanted.abs().max()).item()
        print(f"{name}: {error:.1e}")
        assert error < TOLERANCE
        assert torch.equal(results[0][name], results[1][name])


# ---- agreement


def disagreeing(world: ParallelContext) -> list[str]:
    """What each process is told where one of them, or both, cannot go on."""
    told = []
    for failing in ((0,), (1,), (0, 1)):

        def work(failing: tuple[int, ...] = failing) -> str:
            if world.rank in failing:
                raise WeightsError(f"no weights at {world.rank}")
            return "made"

        try:
            told.append(Team(world).agree(work))
        except WeightsError as error:
            told.append(str(error))
    return [*told, Team(world).agree(lambda: "made")]


def test_all_stop_where_one_cannot_go_on(tmp_path: Path) -> None:
    assert run_ranks(disagreeing, tmp_path) == [
        ["no weights at 0", "process 1: no weights at 1", "no weights at 0", "made"],
        ["process 0: no weights at 0", "no weights at 1", "no weights at 1", "made"],
    ]


# ---- what is refused, before any process waits for another


@pytest.mark.parametrize(
    ("sharing", "processes", "reason"),
    [
        (
            Sharing(ulysses_degree=3),
            2,
            "takes 3 processes, 2 were started; legal with 2: --ulysses_degree 2; ",
        ),
        (Sharing(cfg_parallel=True), 4, "legal with 4: --cfg_parallel --ulysses_degree 2$"),
        (Sharing(cfg_parallel=True), 3, "legal with 3: --vae_parallel alone$"),
        (Sharing(ulysses_degree=1, vae_parallel=True), 2, ""),
    ],
)
def test_degrees(sharing: Sharing, processes: int, reason: str) -> None:
    config = tiny_config("5b")  # two heads
    plan = check_request(config)
    if not reason:
        sharing.check(processes, config, plan)
        return
    with pytest.raises(SettingError, match=reason):
        sharing.check(processes, config, plan)


def test_unguided_and_whole_clips() -> None:
    config = tiny_config("5b")
    unguided = check_request(config, CallSettings(guidance_scale=1.0))
    with pytest.raises(SettingError, match=r"legal with 2: --ulysses_degree 2$"):
        Sharing(cfg_parallel=True).check(2, config, unguided)
    whole = replace(config, vae=replace(config.vae, decode_latents=0))
    with pytest.raises(SettingError, match=r"VAE with 3 frames: 3 processes are not legal; legal: 1, 2"):
        Sharing(vae_parallel=True).check(3, whole, check_request(whole))


def test_launches() -> None:
    started = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert Sharing(cfg_parallel=True).launch(started) == Launch(rank=1, world_size=2, local_rank=1)
    assert Sharing().launch({}) is None and Sharing().launch({**started, "WORLD_SIZE": "1"}) is None
    with pytest.raises(
        SettingError, match="2 processes were started and share nothing; legal: --cfg_parallel"
    ):
        Sharing().launch(started)
    with pytest.raises(SettingError, match=r"torchrun --nproc-per-node 4 -m cogvideox_diff generate"):
        Sharing(cfg_parallel=True, ulysses_degree=2).launch({})


def test_the_team_is_out_of_step_after_an_error() -> None:
    team, request = Team(ParallelContext(rank=1)), GenerationRequest(prompt="a")
    with pytest.raises(ZeroDivisionError), team.at_work(request):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="out of step"), team.at_work(request):
        pass


# ---- the command line


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, "-m", "cogvideox_diff", "generate", "--device", "cpu", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_the_demo_under_torchrun(tmp_path: Path) -> None:
    """The shipped weights and all that two processes can share at once; only the first writes."""
    (tmp_path / "prompts.txt").write_text("a red circle moving left to right\na blue square\n")
    words = ("--prompt_file", tmp_path / "prompts.txt", "--num_inference_steps", 3, "--num_frames", 9)
    assert (
        main(["generate", "--device", "cpu", *map(str, words), "--output_path", str(tmp_path / "one")]) == 0
    )
    flags = ("--cfg_parallel", "--vae_parallel", "--output_path", tmp_path / "two")
    done = torchrun(*words, *flags, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["settings"]["parallel"]["processes"] == 2 and len(said["items"]) == 2
    for item in said["items"]:
        path = Path(item["path"])
        got, wanted = read_video(path).frames.int(), read_video(tmp_path / "one" / path.name).frames.int()
        assert (got - wanted).abs().max() <= 8  # the film's compression makes levels of a last digit
        assert (got != wanted).float().mean() < 0.01
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


def test_refusals_under_torchrun_are_said_once(tmp_path: Path) -> None:
    done = torchrun("--prompt", "a", "--ulysses_degree", 3, "--output_path", tmp_path / "a.mp4")
    assert done.returncode != 0 and done.stdout == "" and not (tmp_path / "a.mp4").exists()
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: --ulysses_degree 3 takes 3 processes, 2 were started; "
        "legal with 2: --ulysses_degree 2; --cfg_parallel --ulysses_degree 1"
    ]


def test_one_process_is_told_how_to_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--prompt", "a b", "--vae_parallel", "--output_path", str(tmp_path / "a.mp4")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "torchrun --nproc-per-node 2 -m cogvideox_diff generate --prompt 'a b' --vae_parallel" in said
