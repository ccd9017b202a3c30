"""CogVideoX from the command line: `python -m cogvideox_diff generate --prompt "a red circle"`."""

from __future__ import annotations

import sys

from shared.verbs import Program

PROGRAM = Program(
    name="cogvideox",
    package="cogvideox_diff",
    description=__doc__,
    verbs={
        "generate": "make videos of prompts, of an image, or of another video",
        "plan": "say what a call takes of a device, before any weights are read",
        "doctor": "say whether files of weights can be used, why not, and what to do",
        "extend": "make longer videos by chaining clips (an extension, not in the release)",
        "invert": "find the noise of a video, reconstruct it and edit it",
        "encode": "write a video's latents, with the VAE alone",
        "decode": "make the video of latents, with the VAE alone",
        "precompute": "encode a list of clips once, as latents and text features",
        "train": "train a preset's model",
        "finetune": "teach a model new clips: an adapter, or all weights",
        "convert": "write a model in another layout: ours, diffusers' or SAT's",
        "lora": "look into an adapter, merge it into weights, or rewrite it",
    },
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
