"""The verb `doctor`: whether files can be used, why not, and what to do; nothing in them is executed."""

from __future__ import annotations

import argparse

from shared.doctor.verb import add_doctor_arguments, run_doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `cogvideo-ar doctor`."""
    add_doctor_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Exit code 0, or 3 where the files cannot be used."""
    from cogvideo_ar.doctor import examine

    return run_doctor(options, examine)
