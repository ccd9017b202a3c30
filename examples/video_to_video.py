"""Does video-to-video keep what it was given? Shape and colour of the result against those of the clip.

True clips of the demo world are noised to `strength`, denoised with their own caption and read by the
oracle; so is what the VAE alone makes of them, which is the most that can be kept.
Run: python examples/video_to_video.py [--num_clips 32] [--strength 0.5] [--model_path demo]
"""

from __future__ import annotations

import argparse

import numpy as np

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.planning import CallSettings
from shared.clips import shapes
from shared.protocol import GenerationRequest
from shared.runtime import spare_threads
from shared.video import Video

KEPT = ("colour", "shape")
TOLD = (*KEPT, "background", "motion", "speed")
ENOUGH = 0.9


def clips(num: int, seed: int) -> list[tuple[shapes.Caption, Video]]:
    """True clips of captions that training left out, balanced over the motions."""
    rng = np.random.default_rng([seed, 5])
    scenes = [shapes.draw_scene(rng, caption=caption) for caption in shapes.prompts("heldout", num, seed)]
    return [(scene.caption, shapes.render(scene)) for scene in scenes]


def agreement(videos: list[Video], given: list[Video]) -> dict[str, list[bool]]:
    """For each attribute, and for the two that must be kept together: clip by clip, is it the given one's?"""
    pairs = [(shapes.read(video), shapes.read(own)) for video, own in zip(videos, given, strict=True)]
    found = {name: [getattr(a, name) == getattr(b, name) for a, b in pairs] for name in TOLD}
    return {
        "colour and shape": [all(kept) for kept in zip(*(found[name] for name in KEPT), strict=True)]
    } | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_clips", type=int, default=32)
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model_path", default="demo")
    options = parser.parse_args()
    pipeline = CogVideoXPipeline.from_pretrained(options.model_path)
    spare_threads(pipeline.parts.transformer, pipeline.parts.vae)
    told = clips(options.num_clips, options.seed)
    given = [video for _, video in told]
    call = CallSettings(strength=options.strength)
    requests = [
        GenerationRequest(prompt=caption.text, seed=i, video=video) for i, (caption, video) in enumerate(told)
    ]
    made = [pipeline.generate(request, call).video for request in requests]
    coded = [pipeline.codec.decode(pipeline.codec.encode(video), video.fps) for video in given]
    print(f"{len(given)} clips, strength {options.strength}: share that agrees with the given clip")
    results, limits = agreement(made, given), agreement(coded, given)
    for name, same in results.items():
        print(f"  {name:16} {np.mean(same):6.1%}   (VAE alone {np.mean(limits[name]):6.1%})")
    enough = np.mean(results["colour and shape"]) >= ENOUGH
    print(f"colour and shape are kept in {'at least' if enough else 'LESS than'} {ENOUGH:.0%} of the clips")


if __name__ == "__main__":
    main()
