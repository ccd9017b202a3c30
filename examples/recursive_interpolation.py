"""CogVideo's recursive interpolation: 5 -> 9 -> 17 -> 33 frames. Does motion lie between its neighbours'?

`shared.clips.motion` says how that is measured: by the centre of the moving shape in every frame. The demo
model knows two rounds; the third one repeats its finest frame-rate token.
Run: python examples/recursive_interpolation.py [--num_prompts 32] [--rounds 3] [--model_path demo]
"""

from __future__ import annotations

import argparse
import warnings
from statistics import median

from cogvideo_ar import CogVideoPipeline, Options
from shared.clips.motion import TOLERANCE, Round, measure_rounds, moving_captions, share_between
from shared.protocol import GenerationRequest


def run(model_path: str, num_prompts: int, num_rounds: int) -> tuple[list[Round], int]:
    """What every round made of held-out prompts, a seed each, and the interpolated tokens of a video."""
    pipeline = CogVideoPipeline.from_pretrained(model_path).configured(Options(rounds=num_rounds))
    captions = moving_captions(num_prompts)
    requests = [GenerationRequest(prompt=caption.text, seed=i) for i, caption in enumerate(captions)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the third round is meant
        results = pipeline.generate_batch(requests)
    rounds = measure_rounds([result.video for result in results], captions, num_rounds)
    return rounds, results[0].stages["model/interpolation"].units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model_path", default="demo")
    options = parser.parse_args()
    found, tokens = run(options.model_path, options.num_prompts, options.rounds)
    print(f"{options.num_prompts} prompts, {found[-1].frames} frames, {tokens} interpolated tokens each")
    for number, made in enumerate(found, 1):
        print(
            f"  round {number}: {(made.frames + 1) // 2} -> {made.frames} frames, {len(made.new)} new: "
            f"{made.between:.1%} between their neighbours along the motion (+- {TOLERANCE:g} pixel), "
            f"{median(made.places or [0.0]):.2f} of the way; {made.in_box:.1%} in both directions"
        )
    print(f"  all rounds: {share_between(found):.1%} between their neighbours along the motion")


if __name__ == "__main__":
    main()
