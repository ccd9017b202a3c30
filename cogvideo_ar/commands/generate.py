"""The verb `generate`: videos of prompts."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from shared.config_cli import override_all
from shared.errors import SettingError
from shared.generation_cli import Order, add_generation_flags, run_generation

if TYPE_CHECKING:
    from cogvideo_ar.options import Options
    from cogvideo_ar.pipeline import CogVideoPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_flags(parser, output="out/cogvideo-ar")
    parser.add_argument("--stages", choices=("1", "both"), default="both", help="1: only the key frames")
    parser.add_argument("--duration", type=float, help="seconds that the key frames span: their frame rate")
    parser.add_argument("--rounds", type=int, help="of interpolation; --num_frames says the same")
    parser.add_argument("--temperature", type=float, help="of all but the first frame")
    parser.add_argument("--top_k", type=int, help="clusters (or tokens) that a draw chooses from")
    parser.add_argument("--coglm_temperature2", type=float, help="factor on the temperature inside a cluster")
    parser.add_argument("--guidance_alpha", "--guidance_scale", type=float, dest="guidance_alpha",
                        help="of the key frames; 1 is no guidance")  # fmt: skip


def run(options: argparse.Namespace) -> None:
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

    run_generation(Order(command=options.command, settings=settings, load=load), options)


def _wishes(options: argparse.Namespace) -> Options:
    from cogvideo_ar.options import Options

    wishes = Options(**{field.name: getattr(options, field.name) for field in fields(Options)})
    if options.stages == "both":
        return wishes
    if wishes.rounds:
        raise SettingError(f"--stages 1 leaves interpolation out, but --rounds asks for {wishes.rounds}")
    return replace(wishes, rounds=0)
