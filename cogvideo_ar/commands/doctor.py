"""The verb `doctor`: whether files can be used, why not, and what to do; nothing in them is executed."""

from __future__ import annotations

import argparse
from functools import partial

from cogvideo_ar.part_paths import add_part_flags, chosen_parts
from shared.doctor.verb import add_doctor_arguments, run_doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `cogvideo-ar doctor`."""
    add_doctor_arguments(parser)
    add_part_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Exit code 0, or 3 where the files cannot be used."""
    from cogvideo_ar.doctor import examine, fetch_for, place

    look = partial(examine, parts=chosen_parts(options), device=options.device)
    return run_doctor(options, look, place, fetch_for)
