"""CogVideo's recursive interpolation: 5 -> 9 -> 17 -> 33 frames. Does motion lie between its neighbours'?

Every round of interpolation puts a frame between any two. A new frame is right if along the caption's
direction of motion its shape's centre lies between those of its two neighbours, up to a tolerance. Copies of
a neighbour would pass too, so `Round.places` says how far on the way from one to the other it is: 0.5 is half
way. `Round.in_box` is stricter: between them in both directions, up to twice the tolerance.

The demo model knows two rounds; the third one repeats its finest frame-rate token.
Run: python examples/recursive_interpolation.py [--num_prompts 32] [--rounds 3] [--model_path demo]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from cogvideo_ar import CogVideoPipeline, Options
from shared.clips import shapes
from shared.protocol import GenerationRequest
from shared.video import Video

TOLERANCE = 1.0  # pixels of a 64-pixel frame: an eighth of a token
MOVED = 2.0  # pixels between neighbours from which on "where between" means something


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a round made: new centres and those of their neighbours, (along, across the motion) [N, 2]."""

    frames: int
    before: Tensor
    new: Tensor
    after: Tensor

    @property
    def between(self) -> float:
        """Share of new centres between their neighbours along the motion."""
        return float((self._outside()[:, 0] <= TOLERANCE).float().mean())

    @property
    def in_box(self) -> float:
        """Share of new centres between their neighbours in both directions, up to twice the tolerance."""
        return float((self._outside() <= 2 * TOLERANCE).all(1).float().mean())

    @property
    def places(self) -> list[float]:
        """Where the new centres lie on the way from one neighbour to the next, 0..1."""
        way = (self.after - self.before)[:, 0]
        return ((self.new - self.before)[:, 0] / way)[way.abs() > MOVED].tolist()

    def _outside(self) -> Tensor:
        """How far new centres lie outside of their neighbours' range, along and across, in pixels [N, 2]."""
        low, high = self.before.minimum(self.after), self.before.maximum(self.after)
        return torch.maximum(low - self.new, self.new - high)


def centres(video: Video) -> Tensor:
    """Centre (x, y) of the object in every frame, in pixels [T, 2]: of what differs from the border."""
    frames = video.frames.float()
    edges = [frames[:, :2].flatten(1, 2), frames[:, -2:].flatten(1, 2)]
    ground_T13 = torch.cat(edges, dim=1).median(1, keepdim=True).values
    weight_THW = (frames - ground_T13[:, None]).norm(dim=-1)
    weight_THW = weight_THW * (weight_THW > 0.4 * weight_THW.amax((1, 2), keepdim=True))
    total_T = weight_THW.sum((1, 2)).clamp(min=1e-6)
    x_T = (weight_THW.sum(1) @ torch.arange(video.width).float()) / total_T
    y_T = (weight_THW.sum(2) @ torch.arange(video.height).float()) / total_T
    return torch.stack([x_T, y_T], dim=1)


def path_of(video: Video, motion: str) -> Tensor:
    """Centres as (along, across the motion) [T, 2]."""
    x, y = shapes.DIRECTIONS[motion]
    return centres(video) @ torch.tensor([[x, -y], [y, x]])


def rounds_of(paths: list[Tensor], num_rounds: int) -> Iterator[Round]:
    """The rounds, coarse to fine: a finished video holds the frames of every earlier one."""
    for left in reversed(range(num_rounds)):
        kept = [path[:: 1 << left] for path in paths]
        yield Round(
            frames=len(kept[0]),
            before=torch.cat([path[:-2:2] for path in kept]),
            new=torch.cat([path[1::2] for path in kept]),
            after=torch.cat([path[2::2] for path in kept]),
        )


def moving_captions(count: int) -> list[shapes.Caption]:
    """The first held-out captions whose shape moves."""
    return [c for c in shapes.prompts("heldout", 2 * count) if c.motion != "still"][:count]


def measure_rounds(
    videos: Sequence[Video], captions: Sequence[shapes.Caption], num_rounds: int
) -> list[Round]:
    """The rounds of all videos together, coarse to fine."""
    paths = [path_of(video, caption.motion) for video, caption in zip(videos, captions, strict=True)]
    return list(rounds_of(paths, num_rounds))


def share_between(rounds: Sequence[Round]) -> float:
    """Share of all new frames whose centre is between its neighbours' along the motion."""
    return sum(made.between * len(made.new) for made in rounds) / sum(len(made.new) for made in rounds)


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
