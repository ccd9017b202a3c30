"""The verb `train`: stages of a recipe; the last one writes a model folder for `generate --model_path`."""

from __future__ import annotations

import argparse

from shared.training_cli import add_training_flags, chosen_recipe, chosen_stages, run_stages

add_arguments = add_training_flags


def run(options: argparse.Namespace) -> None:
    from cogvideox_diff.training.export import export
    from cogvideox_diff.training.recipes import OPTIONAL, RECIPES, STAGES, Run

    legal = STAGES if options.stage == "all" else (*STAGES, *OPTIONAL)
    stages, recipe = chosen_stages(options.stage, legal), chosen_recipe(options, RECIPES)
    work = Run(recipe, options.output_path, quiet=options.quiet or options.json)
    run_stages(options, work, stages, lambda folder: export(work, folder))
