"""The verb `train`: stages of a recipe; the last one writes a model folder for `generate --model_path`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from shared.training_cli import add_training_flags, chosen_recipe, chosen_stages, run_stages

add_arguments = add_training_flags


def run(options: argparse.Namespace) -> None:
    from cogvideo_ar.training.export import export
    from cogvideo_ar.training.recipes import RECIPES, STAGES, Run

    stages, recipe = chosen_stages(options.stage, STAGES), chosen_recipe(options, RECIPES)
    if recipe.continuous_steps >= recipe.vqvae.steps:  # a codec needs its codebook
        recipe = replace(recipe, continuous_steps=recipe.vqvae.steps // 3)
    work = Run(recipe, options.output_path, quiet=options.quiet or options.json)
    run_stages(options, work, stages, lambda folder: export(work, folder))
