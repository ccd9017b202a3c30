"""What the verb `doctor` of every family has in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shared.doctor.report import Diagnosis
from shared.doctor.sums import check_sums, hashed_files
from shared.verbs import add_output_flags, say


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """A path, the device, --hash and --json."""
    parser.add_argument("path", help="demo, a model folder, an adapter or a single file of weights")
    parser.add_argument(
        "--hash", action="store_true", help="read all of it, and compare known sums (SHA-256)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="that is to run it: auto (this machine), cpu, or a GPU: v100, t4, ...",
    )
    add_output_flags(parser)


def run_doctor(
    options: argparse.Namespace,
    examine: Callable[[Path], Diagnosis],
    place: Callable[[str], Path],
    fetch: Callable[[Path], Callable[[Path], str]],
) -> int:
    """Say the diagnosis; returns 0, or 3 where the files cannot be used. `place` resolves names such as
    "demo"; `fetch(root)` makes the command that gets a file anew."""
    diagnosis = examine(Path(options.path))
    path = place(options.path)
    if options.hash and path.exists():
        diagnosis = _with_sums(diagnosis, path, fetch(path), quiet=options.quiet or options.json)
    say(options, diagnosis.plain(), diagnosis.lines())
    return diagnosis.exit_code


def _with_sums(diagnosis: Diagnosis, path: Path, fetch: Callable[[Path], str], *, quiet: bool) -> Diagnosis:
    from tqdm import tqdm

    total = sum(file.stat().st_size for file in hashed_files(path))
    with tqdm(total=total, unit="B", unit_scale=True, desc="sums", disable=quiet or None) as bar:
        findings, sums = check_sums(path, fetch, lambda name, count: bar.update(count))
    return replace(diagnosis, findings=(*diagnosis.findings, *findings), sha256=sums)
