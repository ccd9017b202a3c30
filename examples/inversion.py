"""How exact is DDIM inversion? The error of the reconstruction by steps, and by model calls per step.

One call per step is the usual inversion; more solve the step's equation, which makes the inverse exact.
Run: python examples/inversion.py [--num_clips 4] [--model_path demo]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import mean

import numpy as np

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.codec import psnr
from cogvideox_diff.inversion import decoded, invert, reconstruct
from cogvideox_diff.planning import CallSettings, plan_inversion
from shared.clips import shapes
from shared.runtime import spare_threads
from shared.video import Video

STEPS = (10, 25, 50)
ITERATIONS = (1, 5, 20)


def errors(pipeline: CogVideoXPipeline, prompt: str, video: Video, steps: int, calls: int) -> list[float]:
    """[relative error of the latents, PSNR of the reconstruction, PSNR of the VAE alone]."""
    plan = plan_inversion(pipeline.config, CallSettings(num_inference_steps=steps), video)
    found = invert(pipeline.engine, plan, prompt, video, iterations=calls)
    latents = reconstruct(pipeline.engine, plan, prompt, found)
    again, coded = (decoded(pipeline.engine, plan, x) for x in (latents, found.clean))
    error = float((latents - found.clean).norm() / found.clean.norm())
    return [error, psnr(again, found.video), psnr(coded, found.video)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_clips", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--model_path", default="demo")
    options = parser.parse_args()
    pipeline = CogVideoXPipeline.from_pretrained(options.model_path)
    spare_threads(pipeline.parts.transformer, pipeline.parts.vae)
    run(pipeline, options.num_clips, options.steps)


def run(pipeline: CogVideoXPipeline, num_clips: int, all_steps: Sequence[int]) -> None:
    rng = np.random.default_rng(7)
    scenes = [shapes.draw_scene(rng, caption=caption) for caption in shapes.prompts("heldout", num_clips)]
    for steps in all_steps:
        for calls in ITERATIONS:
            rows = [errors(pipeline, s.caption.text, shapes.render(s), steps, calls) for s in scenes]
            error, psnr_again, psnr_coded = (mean(column) for column in zip(*rows, strict=True))
            print(
                f"{steps} steps, {calls} calls each at most: latents off by {error:.1e}, "
                f"reconstruction {psnr_again:.2f} dB (VAE alone {psnr_coded:.2f} dB)"
            )


if __name__ == "__main__":
    main()
