"""The verb `train`, as far as it is the same for every model: a preset's recipe, its stages in order, a model
folder at the end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from shared.config_cli import nearest, override_all, pick
from shared.errors import SettingError
from shared.generation_cli import check_writable
from shared.runtime import parse_device
from shared.training import TrainConfig
from shared.training_memory import RECOMPUTE
from shared.training_parallel import ALONE, PARALLEL, Strategy, started_strategy
from shared.verbs import add_output_flags, say

RecipeT = TypeVar("RecipeT")
EXPORT = "export"


class TrainingRun(Protocol):
    """A recipe at work in a folder; a dataclass. `spread` names the stages that several processes share."""

    strategy: Strategy
    spread: ClassVar[frozenset[str]]

    def stage(self, name: str) -> None: ...


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Presets and stages are checked by the verb, so that --help needs no nets."""
    parser.add_argument("--preset", default="demo", help="which recipe (default: demo)")
    parser.add_argument("--stage", default="all", help="one stage, export, or all (the default)")
    parser.add_argument("--output_path", type=Path, required=True, help="where stages keep what they make")
    parser.add_argument("--steps", type=int, help="of every stage, instead of the recipe's")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                        help="other settings of the recipe, e.g. vqvae.lr=1e-3")  # fmt: skip
    parser.add_argument("--parallel", choices=PARALLEL, default="none",
                        help="torchrun's processes: ddp adds up gradients, fsdp shards all")  # fmt: skip
    parser.add_argument("--activation_checkpointing", choices=RECOMPUTE, default="none",
                        help="what transformer blocks compute twice to save memory")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
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
    run: Any,  # a TrainingRun; that it is a dataclass, a protocol cannot say
    stages: Sequence[str],
    export: Callable[[Path], object],
) -> None:
    """Run the chosen stages, each resuming itself; `export` writes the model folder OUTPUT_PATH/model.

    Of several processes all run the stages that can be shared, and the main one alone the others."""
    check_writable(options.output_path)
    model = options.output_path / "model"
    with started_strategy(
        options.parallel,
        os.environ,
        activation_checkpointing=options.activation_checkpointing,
        device=parse_device(options.device),
    ) as strategy:
        together = replace(run, strategy=strategy)
        alone = replace(run, strategy=replace(ALONE, device=strategy.device))
        for name in stages:
            if name in run.spread:
                together.stage(name)
            elif strategy.is_main:
                export(model) if name == EXPORT else alone.stage(name)
            strategy.wait()
    if strategy.is_main:
        _say(options, stages, model)


def _say(options: argparse.Namespace, stages: Sequence[str], model: Path) -> None:
    done = {"ok": True, "exit_code": 0, "stages": list(stages), "folder": str(options.output_path)}
    if EXPORT in stages:
        done["model"] = str(model)
    say(options, done, [str(done.get("model", done["folder"]))])


def tell_tuned(
    options: argparse.Namespace, path: Path, told: Mapping[str, Any], skipped: Sequence[Mapping[str, Any]]
) -> None:
    """What a verb `finetune` says at its end: the result, and the clips that it had to do without."""
    rows = [f"left out: clip {row['number']} ({row['video']}): {row['reason']}" for row in skipped]
    counted = [f"{len(skipped)} clips were left out"] if skipped else []
    found = {"path": str(path), "num_skipped": len(skipped), "skipped": list(skipped)}
    say(options, {"ok": True, "exit_code": 0, **found, **told}, [*rows, *counted, str(path)])
