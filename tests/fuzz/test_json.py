"""Every JSON file that a program reads, with other values in it; the program is called on each."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from tests.fuzz.harness import UNDAMAGED, UNTOUCHED, Tally, runs
from tests.fuzz.mutations import damaged_json
from tests.fuzz.world import PROMPT, World, programs

DRY = f"generate --prompt|{PROMPT}|--dry_run --quiet"
MADE = "--prompt_file $/prompts.txt --num_frames 9 --dry_run --quiet"


@dataclass(frozen=True)
class Case:
    """`file` is damaged and `words` called; $ stands for the world, | parts words that hold spaces."""

    file: str
    program: str
    words: str
    weight: int = 4

    def argv(self, world: World) -> list[str]:
        parts = self.words.split("|")
        words = [w for i, part in enumerate(parts) for w in ([part] if i % 2 else part.split())]
        return [word.replace("$", str(world.path)) for word in words]


AR, DIFF, BENCH, DATA = "cogvideo-ar", "cogvideox", "cogvideo-bench", "cogvideo-data"
FIRST = "000-a-red-circle-moving-left-0.json"
CLIPS, TUNE = "--input_path $/clips --quiet", "finetune --quiet --model_path"
AGAIN = "--data $/clips --output_path $/tuned --steps 1 --rank 2 --save_every 1"
VBENCH = "vbench import $/run $/vbench_results.json --model good --manifest $/vbench/vbench.json"
IMPORT = "import_videos $/others --models nothing --output_path o --quiet"
SIDECAR = "run/videos/good/*.json"
CASES = (
    Case("ar/config.json", AR, f"{DRY} --model_path $/ar", 12),
    Case("ar/config.json", AR, "plan --model_path $/ar", 6),
    Case("ar/config.json", AR, "doctor $/ar", 3),
    Case("diff/config.json", DIFF, f"{DRY} --model_path $/diff", 12),
    Case("diff/config.json", DIFF, "plan --model_path $/diff", 6),
    Case("diff/config.json", DIFF, "doctor $/diff", 3),
    Case("diffusers/cogvideox_diff.json", DIFF, f"{DRY} --model_path $/diffusers", 4),
    Case("sat/cogvideox_diff.json", DIFF, f"{DRY} --model_path $/sat", 3),
    Case("bare/transformer/config.json", DIFF, f"{DRY} --model_path $/bare", 8),
    Case("bare/vae/config.json", DIFF, f"{DRY} --model_path $/bare", 8),
    Case("bare/text_encoder/config.json", DIFF, f"{DRY} --model_path $/bare", 6),
    Case("bare/scheduler/scheduler_config.json", DIFF, f"{DRY} --model_path $/bare", 6),
    Case("bare/model_index.json", DIFF, "doctor $/bare", 2),
    Case("sharded/diffusion_pytorch_model.safetensors.index.json", DIFF, "doctor $/sharded", 8),
    Case(f"made_ar/{FIRST}", AR, f"generate {MADE} --model_path $/ar --output_path $/made_ar"),
    Case(f"made_diff/{FIRST}", DIFF, f"generate {MADE} --model_path $/diff --output_path $/made_diff"),
    Case("translation.json", AR, f"{DRY} --model_path $/ar --translation $/translation.json", 6),
    Case("frames/video.json", DIFF, f"{DRY} --model_path $/diff --image_or_video_path $/frames", 6),
    Case("clips/metadata.jsonl", DATA, f"check {CLIPS} --report r.json --scores s.jsonl", 3),
    Case("clips/metadata.jsonl", DIFF, f"{TUNE} $/diff --data $/clips --output_path o --dry_run", 3),
    Case("clips/scores.jsonl", DATA, f"filter {CLIPS} --output_path m.jsonl --min_motion 0 --max_cuts 9", 8),
    Case("tokens/index.json", AR, f"{TUNE} $/ar --data $/tokens --output_path o --dry_run", 10),
    Case("tuned/run/recipe.json", DIFF, f"{TUNE} $/diff {AGAIN}", 1),
    Case("suite.json", BENCH, "run $/suite.json --dry_run --quiet", 16),
    Case("run/run.json", BENCH, "compare $/run $/run", 4),
    Case("run/run.json", BENCH, "study make $/run --output_path s", 4),
    Case("run/run.json", BENCH, "vbench export $/run --model good --output_path v", 4),
    Case("run/per_item.json", BENCH, "compare $/run $/run", 4),
    Case("run/results.json", BENCH, "compare $/run $/run", 4),
    Case(SIDECAR, BENCH, "study make $/run --output_path s", 4),
    Case(SIDECAR, BENCH, "vbench export $/run --model good --output_path v", 4),
    Case("study/key.json", BENCH, "study score $/run $/answers.json --key $/study/key.json", 8),
    Case("answers.json", BENCH, "study score $/run $/answers.json --key $/study/key.json", 10),
    Case("vbench_results.json", BENCH, VBENCH, 8),
    Case("vbench/vbench.json", BENCH, VBENCH, 8),
    Case("others/prompts.json", BENCH, IMPORT, 6),
    Case("others/prompts.jsonl", BENCH, f"{IMPORT} --prompt_file $/others/prompts.jsonl", 6),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file} {case.words.split()[0]}")
def test_other_values(case: Case, world: World, tally: Tally) -> None:
    file = next(world.path.glob(case.file))
    text, rng = file.read_text(encoding="utf-8"), random.Random(f"{case}")
    target = f"values of {case.file.replace('*', 'ITEM')}"
    program, argv = programs()[case.program], case.argv(world)
    for _ in range(runs(case.weight)):
        file.write_bytes(damaged_json(text, rng))
        before = world.mark()
        code = tally.command(target, program, argv, world.scratch, given=file)
        changed, _ = world.settle(before)
        if changed and code in UNTOUCHED:
            tally.fault(target, "refused, but changed a file that was there", f"{argv} {changed}")
        file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file} {case.words.split()[0]}")
def test_undamaged(case: Case, world: World, tally: Tally) -> None:
    """The calls themselves are right: what they refuse above is the damage."""
    code = tally.command(UNDAMAGED, programs()[case.program], case.argv(world), world.scratch)
    legal = {IMPORT.split()[0]: (2,), "doctor": (0, 3)}  # a model that is none; a part without its model
    assert code in legal.get(case.words.split()[0], (0,))
    world.restore()
