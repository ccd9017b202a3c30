"""Bad input in large numbers: the tests of tests/fuzz with many more inputs, and the count of what became of
them.

    python examples/fuzz_campaign.py [--factor 40] [--only readers cli] [--output_path out/fuzz.json]

Every part runs as a process of its own, since a damaged file could bring a whole process down; that is
counted too. The JSON file holds a sum, and for each part what was tried, refused (by exit code) and accepted,
the calls that were cut off after ten seconds of computing, and for every fault the place and the first input.
Ends with 1 where there was a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("readers", "text", "films", "json", "cli")
SUMS = ("tried", "refused", "accepted", "too_long", "faults")


def run_part(part: str, factor: int, seed: int, folder: Path) -> dict[str, Any]:
    """The figures of tests/fuzz/test_PART.py."""
    figures = folder / f"{part}.json"
    environment = os.environ | {
        "HYPOTHESIS_PROFILE": "campaign",
        "FUZZ_FACTOR": str(factor),
        "FUZZ_FIGURES": str(figures),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:warnings", f"--hypothesis-seed={seed}"]
    test = f"tests/fuzz/test_{part}.py"
    done = subprocess.run([*words, test], cwd=ROOT, env=environment, capture_output=True, text=True)
    if figures.is_file():
        return json.loads(figures.read_text(encoding="utf-8"))
    place = f"the process ended with {done.returncode}"  # killed by a signal, or a test that cannot start
    told = {place: {"count": 1, "first": done.stdout[-2000:]}}
    return {**dict.fromkeys(SUMS, 0), "faults": 1, "places": told}


def campaign(parts: list[str], factor: int, seed: int, workers: int) -> dict[str, Any]:
    """The figures of the parts, and their sums."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        runs = [pool.submit(run_part, part, factor, seed, Path(folder)) for part in parts]
        found = {part: run.result() for part, run in zip(parts, runs, strict=True)}
    sums = {name: sum(figures[name] for figures in found.values()) for name in SUMS}
    return {"factor": factor, "seed": seed, **sums, "parts": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--factor", type=int, default=40, help="inputs for each one of the usual test")
    parser.add_argument("--seed", type=int, default=0, help="of the command lines and texts")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workers", type=int, default=1, help="parts at a time")
    parser.add_argument("--output_path", type=Path, default=Path("out/fuzz.json"))
    options = parser.parse_args()
    made = campaign(options.only, options.factor, options.seed, options.workers)
    options.output_path.parent.mkdir(parents=True, exist_ok=True)
    options.output_path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for part, figures in made["parts"].items():
        print(f"{part:8}", *(f"{name} {figures[name]}" for name in SUMS))
    print("all     ", *(f"{name} {made[name]}" for name in SUMS))
    for part, figures in made["parts"].items():
        for place, told in figures["places"].items():
            print(f"{part}: {told['count']} x {place}")
    return 1 if made["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
