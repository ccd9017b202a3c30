"""What the verb `doctor` of every family has in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from shared.doctor.report import Diagnosis
from shared.verbs import say


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """A path and --json."""
    parser.add_argument("path", help="a model folder, an adapter or a single file of weights")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of sentences")


def run_doctor(options: argparse.Namespace, examine: Callable[[Path], Diagnosis]) -> int:
    """Say the diagnosis; returns 0, or 3 where the files cannot be used."""
    diagnosis = examine(Path(options.path))
    say(options, diagnosis.plain(), diagnosis.lines())
    return diagnosis.exit_code
