"""The verb `extend`: videos longer than the model makes, by chaining clips. Not in the release."""

from __future__ import annotations

import argparse

from cogvideox_diff.commands import generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    generate.add_arguments(parser)
    parser.add_argument("--num_clips", type=int, default=2,
                        help="clips to make (default: 2), behind a video if one is given")  # fmt: skip
    parser.add_argument("--overlap", type=int, metavar="FRAMES",
                        help="frames of a clip that the next one begins with: 4k+1 (default: 5)")  # fmt: skip
    parser.add_argument("--next_prompt", action="append", default=[], metavar="PROMPT",
                        help="of the second clip, the third, ... (default: the first prompt)")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """As `generate`, with its drift in the sidecar; everything is checked before the weights are read."""
    generate.run(options)
