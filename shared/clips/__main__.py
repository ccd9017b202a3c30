"""Make training data: `python -m shared.clips shapes --output_path clips` draws clips of the demo world."""

from __future__ import annotations

import sys

from shared.verbs import Program

PROGRAM = Program(
    name="cogvideo-data",
    package="shared.clips",
    description=__doc__,
    verbs={
        "shapes": "write clips of the demo world with their captions",
    },
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
