"""How far do chained clips drift? Colour, contrast, sharpness and what the oracle reads, clip by clip.

Every clip keeps the last frames of the one before at all noise levels (an extension, not in the release).
Run: python examples/longer_clips.py [--num_prompts 8] [--num_clips 4] [--model_path demo]
"""

from __future__ import annotations

import argparse

import numpy as np

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.extension import Chain, Extended, extend
from cogvideox_diff.planning import CallSettings
from shared.clips import shapes
from shared.runtime import spare_threads

OVERLAPS = (1, 5, 9)
KEPT = ("colour", "shape", "background")


def slow_scenes(num: int) -> list[shapes.Scene]:
    """Of shapes that stand still or move slowly: they do not leave the frame at once."""
    rng = np.random.default_rng(3)
    told = (c for c in shapes.prompts("heldout", 10 * num) if c.speed != "quickly")
    return [shapes.draw_scene(rng, caption=caption) for _, caption in zip(range(num), told, strict=False)]


def table(made: list[Extended]) -> list[str]:
    """A line per clip: means over the prompts."""
    drifts = np.array([[[d.colour, d.contrast, d.sharpness] for d in one.drift] for one in made])
    readings = [[shapes.read(clip) for clip in one.clips] for one in made]
    lines = []
    for i in range(len(made[0].clips)):
        colour, contrast, sharpness = drifts[:, i].mean(axis=0)
        same = [all(getattr(r[i], name) == getattr(r[0], name) for name in KEPT) for r in readings]
        lines.append(
            f"  clip {i + 1}: mean colour off by {colour:4.1f} of 255, contrast {contrast:.2f}, "
            f"sharpness {sharpness:.2f}, still the same object {np.mean(same):.0%}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_prompts", type=int, default=8)
    parser.add_argument("--num_clips", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--model_path", default="demo")
    options = parser.parse_args()
    pipeline = CogVideoXPipeline.from_pretrained(options.model_path)
    spare_threads(pipeline.parts.transformer, pipeline.parts.vae)
    call = CallSettings(num_inference_steps=options.num_inference_steps)
    from_image = pipeline.tasks == {"i2v"}  # the first frame is then a true one
    for overlap in OVERLAPS[:1] if from_image else OVERLAPS:
        chain = Chain(num_clips=options.num_clips, overlap=overlap)
        made = []
        for i, scene in enumerate(slow_scenes(options.num_prompts)):
            image = shapes.render(scene, num_frames=1).frames[0] if from_image else None
            made.append(extend(pipeline, scene.caption.text, chain, call, seed=i, image=image))
        print(f"{len(made)} prompts, {overlap} frames of overlap, {made[0].video.num_frames} frames")
        print("\n".join(table(made)), flush=True)


if __name__ == "__main__":
    main()
