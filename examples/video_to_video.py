"""Do video- and image-to-video keep what they were given? Shape and colour of the result, by the oracle.

v2v: true clips of the demo world are noised to `strength` (default: the model's own) and denoised with their
own caption. i2v: only a clip's first frame is given, and its caption. Both are compared with the clip; so is
what the VAE alone makes of it, which is the most that can be kept. Captions name colour and shape as well:
--empty_prompts shows what comes of the frames alone.
Run: python examples/video_to_video.py [--task v2v|i2v] [--num_clips 32] [--strength 0.8] [--empty_prompts]
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.planning import CallSettings
from shared.clips import shapes
from shared.protocol import GenerationRequest
from shared.runtime import spare_threads
from shared.video import Video

KEPT = ("colour", "shape")
TOLD = (*KEPT, "background", "motion", "speed")
MODELS = {"v2v": "demo", "i2v": "demo-i2v"}
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


def requests(task: str, told: list[tuple[shapes.Caption, Video]], *, empty: bool) -> list[GenerationRequest]:
    """Every clip, or its first frame, with its caption or with none."""
    made = []
    for i, (caption, video) in enumerate(told):
        request = GenerationRequest(prompt="" if empty else caption.text, seed=i)
        given = {"image": video.frames[0]} if task == "i2v" else {"video": video}
        made.append(replace(request, **given))
    return made


def first_frame_error(videos: list[Video], given: list[Video]) -> float:
    """Mean absolute difference of the first frames, of 255: prompts alone do not tell where the shape is."""
    pairs = zip(videos, given, strict=True)
    return float(np.mean([(a.frames[0].float() - b.frames[0].float()).abs().mean().item() for a, b in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=tuple(MODELS), default="v2v")
    parser.add_argument("--num_clips", type=int, default=32)
    parser.add_argument("--strength", type=float, help="of v2v; default: the model's own")
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--empty_prompts", action="store_true", help="no captions: the frames alone tell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model_path", help="default: demo, for i2v demo-i2v")
    options = parser.parse_args()
    pipeline = CogVideoXPipeline.from_pretrained(options.model_path or MODELS[options.task])
    spare_threads(pipeline.parts.transformer, pipeline.parts.vae)
    told = clips(options.num_clips, options.seed)
    given = [video for _, video in told]
    call = CallSettings(strength=options.strength, num_inference_steps=options.num_inference_steps)
    asked = requests(options.task, told, empty=options.empty_prompts)
    made = [pipeline.generate(request, call).video for request in asked]
    coded = [pipeline.codec.decode(pipeline.codec.encode(video), video.fps) for video in given]
    strength = pipeline.config.sampling.strength if options.strength is None else options.strength
    how = f"strength {strength}" if options.task == "v2v" else "first frames given"
    how += ", empty prompts" if options.empty_prompts else ""
    print(f"{len(given)} clips, {how}: share that agrees with the clip")
    results, limits = agreement(made, given), agreement(coded, given)
    for name, same in results.items():
        print(f"  {name:16} {np.mean(same):6.1%}   (VAE alone {np.mean(limits[name]):6.1%})")
    print(f"  first frames differ by {first_frame_error(made, given):.1f} of 255", end="")
    print(f"   (VAE alone {first_frame_error(coded, given):.1f})")
    enough = np.mean(results["colour and shape"]) >= ENOUGH
    print(f"colour and shape are kept in {'at least' if enough else 'LESS than'} {ENOUGH:.0%} of the clips")


if __name__ == "__main__":
    main()
