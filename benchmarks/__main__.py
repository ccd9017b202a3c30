"""Compare models: `python -m benchmarks run demo` makes the videos, the numbers and the report."""

from __future__ import annotations

import sys

from shared.verbs import Program

PROGRAM = Program(
    name="cogvideo-bench",
    package="benchmarks",
    description=__doc__,
    verbs={
        "run": "make what a suite asks for, measure it and write the report",
        "report": "measure a run again from its frames and write its report",
        "compare": "two runs, prompt by prompt",
        "peers": "speed and memory beside the peers, turn by turn with the same weights",
        "import_videos": "a run of videos that were made elsewhere",
        "vbench": "videos to VBench, and its results back",
        "study": "blinded pairs for people to judge, and what their answers show",
        "list": "the models, suites and metrics there are",
    },
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
