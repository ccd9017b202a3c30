"""Can an adapter teach the demo model a colour that it has never seen or read of, and leave the rest alone?

Yellow green is in no clip of the demo's training, and its two words, each known, are in no caption together.
A LoRA on attention and MLP learns it from a few hundred clips, beside as many of the old world, so that the
model keeps that. The oracle, which then also knows yellow green, reads colour, shape, motion, speed and
background of videos of both worlds, before and after. The adapter is written for diffusers.
Run: python examples/lora_new_concept.py --output_path runs/concept [--steps 300]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cogvideox_diff import CogVideoXPipeline, lora
from cogvideox_diff.text_encoder import encode_prompts
from cogvideox_diff.training.finetune import FinetuneConfig, Samples, objective, trainable
from shared.clips import shapes
from shared.protocol import GenerationRequest
from shared.training import TrainConfig, train
from shared.video import Video

WORD, RGB = "yellow green", (150, 210, 50)
COLOURS = shapes.COLOURS | {WORD: RGB}
TARGETS = (*lora.TARGETS, "mlp.fc1", "mlp.fc2")
SETTINGS = FinetuneConfig(rank=16, alpha=32.0, targets=TARGETS, batch=16)


def recoloured(scene: shapes.Scene, rng: np.random.Generator) -> shapes.Scene:
    """The same clip in the new colour, told so."""
    red, green, blue = (float(c + j) for c, j in zip(RGB, rng.uniform(-10, 10, size=3), strict=True))
    return replace(scene, caption=replace(scene.caption, colour=WORD), object_rgb=(red, green, blue))


def new_scenes(num: int, seed: int) -> list[shapes.Scene]:
    rng = np.random.default_rng([seed, 9])
    return [recoloured(shapes.draw_scene(rng), rng) for _ in range(num)]


def old_scenes(num: int, seed: int) -> list[shapes.Scene]:
    rng = np.random.default_rng([seed, 10])
    return [shapes.draw_scene(rng) for _ in range(num)]


@torch.no_grad()
def samples(pipeline: CogVideoXPipeline, scenes: list[shapes.Scene]) -> Samples:
    """Latents of the clips and features of their captions."""
    texts = sorted({scene.caption.text for scene in scenes})
    features, _ = encode_prompts(pipeline.engine.text_encoder(), pipeline.engine.tokenizer, ["", *texts])
    latents = [pipeline.codec.encode(shapes.render(scene)).transpose(0, 1) for scene in scenes]
    return Samples(
        latents=torch.stack(latents),
        features=features[1:],
        caption=torch.tensor([texts.index(scene.caption.text) for scene in scenes]),
        unconditional=features[0],
    )


def made(pipeline: CogVideoXPipeline, captions: list[shapes.Caption]) -> list[Video]:
    requests = [GenerationRequest(prompt=caption.text, seed=i) for i, caption in enumerate(captions)]
    starts = range(0, len(requests), 8)
    return [result.video for i in starts for result in pipeline.generate_batch(requests[i : i + 8])]


def accuracy(pipeline: CogVideoXPipeline, captions: list[shapes.Caption]) -> float:
    """Share of the videos that are valid and right in all that the caption names."""
    right = []
    for caption, video in zip(captions, made(pipeline, captions), strict=True):
        reading = shapes.read(video, COLOURS)
        right.append(reading.valid and all(reading.agrees(caption.attributes()).values()))
    return float(np.mean(right))


def learn(
    pipeline: CogVideoXPipeline, folder: Path, *, steps: int, num_clips: int, quiet: bool = False
) -> Path:
    """Train the adapter on the pipeline's transformer; returns its file."""
    scenes = new_scenes(num_clips, 0) + old_scenes(num_clips, 0)
    model = trainable(pipeline.parts.transformer, SETTINGS)
    loss = objective(model, pipeline.parts.vae, samples(pipeline, scenes), pipeline.config, SETTINGS, seed=0)
    config = TrainConfig(steps=steps, lr=2e-3, warmup_steps=20, decay_fraction=0.7, autocast="bfloat16")
    train(model, loss, config, folder / "run", quiet=quiet)
    notes = {"trigger": WORD, "data": f"{num_clips} clips in {WORD}, {num_clips} of the old world"}
    return lora.save_lora(model, folder, notes=notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_path", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num_clips", type=int, default=256, help="of each world")
    parser.add_argument("--num_prompts", type=int, default=64, help="of each world")
    parser.add_argument("--model_path", default="demo")
    options = parser.parse_args()
    pipeline = CogVideoXPipeline.from_pretrained(options.model_path, device="cpu")
    new = [scene.caption for scene in new_scenes(options.num_prompts, 1)]
    old = shapes.prompts("heldout", options.num_prompts)
    before = accuracy(pipeline, new), accuracy(pipeline, old)
    path = learn(pipeline, options.output_path, steps=options.steps, num_clips=options.num_clips)
    after = accuracy(pipeline, new), accuracy(pipeline, old)
    print(f"prompt accuracy, {options.num_prompts} prompts each, before -> after")
    for name, was, now in zip((f"in {WORD}", "old world"), before, after, strict=True):
        print(f"  {name:10} {was:6.1%} -> {now:6.1%}")
    print(f"adapter: {path}")


if __name__ == "__main__":
    main()
