"""The same seed gives the same frames: across processes bit for bit, whatever the batch, and to rounding
across numbers of threads and attention back ends."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.attention import attend
from shared.protocol import GenerationRequest
from shared.video_io import read_video
from tests.reliability.families import PROMPT, ROOT, Family

PROMPTS = (PROMPT, "a blue square standing still", "a red circle")


def pipeline(family: Family) -> Any:
    if family.package == "cogvideo_ar":
        from cogvideo_ar import CogVideoPipeline

        return CogVideoPipeline.from_pretrained(family.model, device="cpu")
    from cogvideox_diff import CogVideoXPipeline

    return CogVideoXPipeline.from_pretrained(family.model, device="cpu")


def most_levels(a: Tensor, b: Tensor) -> int:
    assert a.shape == b.shape
    return int((a.int() - b.int()).abs().max())


def test_processes_agree_bit_for_bit(family: Family, tmp_path: Path) -> None:
    """This one, which did other work before, and one with another hash seed in another folder."""
    assert family.generate(tmp_path / "here.mkv", "--seed", 5) == 0
    words = [
        "generate",
        "--prompt",
        PROMPT,
        "--seed",
        "5",
        "--model_path",
        str(family.model),
        "--output_path",
    ]
    words = [sys.executable, "-m", family.package, *words, "there.mkv", "--device", "cpu"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here.mkv").read_bytes() == (tmp_path / "there.mkv").read_bytes()


def test_batches_of_every_size_agree(family: Family) -> None:
    """To one level: some operators sum a batch of another size in another order."""
    pipe = pipeline(family)
    requests = [GenerationRequest(prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    alone = [pipe.generate(request).video.frames for request in requests]
    for size in (2, 3):
        together = [result.video.frames for result in pipe.generate_batch(requests[:size])]
        assert all(most_levels(a, b) <= 1 for a, b in zip(alone, together, strict=False))
    turned = pipe.generate_batch(requests[::-1])[::-1]
    assert all(most_levels(a, b.video.frames) <= 1 for a, b in zip(alone, turned, strict=True))


def test_numbers_of_threads_agree(family: Family) -> None:
    pipe, before = pipeline(family), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(pipe.generate(GenerationRequest(prompt=PROMPT, seed=2)).video.frames)
    finally:
        torch.set_num_threads(before)
    assert all(most_levels(found[0], other) <= 1 for other in found[1:])


def test_attention_backends_agree(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(family)
    request = GenerationRequest(prompt=PROMPT, seed=2)
    wanted, calls = pipe.generate(request).video.frames, []

    def plain(*given: Tensor, **named: Any) -> Tensor:
        calls.append(1)
        return attend(*given, **{**named, "backend": "math"})

    if family.package == "cogvideo_ar":
        monkeypatch.setattr("cogvideo_ar.attention.attend", plain)
    else:
        for block in pipe.parts.transformer.blocks:
            block.attn.attend = plain
    got = pipe.generate(request).video.frames
    assert calls and most_levels(wanted, got) <= 1


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_offload_modes_agree_bit_for_bit(family: Family, mode: str) -> None:
    """Forced, since nothing is offloaded where the CPU computes."""
    pipe = pipeline(family)
    run = partial(pipe.generate, GenerationRequest(prompt=PROMPT, seed=3))
    wanted = run().video.frames
    placement = pipe.placement if family.package == "cogvideo_ar" else pipe.engine.placement
    placement.mode = mode
    assert torch.equal(run().video.frames, wanted)


def test_what_was_made_before_does_not_matter(family: Family) -> None:
    """Neither other videos nor the global random state."""
    pipe = pipeline(family)
    request = GenerationRequest(prompt=PROMPT, seed=4)
    wanted = pipe.generate(request).video.frames
    pipe.generate(GenerationRequest(prompt=PROMPTS[1], seed=9))
    torch.manual_seed(123)
    assert torch.equal(pipe.generate(request).video.frames, wanted)


def test_a_prompt_of_a_file_is_the_prompt_alone(family: Family, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    words = ("--model_path", family.model, "--device", "cpu", "--quiet", "--set", "num_inference_steps=2")
    words = words if family.package == "cogvideox_diff" else words[:-2]
    assert family.main("generate", "--prompt_file", prompts, "--output_path", tmp_path / "all", *words) == 0
    one = tmp_path / "one.mp4"
    assert family.main("generate", "--prompt", PROMPTS[1], "--output_path", one, *words) == 0
    (among,) = (tmp_path / "all").glob("001-*.mp4")
    assert torch.equal(read_video(among).frames, read_video(one).frames)
