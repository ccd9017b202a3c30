"""One prompt, both generations of CogVideo: two videos, and what the oracle sees in them.

Run: python examples/compare_one_prompt.py "a blue cross moving up slowly on a white background"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cogvideo_ar import CogVideoPipeline
from cogvideox_diff import CogVideoXPipeline
from shared.clips import shapes
from shared.protocol import GenerationRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="a blue cross moving up slowly on a white background")
    parser.add_argument("--output_path", type=Path, default=Path("out/compare"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wanted = shapes.parse(options.prompt)
    for family in (CogVideoPipeline, CogVideoXPipeline):
        pipeline = family.from_pretrained("demo")
        result = pipeline.generate(GenerationRequest(prompt=options.prompt, seed=options.seed))
        path = result.video.save(options.output_path / f"{pipeline.name}.mp4", overwrite=True)
        reading = shapes.read(result.video)
        missed = [name for name, right in reading.agrees(wanted).items() if not right]
        verdict = (
            "all right" if reading.valid and not missed else f"wrong: {', '.join(missed) or 'no clear shape'}"
        )
        print(f"{pipeline.name:16} {sum(result.seconds.values()):6.2f} s  {verdict:24} {path}")


if __name__ == "__main__":
    main()
