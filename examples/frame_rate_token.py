"""Does CogVideo's frame-rate token work? The same prompts with key frames that span 0.5, 1 and 2 seconds.

The longer the five key frames span, the farther a moving shape should get in them; the oracle measures it.
Run: python examples/frame_rate_token.py [--num_prompts 16] [--model_path demo]
"""

from __future__ import annotations

import argparse
from statistics import mean

from cogvideo_ar import CogVideoPipeline, Options
from shared.clips import shapes
from shared.protocol import GenerationRequest

DURATIONS = (0.5, 1.0, 2.0)


def mean_travel(pipeline: CogVideoPipeline, prompts: list[str], duration: float) -> float:
    """Mean path of the object over the five key frames, in pixels."""
    keys = pipeline.configured(Options(duration=duration, rounds=0))
    requests = [GenerationRequest(prompt=prompt, seed=i) for i, prompt in enumerate(prompts)]
    return mean(shapes.read(result.video).travel for result in keys.generate_batch(requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--model_path", default="demo")
    options = parser.parse_args()
    pipeline = CogVideoPipeline.from_pretrained(options.model_path)
    moving = [c.text for c in shapes.prompts("heldout", 2 * options.num_prompts) if c.motion != "still"]
    prompts = moving[: options.num_prompts]
    print(f"{len(prompts)} prompts, five key frames each")
    for duration in DURATIONS:
        print(f"  {duration} s: the shape travels {mean_travel(pipeline, prompts, duration):5.1f} pixels")


if __name__ == "__main__":
    main()
