"""The verb `list`: the models, suites and metrics there are."""

from __future__ import annotations

import argparse

from benchmarks import registry
from benchmarks.features.files import KINDS
from benchmarks.metrics import METRICS, Metric
from benchmarks.suites import load_suite, suite_names
from shared.verbs import say

GROUPS = ("models", "suites", "metrics", "feature_files")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=GROUPS, help="only this group")
    parser.epilog = "A model may also be FAMILY:FOLDER, e.g. cogvideox:weights/CogVideoX-2b."
    parser.add_argument("--json", action="store_true", help="one JSON object instead of sentences")


def run(options: argparse.Namespace) -> None:
    groups: dict[str, dict[str, str]] = {
        "models": {name: preset.description for name, preset in registry.PRESETS.items()}
        | {
            f"{family}:FOLDER": registry.MEANING.get(family, "weights of your own")
            for family in registry.FAMILIES
        },
        "suites": {name: load_suite(name).description for name in suite_names()},
        "metrics": {name: f"{metric.recipe_id}  {metric_words(metric)}" for name, metric in METRICS.items()},
        "feature_files": dict(KINDS),
    }
    if options.what is not None:
        groups = {options.what: groups[options.what]}
    lines = [
        line
        for title, entries in groups.items()
        for line in (title, *(f"  {name:<32} {words}" for name, words in entries.items()), "")
    ]
    say(options, groups, lines[:-1])


def metric_words(metric: Metric) -> str:
    """The recipe, its warning, and the file it needs."""
    extra = [metric.mark, f"needs {metric.needs}=PATH" if metric.needs else ""]
    return "; ".join([metric.recipe, *filter(None, extra)])
