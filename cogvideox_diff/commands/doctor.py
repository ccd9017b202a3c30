"""The verb `doctor`: whether files can be used, why not, and what to do; nothing in them is executed."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from shared.doctor.verb import add_doctor_arguments, run_doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `cogvideox doctor`."""
    add_doctor_arguments(parser)
    parser.add_argument(
        "--base", metavar="MODEL", help="of an adapter: demo, or the model folder it is to fit"
    )


def run(options: argparse.Namespace) -> int:
    """Exit code 0, or 3 where the files cannot be used."""
    from cogvideox_diff.doctor import examine, fetch_for, place

    base = Path(options.base) if options.base else None
    return run_doctor(options, partial(examine, base=base, device=options.device), place, fetch_for)
