"""Make and check training data: `python -m shared.clips check --input_path clips` looks at every clip."""

from __future__ import annotations

import sys

from shared.verbs import Program

PROGRAM = Program(
    name="cogvideo-data",
    package="shared.clips",
    description=__doc__,
    verbs={
        "caption": "long captions for clips, by stages or end to end, and examples to train a captioner on",
        "check": "find clips that are unreadable, short, static, duplicated or without a caption",
        "filter": "list the clips that keep bounds on motion, cuts, size, length and caption",
        "shapes": "write clips of the demo world with their captions",
        "upsample": "make prompts as long as the captions that generators were trained on",
    },
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
