"""Ablations of both papers' training ideas on the demo world, made small: a table with intervals and a plot.

Every arm is a short training of a small net of the project's own classes, once per seed; a comparison is two
arms that differ in one thing. Finished runs are kept in the output folder and not repeated.
Run: python examples/ablations/run.py [--only NAME] [--seeds 3] [--output_path out/ablations]
     [--page docs/ablations.md]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import autoregressive
import diffusion
import torch
from kit import Outcome, Settings, run_once
from summary import COMPARISONS, Comparison, compared, draw, markdown, write_page

from shared.files import atomic_path, write_json

ARMS: dict[str, Any] = {name: module for module in (diffusion, autoregressive) for name in module.ARMS}


def run(
    comparisons: Iterable[Comparison],
    seeds: int,
    folder: Path,
    settings: Settings,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run what is missing and write `ablations.json`, `ablations.md` and `ablations.png`; returns the first's
    content."""
    chosen = list(comparisons)
    load = cache(lambda module: module.load_world(settings, folder))  # data and codec, once and when needed
    outcomes: dict[str, list[Outcome]] = {}
    arms = sorted({arm for c in chosen for arm in (c.idea, c.without)}, key=list(ARMS).index)
    for seed in range(seeds):
        for arm in arms:
            measure = partial(_measure, load, arm, seed)
            needed = {m.name for c in chosen if arm in (c.idea, c.without) for m in c.measures}
            made = run_once(arm, seed, settings, folder / "runs", measure, needed=needed)
            outcomes.setdefault(arm, []).append(made)
            say(f"{arm}, seed {seed}: held-out loss {_mean(made.figures['loss']):.4f}")
    results = {c.name: compared(c, outcomes[c.idea], outcomes[c.without]) for c in chosen}
    content = {"settings": asdict(settings), "seeds": seeds, "comparisons": results}
    write_json(folder / "ablations.json", content)
    with atomic_path(folder / "ablations.md") as temporary:
        temporary.write_text(markdown(content), encoding="utf-8")
    with atomic_path(folder / "ablations.png") as temporary:
        draw(content, temporary)
    return content


def _measure(load: Callable[[Any], Any], arm: str, seed: int) -> Outcome:
    module = ARMS[arm]
    return module.run_arm(load(module), arm, seed)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=list(COMPARISONS), help="one comparison (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_path", type=Path, default=Path("out/ablations"))
    parser.add_argument("--page", type=Path, help="a document whose tables and plot are to be these")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    chosen = [COMPARISONS[options.only]] if options.only else list(COMPARISONS.values())
    content = run(chosen, options.seeds, options.output_path, Settings(), partial(print, flush=True))
    print(markdown(content))
    if options.page:
        write_page(options.page, content)
    print(f"written: {options.output_path / 'ablations.json'}, .md and .png")


if __name__ == "__main__":
    main()
