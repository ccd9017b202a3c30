"""The verb `list`: the models, suites and metrics there are."""

from __future__ import annotations

import argparse

from benchmarks import registry
from benchmarks.metrics import METRICS
from benchmarks.suites import load_suite, suite_names
from shared.verbs import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A model may also be FAMILY:FOLDER, e.g. cogvideox:weights/CogVideoX-2b."
    parser.add_argument("--json", action="store_true", help="one JSON object instead of sentences")


def run(options: argparse.Namespace) -> None:
    groups = {
        "models": {name: preset.description for name, preset in registry.PRESETS.items()}
        | {f"{family}:FOLDER": "weights of your own" for family in registry.FAMILIES},
        "suites": {name: load_suite(name).description for name in suite_names()},
        "metrics": {name: f"{metric.recipe_id}  {metric.recipe}" for name, metric in METRICS.items()},
    }
    lines = [
        line
        for title, entries in groups.items()
        for line in (title, *(f"  {name:<32} {words}" for name, words in entries.items()), "")
    ]
    say(options, groups, lines[:-1])
