"""The verb `finetune` under torchrun: two processes come to the adapter of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.checkpoints import load_tensors
from shared.clips import shapes
from shared.video_io import write_video
from tests.cogvideox_diff.tiny_pipeline import FRAMES, HEIGHT, WIDTH, make, write_tokenizer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed


def finetune(folder: Path, name: str, *launcher: str, parallel: str = "none") -> dict[str, torch.Tensor]:
    size = ["--num_frames", FRAMES, "--height", HEIGHT, "--width", WIDTH]
    steps = ["--rank", 2, "--steps", 2, "--accumulation", 2, "--lr", 1e-2, "--warmup_steps", 1]
    places = ["--model_path", folder / "model", "--data", folder, "--output_path", folder / name]
    flags = [*places, *size, *steps, "--device", "cpu", "--json", "--parallel", parallel]
    words = ["cogvideox_diff", "finetune", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 1  # one process speaks
    return load_tensors(folder / name / "pytorch_lora_weights.safetensors")


def test_two_processes_come_to_the_adapter_of_one(tmp_path: Path) -> None:
    lines = []
    for i, scene in zip(range(2), shapes.scenes("train", 3), strict=False):
        write_video(shapes.render(scene), tmp_path / f"{i}.mp4")
        lines.append(json.dumps({"video": f"{i}.mp4", "caption": scene.caption.text}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    make("5b", write_tokenizer(tmp_path / "words")).save_pretrained(tmp_path / "model")
    alone = finetune(tmp_path, "alone")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    spread = finetune(tmp_path, "fsdp", *torchrun, parallel="fsdp")
    assert spread.keys() == alone.keys()
    moved = max(float(x.abs().max()) for name, x in alone.items() if "lora_B" in name)
    assert moved > 1e-3
    for name, x in alone.items():
        assert float((spread[name] - x).abs().max()) <= 1e-2 * moved, name
