"""The verb `invert`: the noise that DDIM turns into a given video; its reconstruction; an edit of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox_diff.commands.encode import check_output, read_clip
from shared.errors import SettingError
from shared.verbs import add_output_flags, say

if TYPE_CHECKING:
    from cogvideox_diff.inversion import Inverted
    from cogvideox_diff.pipeline import CogVideoXPipeline
    from cogvideox_diff.planning import CallSettings, Plan
    from shared.video import Video


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input_path", type=Path, required=True, help="the video")
    parser.add_argument("--prompt", default="", help="what it shows")
    parser.add_argument("--output_path", type=Path, required=True, help="the .safetensors file of the noise")
    parser.add_argument("--reconstruct", action="store_true", help="also sample: NAME-reconstruction.mp4")
    parser.add_argument("--edit_prompt", help="also sample with this prompt, led by the video: NAME-edit.mp4")
    parser.add_argument("--edit_guidance_scale", type=float, help="of the edit (default: the model's own)")
    parser.add_argument("--iterations", type=int, default=5,
                        help="model calls for a step's inverse at most (default: 5); 1: the usual inversion")
    parser.add_argument("--model_path", default="demo", help="demo (the default) or a model folder")
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--guidance_scale", type=float, help="default: 1, no guidance")
    parser.add_argument("--negative_prompt", default="", help="what to guide away from")
    parser.add_argument("--num_frames", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--fit_frames", choices=("nearest", "pad", "trim"),
                        help="make another number of frames legal; pad repeats the last one")
    parser.add_argument("--frame_padding", choices=("front", "back"), default="front",
                        help="where 1.5 completes pairs of latent frames (default: front)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the model's own)")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:N, mps")
    parser.add_argument("--offload", choices=("none", "model", "sequential"), default="none",
                        help="weights wait on the CPU: nets, or their blocks")
    parser.add_argument("--tiling", action="store_true", help="code frames in tiles, which saves memory")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    add_output_flags(parser)
# fmt: on


def run(options: argparse.Namespace) -> None:
    """Everything is checked before the weights are read."""
    from cogvideox_diff.formats import check_weights, open_folder
    from cogvideox_diff.pipeline import CogVideoXPipeline
    from cogvideox_diff.planning import check_dtype, plan_inversion
    from shared.runtime import parse_device, parse_dtype, spare_threads

    folder = open_folder(options.model_path)
    check_output(options.output_path, (".safetensors",), options.overwrite)
    for path in _videos(options).values():
        check_output(path, (".mp4",), options.overwrite)
    if options.iterations < 1:
        raise SettingError(f"iterations must be at least 1, got {options.iterations}; nearest: 1")
    size = folder.config.geometry
    video = read_clip(options.input_path, size.fps, size.max_frames + 1)  # one more tells that it is too long
    call = _call_settings(options)
    plan = plan_inversion(folder.config, call, video)
    edited = None
    if options.edit_prompt is not None:
        scale = options.edit_guidance_scale
        scale = folder.config.sampling.guidance_scale if scale is None else scale
        edited = plan_inversion(folder.config, replace(call, guidance_scale=scale), video)
    dtype = folder.trained_dtype if options.dtype is None else parse_dtype(options.dtype)
    check_dtype(folder.trained_dtype, dtype)
    device = str(parse_device(options.device))
    check_weights(folder)
    pipeline = CogVideoXPipeline.from_pretrained(
        options.model_path, dtype=dtype, device=device, offload=options.offload, tiled=options.tiling
    )
    spare_threads(pipeline.parts.transformer, pipeline.parts.vae)
    result = _invert(pipeline, plan, edited, video, options)
    lines = [f"{name} {value}" for name, value in result.items()]
    say(options, {"ok": True, "exit_code": 0, **result}, lines)


def _invert(
    pipeline: CogVideoXPipeline, plan: Plan, edited: Plan | None, video: Video, options: argparse.Namespace
) -> dict[str, Any]:
    """Write what is asked for; returns what was measured."""
    from cogvideox_diff.codec import psnr
    from cogvideox_diff.inversion import decoded, edit, invert, reconstruct
    from shared.video_io import write_video

    engine, paths = pipeline.engine, _videos(options)
    with _progress(options, plan.num_steps) as moved:
        found = invert(engine, plan, options.prompt, video, iterations=options.iterations, callback=moved)
    _write(pipeline, plan, found, options)
    result: dict[str, Any] = {"path": str(options.output_path), "residual": found.residual}
    result |= {"noise_mean": float(found.noise.mean()), "noise_std": float(found.noise.std())}
    if options.reconstruct:
        latents = reconstruct(engine, plan, options.prompt, found)
        again = decoded(engine, plan, latents)
        write_video(again, paths["reconstruction"], overwrite=options.overwrite)
        result["reconstruction"] = str(paths["reconstruction"])
        result["latent_error"] = float((latents - found.clean).norm() / found.clean.norm())
        result["psnr"] = round(psnr(again, found.video), 3)
        result["psnr_of_the_vae"] = round(psnr(decoded(engine, plan, found.clean), found.video), 3)
    if edited is not None:
        latents = edit(engine, edited, options.prompt, options.edit_prompt, found)
        write_video(decoded(engine, edited, latents), paths["edit"], overwrite=options.overwrite)
        result["edit"] = str(paths["edit"])
    return result


def _write(pipeline: CogVideoXPipeline, plan: Plan, found: Inverted, options: argparse.Namespace) -> None:
    """The noise with all that `generate --latents_path` needs to go on from it."""
    from cogvideox_diff.formats import open_folder
    from cogvideox_diff.latent_files import LatentFile, write_latents
    from shared.model_folder import weights_mark

    size, sampling = plan.geometry, plan.sampling
    content = LatentFile(
        latents=found.noise[0].cpu(),
        kind="noise",
        scaling_factor=pipeline.config.vae.scaling_factor,
        fps=plan.fps,
        num_frames=size.num_frames,
        height=size.height,
        width=size.width,
        model=weights_mark(open_folder(options.model_path).path),
        settings={
            "prompt": options.prompt,
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "frame_padding": size.padding,
            "iterations": options.iterations,
            "residual": found.residual,
        },
    )
    write_latents(options.output_path, content, overwrite=options.overwrite)


def _call_settings(options: argparse.Namespace) -> CallSettings:
    from cogvideox_diff.planning import CallSettings

    names = ("negative_prompt", "num_frames", "height", "width", "num_inference_steps", "guidance_scale")
    names += ("fit_frames", "frame_padding")
    return CallSettings(**{name: getattr(options, name) for name in names})


def _videos(options: argparse.Namespace) -> dict[str, Path]:
    """What is asked for beside the noise, and where it goes."""
    wanted = {"reconstruction": options.reconstruct, "edit": options.edit_prompt is not None}
    path = options.output_path
    return {
        name: path.with_name(f"{path.stem}-{name}.mp4") for name, is_wanted in wanted.items() if is_wanted
    }


@contextmanager
def _progress(options: argparse.Namespace, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of the inversion's steps, to be called with (done, total)."""
    from tqdm import tqdm

    hidden = options.quiet or options.json or None
    with tqdm(total=total, unit="step", desc="inversion", disable=hidden) as bar:

        def moved(done: int, total: int) -> None:
            bar.update(done - bar.n)

        yield moved
