"""The verb `generate`: videos of prompts, also such that begin with a given image or with given frames."""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideo_ar.part_paths import PartPaths, add_part_flags, chosen_parts
from shared.config_cli import override_all
from shared.errors import SettingError
from shared.generation_cli import (
    IMAGE_SUFFIXES,
    Item,
    Order,
    add_generation_flags,
    read_prompts,
    run_generation,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cogvideo_ar.formats import ModelFolder
    from cogvideo_ar.options import Options
    from cogvideo_ar.pipeline import CogVideoPipeline
    from cogvideo_ar.translation import Translation
    from shared.video import Video


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_flags(parser, output="out/cogvideo-ar")
    parser.add_argument("--stages", choices=("1", "both"), default="both", help="1: only the key frames")
    parser.add_argument("--duration", type=float, help="seconds that the key frames span: their frame rate")
    parser.add_argument("--rounds", type=int, help="of interpolation; --num_frames says the same")
    parser.add_argument("--num_keyframes", type=int, help="default: as many as the model was trained with")
    parser.add_argument("--temperature", type=float, help="of all but the first frame")
    parser.add_argument("--top_k", type=int, help="clusters (or tokens) that a draw chooses from")
    parser.add_argument("--coglm_temperature2", type=float, help="factor on the temperature inside a cluster")
    parser.add_argument("--guidance_alpha", "--guidance_scale", type=float, dest="guidance_alpha",
                        help="of the key frames; 1 is no guidance")
    parser.add_argument("--super_resolution", help="none, direct or direct+iterative, where the model has it")
    parser.add_argument("--clusters", type=Path, help="a table of token clusters (.npy or .safetensors)")
    parser.add_argument("--image_or_video_path", type=Path,
                        help="the image, or the first frames, that every video begins with")
    parser.add_argument("--given_frames", type=int, help="how many of its first frames (default: all)")
    parser.add_argument("--fit_size", default="refuse",
                        help="given frames of another size: refuse (the default), crop or resize")
    parser.add_argument("--translation", type=Path,
                        help="prompts in the model's language: a .tsv or .json table PROMPT -> TRANSLATION")
    parser.add_argument("--offload", choices=("none", "model", "sequential", "auto"), default="none",
                        help="weights wait on the CPU: none, nets, or their blocks; changes no token")
    parser.add_argument("--quantize", choices=("none", "int8", "fp8"), default="none",
                        help="NOT exact: weights in 8 bits, by torchao (extra quant)")
    parser.add_argument("--compile", choices=("none", "graph"), default="none",
                        help="graph: a step of either stage as one CUDA graph")
    add_part_flags(parser)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class TranslatedOrder(Order):
    """An order whose items are finished only by the translation that their prompt has now."""

    translation: Translation

    def hash_of(self, item: Item) -> str:
        content = super().hash_of(item) + self.translation(item.prompt)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def run(options: argparse.Namespace) -> None:
    """Everything is checked before the weights are read."""
    from cogvideo_ar.clusters import clusters_mark
    from cogvideo_ar.continuation import Given, prefix_of
    from cogvideo_ar.formats import open_folder
    from cogvideo_ar.graph_step import check_compile
    from cogvideo_ar.memory import resolve_offload
    from cogvideo_ar.options import resolve
    from cogvideo_ar.pipeline import CogVideoPipeline, effective_settings
    from shared.protocol import GenerationRequest
    from shared.quantize import check_quantize
    from shared.runtime import parse_device, parse_dtype, spare_threads

    pointed = chosen_parts(options)
    folder = open_folder(options.model_path, pointed)
    sampling, wishes = override_all(folder.config.sampling, options.set), _wishes(options)
    config = replace(folder.config, sampling=sampling)
    plan = resolve(config, wishes)
    image, video = _frames(options, plan.num_frames + 1)  # one more tells that there are too many
    translation = _translation(options)
    given = Given(frames=video, fit_size=options.fit_size, translate=translation)
    prefix_of(config, plan, GenerationRequest(prompt="", image=image), given)
    clusters = _clusters(options, folder)
    dtype = folder.dtype if options.dtype is None else parse_dtype(options.dtype)
    device = parse_device(options.device)
    offload, why = resolve_offload(options.offload, config, plan, dtype, device)
    settings = effective_settings(
        plan,
        weights=folder.mark,
        dtype=dtype,
        device=device,
        clusters=None if clusters is None else clusters_mark(clusters),
    )
    check_compile(options.compile, device, offload=offload)
    if options.compile != "none":
        settings["compile"] = options.compile
    check_quantize(options.quantize)
    if options.quantize != "none":
        settings["approximate"] = {"quantize": options.quantize}

    def load() -> CogVideoPipeline:
        pipeline = CogVideoPipeline.from_pretrained(
            options.model_path,
            dtype=dtype,
            device=device,
            offload=offload,
            quantize=options.quantize,
            parts=pointed,
        )
        if options.offload != "none" and not (options.quiet or options.json):
            sys.stderr.write(f"memory: offload {offload}{why and f' ({why})'}\n")
        spare_threads(pipeline.parts.keyframes)
        pipeline.accelerate(options.compile)
        return pipeline.configured(wishes, sampling, given=given, clusters=clusters)

    order: dict[str, Any] = {"command": options.command, "settings": settings, "load": load}
    order |= {"image": image, "inputs": _described(options, image, video) | _told(pointed)}
    if translation is None:
        run_generation(Order(**order), options)
    else:
        run_generation(TranslatedOrder(**order, translation=translation), options)


def _wishes(options: argparse.Namespace) -> Options:
    from cogvideo_ar.options import Options

    wishes = Options(**{field.name: getattr(options, field.name) for field in fields(Options)})
    if options.stages == "both":
        return wishes
    if wishes.rounds:
        raise SettingError(f"--stages 1 leaves interpolation out, but --rounds asks for {wishes.rounds}")
    return replace(wishes, rounds=0)


def _frames(options: argparse.Namespace, most: int) -> tuple[Tensor | None, Video | None]:
    """The image or the frames that are given, by what the path names; of a film at most `most`."""
    from shared.video_io import read_image, read_video

    path, count = options.image_or_video_path, options.given_frames
    if path is None:
        if count is not None or options.fit_size != "refuse":
            raise SettingError("--given_frames and --fit_size need --image_or_video_path")
        return None, None
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if count not in (None, 1):
            raise SettingError(f"{path} is one image, --given_frames asks for {count}")
        return read_image(path), None
    if count is not None and count < 1:
        raise SettingError(f"given_frames must be at least 1, got {count}")
    video = read_video(path, max_frames=most if count is None else count)
    if count is not None and video.num_frames < count:
        raise SettingError(f"{path} has {video.num_frames} frames, --given_frames asks for {count}")
    return None, video


def _translation(options: argparse.Namespace) -> Translation | None:
    """The table, which has every prompt."""
    from cogvideo_ar.translation import read_translation

    if options.translation is None:
        return None
    translation = read_translation(options.translation)
    for prompt in read_prompts(options):
        translation(prompt)
    return translation


def _clusters(options: argparse.Namespace, folder: ModelFolder) -> Tensor | None:
    """The user's table, or the folder's."""
    from cogvideo_ar.clusters import read_clusters

    size = folder.config.keyframes.num_image_tokens
    path = options.clusters or folder.clusters
    return None if path is None else read_clusters(path, size)


def _told(parts: PartPaths) -> dict[str, Any]:
    """Where parts lie that the model's folder has not, and what they are."""
    from shared.model_folder import weights_mark

    marked = parts.marked
    found = {
        name: {"path": str(path), "mark": weights_mark(marked[name])} for name, path in parts.given.items()
    }
    return {"parts": found} if found else {}


def _described(options: argparse.Namespace, image: Tensor | None, video: Video | None) -> dict[str, Any]:
    frames = image if image is not None else None if video is None else video.frames
    if frames is None:
        return {}
    digest = hashlib.sha256(frames.contiguous().numpy().data).hexdigest()[:16]
    known = {"path": str(options.image_or_video_path), "fit_size": options.fit_size, "frames_sha256": digest}
    return known if video is None else known | {"given_frames": video.num_frames, "given_fps": video.fps}
