"""The verb `train`, as far as it is the same for every model: a preset's recipe, its stages in order, a model
folder at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from shared.config_cli import nearest, override_all, pick
from shared.errors import SettingError
from shared.generation_cli import check_writable
from shared.training import TrainConfig
from shared.verbs import add_output_flags, say

RecipeT = TypeVar("RecipeT")
EXPORT = "export"


class TrainingRun(Protocol):
    """A recipe at work in a folder."""

    def stage(self, name: str) -> None: ...


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Presets and stages are checked by the verb, so that --help needs no nets."""
    parser.add_argument("--preset", default="demo", help="which recipe (default: demo)")
    parser.add_argument("--stage", default="all", help="one stage, export, or all (the default)")
    parser.add_argument("--output_path", type=Path, required=True, help="where stages keep what they make")
    parser.add_argument("--steps", type=int, help="of every stage, instead of the recipe's")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                        help="other settings of the recipe, e.g. vqvae.lr=1e-3")  # fmt: skip
    add_output_flags(parser)


def chosen_recipe(options: argparse.Namespace, recipes: Mapping[str, Callable[[], RecipeT]]) -> RecipeT:
    """The preset's recipe with --steps and --set."""
    recipe: Any = pick("preset", options.preset, recipes)()
    if options.steps is not None:
        trained = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
        trained = {name: x for name, x in trained.items() if isinstance(x, TrainConfig)}
        recipe = replace(recipe, **{name: replace(x, steps=options.steps) for name, x in trained.items()})
    return override_all(recipe, options.set)


def chosen_stages(name: str, stages: Sequence[str]) -> list[str]:
    """`all` is every stage and the export; SettingError lists the legal names."""
    legal = [*stages, EXPORT]
    if name == "all":
        return legal
    if name not in legal:
        raise SettingError(f"unknown stage {name!r}{nearest(name, legal)}; legal: {', '.join(legal)}, all")
    return [name]


def run_stages(
    options: argparse.Namespace,
    run: TrainingRun,
    stages: Sequence[str],
    export: Callable[[Path], object],
) -> None:
    """Run the chosen stages, each resuming itself; `export` writes the model folder OUTPUT_PATH/model."""
    check_writable(options.output_path)
    model = options.output_path / "model"
    for name in stages:
        if name == EXPORT:
            export(model)
        else:
            run.stage(name)
    done = {"ok": True, "exit_code": 0, "stages": list(stages), "folder": str(options.output_path)}
    if EXPORT in stages:
        done["model"] = str(model)
    say(options, done, [str(done.get("model", done["folder"]))])
