"""CogVideo from the command line: `python -m cogvideo_ar generate --prompt "a red circle"`."""

from __future__ import annotations

import sys

from shared.verbs import Program

PROGRAM = Program(
    name="cogvideo-ar",
    package="cogvideo_ar",
    description=__doc__,
    verbs={
        "generate": "make videos of prompts",
        "plan": "say what a call takes of a device, before any weights are read",
        "doctor": "say whether files of weights can be used, why not, and what to do",
        "precompute": "encode a list of clips once, as image tokens at fitting frame rates and texts",
        "train": "train a preset's model",
        "finetune": "train a stage of any model on a folder of clips, by default its temporal channel",
        "convert": "write a model folder of the released weights, or the way back",
        "clusters": "make or take over the table of token clusters",
    },
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
