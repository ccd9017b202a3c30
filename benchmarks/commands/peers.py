"""The verb `peers`: speed and memory beside the peers, with the same weights and inputs in one process."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from shared.errors import SettingError
from shared.verbs import add_output_flags, say

BELOW_FLOOR = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows whose names begin so")
    parser.add_argument("--threads", type=int, default=1, choices=(1, 2), help="threads of torch (default 1)")
    parser.add_argument(
        "--repeats", type=int, default=7, help="rounds that count (default 7; of whole videos 3 at most)"
    )
    where = "folder of the kept results (default: with the code, installed out/peers)"
    parser.add_argument("--output_path", type=Path, help=where)
    parser.add_argument("--page", type=Path, help="only write the tables of the kept results into this page")
    parser.epilog = "Ends with 3 where a figure is below its floor in benchmarks/floors.json."
    add_output_flags(parser)


def run(options: argparse.Namespace) -> int | None:
    import torch

    from benchmarks.peers import rows as kept
    from benchmarks.peers.harness import measure

    folder = options.output_path or (kept.RESULTS if _in_checkout() else Path("out") / "peers")
    if options.page is not None:
        kept.write_page(options.page, folder)
        return None
    if options.repeats < 1:
        raise SettingError(f"--repeats must be at least 1, got {options.repeats}")
    if options.threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        raise SettingError("threads that spin spoil the times: set OMP_WAIT_POLICY=PASSIVE before the start")
    cases = kept.chosen_cases(options.only)
    torch.set_num_threads(options.threads)
    measured, skipped, path = [], {}, None
    for case in cases:
        try:
            measured.append(measure(case, options.repeats))
        except ImportError as error:
            skipped[case.name] = f"not measured: {error}"
            continue
        path = kept.keep(measured[-1], options.threads, folder)
        if not options.quiet:
            sys.stderr.write(_line(measured[-1]) + "\n")
    slow = kept.too_slow(measured)
    content = {"rows": measured, "skipped": skipped, "below_floor": slow, "path": path and str(path)}
    lines = [*map(_line, measured), *(f"{name}: {why}" for name, why in skipped.items()), *slow]
    say(options, content, lines)
    return BELOW_FLOOR if slow else None


def _in_checkout() -> bool:
    """Results are kept with the code, but not among installed packages."""
    return (Path(__file__).resolve().parents[2] / "pyproject.toml").is_file()


def _line(row: dict[str, Any]) -> str:
    from benchmarks.peers.rows import amount

    spread = " ({:.2f} .. {:.2f})".format(*row["spread"]) if "spread" in row else ""
    return (
        f"{row['name']:<34} ours {amount(row, 'ours'):>10}  peer {amount(row, 'peer'):>10}  "
        f"ratio {row['ratio']:.2f}{spread}"
    )
