"""CogVideo from the command line: `python -m cogvideo_ar generate --prompt "a red circle"`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shared.config_cli import FlagParser, override_all
from shared.errors import SettingError
from shared.generation_cli import Order, add_generation_flags, add_output_flags, run_generation, run_verbs
from shared.training_cli import add_training_flags, chosen_recipe, chosen_stages, run_stages

if TYPE_CHECKING:
    from cogvideo_ar.options import Options

PROG = "cogvideo-ar"


def build_parser() -> FlagParser:
    """The verbs and their flags."""
    parser = FlagParser(prog=PROG, description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, words, add in (
        ("generate", "make videos of prompts", _add_generate),
        ("train", "train a preset's model", add_training_flags),
        ("convert", "write a model folder of the released weights", _add_convert),
    ):
        verb = verbs.add_parser(name, help=words, description=words)
        add(verb)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add_generation_flags(parser, output="out/cogvideo-ar")
    parser.add_argument("--stages", choices=("1", "both"), default="both", help="1: only the key frames")
    parser.add_argument("--duration", type=float, help="seconds that the key frames span: their frame rate")
    parser.add_argument("--rounds", type=int, help="of interpolation; --num_frames says the same")
    parser.add_argument("--temperature", type=float, help="of all but the first frame")
    parser.add_argument("--top_k", type=int, help="clusters (or tokens) that a draw chooses from")
    parser.add_argument("--coglm_temperature2", type=float, help="factor on the temperature inside a cluster")
    parser.add_argument("--guidance_alpha", "--guidance_scale", type=float, dest="guidance_alpha",
                        help="of the key frames; 1 is no guidance")  # fmt: skip


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_path", required=True, help="a folder with the released parts")
    parser.add_argument("--output_path", type=Path, required=True, help="the model folder to write")
    parser.add_argument(
        "--stage1_path", type=Path, help="stage 1's checkpoint, where its folder does not say"
    )
    parser.add_argument("--stage2_path", type=Path, help="stage 2's checkpoint, likewise")
    parser.add_argument(
        "--dtype", help="of the stored weights: float32, bfloat16 or float16 (default: as is)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    add_output_flags(parser)


def generate(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Everything is checked before the weights are read."""
    from cogvideo_ar.formats import open_folder
    from cogvideo_ar.options import resolve
    from cogvideo_ar.pipeline import CogVideoPipeline, effective_settings
    from shared.model_folder import weights_mark
    from shared.runtime import parse_device, parse_dtype, spare_threads

    folder = open_folder(options.model_path)
    config = folder.config
    sampling, wishes = override_all(config.sampling, options.set), _wishes(options)
    dtype = folder.dtype if options.dtype is None else parse_dtype(options.dtype)
    device = parse_device(options.device)
    settings = effective_settings(
        resolve(replace(config, sampling=sampling), wishes),
        weights=weights_mark(folder.path),
        dtype=dtype,
        device=device,
        clusters=folder.has_clusters,
    )

    def load() -> CogVideoPipeline:
        pipeline = CogVideoPipeline.from_pretrained(folder.path, dtype=dtype, device=device)
        spare_threads(pipeline.parts.keyframes)
        return pipeline.configured(wishes, sampling)

    return run_generation(Order(command=(PROG, *argv), settings=settings, load=load), options)


def _wishes(options: argparse.Namespace) -> Options:
    from cogvideo_ar.options import Options

    wishes = Options(**{field.name: getattr(options, field.name) for field in fields(Options)})
    if options.stages == "both":
        return wishes
    if wishes.rounds:
        raise SettingError(f"--stages 1 leaves interpolation out, but --rounds asks for {wishes.rounds}")
    return replace(wishes, rounds=0)


def train(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Stages of a recipe; the last one writes a model folder for `generate --model_path`."""
    from cogvideo_ar.training.export import export
    from cogvideo_ar.training.recipes import RECIPES, STAGES, Run

    stages, recipe = chosen_stages(options.stage, STAGES), chosen_recipe(options, RECIPES)
    if recipe.continuous_steps >= recipe.vqvae.steps:  # a codec needs its codebook
        recipe = replace(recipe, continuous_steps=recipe.vqvae.steps // 3)
    run = Run(recipe, options.output_path, quiet=options.quiet or options.json)
    return run_stages(options, run, stages, lambda folder: export(run, folder))


def convert(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Write a model folder and say where."""
    from cogvideo_ar.formats import convert_folder
    from shared.runtime import parse_dtype

    path = convert_folder(
        options.model_path,
        options.output_path,
        stage1_path=options.stage1_path,
        stage2_path=options.stage2_path,
        dtype=None if options.dtype is None else parse_dtype(options.dtype),
        overwrite=options.overwrite,
    )
    said = {"ok": True, "exit_code": 0, "path": str(path)}
    sys.stdout.write((json.dumps(said) if options.json else str(path)) + "\n")
    return 0


VERBS = {"generate": generate, "train": train, "convert": convert}


def _main(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    return VERBS[options.verb](options, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    return run_verbs(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
