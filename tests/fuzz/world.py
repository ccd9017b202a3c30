"""A folder with one small file of every kind that the programs read."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.human_study import FORMS, PREFERENCES, SIDES
from benchmarks.report import write_reports
from benchmarks.runner import run_suite
from benchmarks.storage import RunFolder
from benchmarks.suites import Suite
from cogvideo_ar.parts import save_parts
from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.config import CogVideoXConfig, cogvideox_demo
from cogvideox_diff.formats import Parts
from cogvideox_diff.lora import inject, save_lora
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.checkpoints import save_tensors
from shared.tokenizers.sentencepiece_training import T5_IDS, train_text_model
from shared.verbs import Program
from shared.video import Video
from shared.video_io import write_video
from tests.benchmarks.fakes import FakeGenerator
from tests.cogvideo_ar.tiny_pipeline import SENTENCES, tiny_parts
from tests.shared.clip_files import world as write_clips

PROMPT = "a red circle moving left"


def programs() -> dict[str, Program]:
    """The console scripts by name."""
    from benchmarks.__main__ import PROGRAM as BENCH
    from cogvideo_ar.__main__ import PROGRAM as AR
    from cogvideox_diff.__main__ import PROGRAM as DIFF
    from shared.clips.__main__ import PROGRAM as DATA

    return {program.name: program for program in (AR, DIFF, BENCH, DATA)}


@dataclass(frozen=True)
class World:
    """`path` holds the files; `pristine` a copy that nobody is told of; `scratch` is empty."""

    path: Path
    pristine: Path
    scratch: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def mark(self) -> dict[Path, tuple[int, int]]:
        """Changes with any file."""
        found = (path for path in sorted(self.path.rglob("*")) if not path.is_dir())
        return {path: ((s := path.lstat()).st_size, s.st_mtime_ns) for path in found}

    def settle(self, before: dict[Path, tuple[int, int]]) -> tuple[list[Path], list[Path]]:
        """Bring back what changed since; returns it, and of it what is gone, but for what programs keep to
        themselves."""
        after = self.mark()
        changed = [path for path in before | after if before.get(path) != after.get(path)]
        if changed:
            self.restore()
        told = [path for path in changed if "cache" not in path.parts and path.name != "scores.jsonl"]
        return told, [path for path in told if path not in after]

    def restore(self) -> None:
        shutil.rmtree(self.path)
        shutil.copytree(self.pristine, self.path, symlinks=True)


def make_world(base: Path) -> World:
    """In `base`, which is there."""
    made = World(base / "world", base / "pristine", base / "scratch")
    made.path.mkdir()
    for part in (write_models, _films, _clips, _bench, _others):
        part(made.path)
    shutil.copytree(made.path, made.pristine, symlinks=True)
    made.scratch.mkdir()  # last: a world with it is whole
    return made


def _run(program: str, *argv: object) -> None:
    """A call that must work: its files are what is damaged later."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = programs()[program].main([str(word) for word in argv])
    assert code == 0, (argv, said.getvalue())


def write_models(folder: Path) -> None:
    made = folder / "making"
    made.mkdir()
    save_parts(tiny_parts(made), folder / "ar")
    np.save(folder / "clusters.npy", np.arange(32) % 8)
    tokenizer = made / "spiece.model"
    train_text_model(SENTENCES, tokenizer, vocab_size=40, ids=T5_IDS)
    config = tiny_config()
    torch.manual_seed(0)
    net, vae, text = ExpertTransformer(config.transformer), CausalVAE(config.vae), T5TextEncoder(config.text)
    nets: list[nn.Module] = [net, vae, text]
    for parameter in (p for each in nets for p in each.eval().parameters()):
        nn.init.normal_(parameter, std=0.1)
    parts = Parts(transformer=net, vae=vae, text_encoder=text)
    CogVideoXPipeline(config, parts, tokenizer).save_pretrained(folder / "diff")
    for layout in ("diffusers", "sat"):
        where = ("--model_path", folder / "diff", "--output_path", folder / layout, "--to", layout)
        _run("cogvideox", "convert", *where, "--quiet")
    plain = {name: x.clone() for name, x in net.state_dict().items()}
    inject(net, 2, 4.0)
    save_lora(net, folder / "lora.safetensors")
    torch.save({"module": {"a": torch.arange(6.0), "b": torch.zeros(2, 3)}}, folder / "torch.pt")
    torch.save({"a": torch.arange(6.0)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    shutil.rmtree(made)
    shutil.copytree(folder / "diffusers", folder / "bare")  # as others write it, without our description
    (folder / "bare/cogvideox_diff.json").unlink()
    (folder / "sharded").mkdir()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {}
    for name, tensors in zip(names, halves(plain), strict=True):
        save_tensors(tensors, folder / "sharded" / name)
        places |= dict.fromkeys(tensors, name)
    _json(folder / "sharded/diffusion_pytorch_model.safetensors.index.json", {"weight_map": places})


def halves(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    names = list(tensors)
    return [{n: tensors[n] for n in part} for part in (names[::2], names[1::2])]


def tiny_config() -> CogVideoXConfig:
    """The demo model's form, as small as it can be."""
    demo = cogvideox_demo()
    return replace(
        demo,
        transformer=replace(demo.transformer, num_layers=1, num_heads=2, text_dim=16, time_embed_dim=16),
        text=replace(demo.text, num_layers=1, d_model=16, d_ff=16, num_heads=2, d_kv=8),
        vae=replace(demo.vae, widths=(8, 8, 16, 16), norm_groups=4),
        sampling=replace(demo.sampling, num_inference_steps=2),
    )


def _films(folder: Path) -> None:
    frames = torch.randint(256, (9, 64, 64, 3), generator=torch.Generator().manual_seed(0)).byte()
    film = Video(frames=frames, fps=8.0)
    for name in ("film.mkv", "film.mp4", "film.gif", "frames"):
        write_video(film, folder / name)
    shutil.copy(next((folder / "frames").glob("*.png")), folder / "image.png")
    path, model = folder / "film.mkv", ("--model_path", folder / "diff")
    out = ("--output_path", folder / "latents.safetensors")
    _run("cogvideox", "encode", "--input_path", path, *out, *model, "--quiet")


def _clips(folder: Path) -> None:
    write_clips(folder / "clips", 2)
    _run("cogvideo-data", "check", "--input_path", folder / "clips", "--quiet")
    given, said = ("--input_path", folder / "clips"), "--quiet"
    out = ("--output_path", folder / "encoded")
    _run("cogvideox", "precompute", *given, *out, "--model_path", folder / "diff", "--sizes", "9x64x64", said)
    out = ("--output_path", folder / "tokens")
    _run("cogvideo-ar", "precompute", *given, *out, "--model_path", folder / "ar", "--rates", 8, said)
    tune = ("--data", folder / "clips", "--output_path", folder / "tuned", "--steps", 1, "--rank", 2)
    _run("cogvideox", "finetune", "--model_path", folder / "diff", *tune, "--save_every", 1, said)


def _bench(folder: Path) -> None:
    suite = Suite(name="demo", models=("good", "poor"), num_prompts=2, num_clips=1)
    build = {name: FakeGenerator(name) for name in suite.models}
    run = RunFolder(path=folder / "run")
    run_suite(suite, run, build=build.__getitem__, quiet=True)
    write_reports(run, {})
    _run("cogvideo-bench", "study", "make", run.path, "--output_path", folder / "study")
    _run(
        "cogvideo-bench", "vbench", "export", run.path, "--model", "good", "--output_path", folder / "vbench"
    )
    key = json.loads((folder / "study/key.json").read_text(encoding="utf-8"))
    marks = {side: {q.name: q.options[0][1] for q in FORMS[key["form"]].questions} for side in SIDES}
    answers = [{"pair": pair["id"], "preference": next(iter(PREFERENCES)), **marks} for pair in key["pairs"]]
    facts = {name: key[name] for name in ("format", "study", "form")}
    _json(folder / "answers.json", {**facts, "rater": "me", "sheet": 1, "answers": answers})
    _json(
        folder / "vbench_results.json",
        {"subject_consistency": [0.9, [{"video_path": "a", "video_results": 1}]]},
    )
    _json(folder / "suite.json", {
        "name": "mine", "models": ["cogvideo-demo"], "prompts": ["a lion drinks water"], "num_prompts": 1,
        "num_videos_per_prompt": 2, "translations": {"zh": ["一头狮子在喝水"]},
        "languages": {"cogvideo-demo": "zh"},
        "window": {"seconds": 2.0, "fps": 8, "height": 64, "width": 64}, "interleave": True,
    })  # fmt: skip


def _others(folder: Path) -> None:
    (folder / "prompts.txt").write_text(f"{PROMPT}\n# no prompt\na blue square\n", encoding="utf-8")
    _json(folder / "translation.json", {PROMPT: "一个红色的圆", "a blue square": "蓝色方块"})
    (folder / "others").mkdir()
    for number in (0, 1):
        shutil.copy(folder / "film.mkv", folder / f"others/{number}.mkv")
    said = [{"file": "0.mkv", "prompt": PROMPT}, {"file": "1.mkv", "prompt": "a blue square"}]
    _json(folder / "others/prompts.json", {row["file"]: row["prompt"] for row in said})
    (folder / "others/prompts.jsonl").write_text("\n".join(map(json.dumps, said)), encoding="utf-8")
    (folder / "empty").write_bytes(b"")
    (folder / "empty_folder").mkdir()
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    (folder / "noise.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "link").symlink_to("link")
    for name in ("ar", "diff"):
        program = {"ar": "cogvideo-ar", "diff": "cogvideox"}[name]
        out = ("--output_path", folder / f"made_{name}", "--prompt_file", folder / "prompts.txt")
        _run(program, "generate", "--model_path", folder / name, *out, "--num_frames", 9, "--quiet")


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
