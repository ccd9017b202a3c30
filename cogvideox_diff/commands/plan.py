"""The verb `plan`: memory, disk, steps and time of a call, before any weights are read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shared.config_cli import override_all, pick
from shared.errors import SettingError
from shared.plan_cli import Planned, Rung, add_plan_flags, planned_device, run_plan

if TYPE_CHECKING:
    import torch

    from cogvideox_diff.config import CogVideoXConfig
    from cogvideox_diff.planning import CallSettings, Plan
    from shared.costs import Device

NAMES = ("cogvideox-demo", "cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox-1.5-5b",
         "cogvideox-1.5-5b-i2v")  # fmt: skip
TRAINED_IN = {"cogvideox-demo": "float32", "cogvideox-2b": "float16"}  # all others: bfloat16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_flags(parser, NAMES)
    parser.add_argument(
        "--generate_type", choices=("t2v", "i2v", "v2v"), help="default: what the model makes"
    )
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--guidance_scale", type=float, help="up to 1: no guidance")
    parser.add_argument("--strength", type=float, help="of v2v, 0..1: how much of the video is made anew")
    parser.add_argument("--offload", choices=("none", "model", "sequential"), default="none")
    parser.add_argument("--tiling", nargs="?", choices=("off", "on"), const="on", default="off")
    parser.add_argument("--quantize", choices=("none", "int8", "fp8"), default="none")


def run(options: argparse.Namespace) -> int | None:
    from shared.runtime import parse_dtype

    config, trained, name = _model(options)
    config = replace(config, sampling=override_all(config.sampling, options.set))
    plan = _plan(config, options, options.num_frames)
    dtype = trained if options.dtype is None else parse_dtype(options.dtype)
    device = planned_device(options)
    size = plan.geometry
    video = size.num_frames * size.height * size.width * 3 * options.batch
    how = f"{plan.num_steps} steps{', guided' if plan.guided else ''}, {_word(dtype)}"
    planned = Planned(
        title=f"{name}: {size.num_frames} frames of {size.height}x{size.width}, {how}",
        settings={**plan.settings(), "model": name, "dtype": _word(dtype), "offload": options.offload,
                  "tiling": options.tiling, "quantize": options.quantize, "batch": options.batch},
        device=device,
        rungs=_rungs(config, plan, dtype, options, device),
        disk_weights=_weights_on_disk(config, trained),
        video_bytes=video,
    )  # fmt: skip
    return run_plan(planned, options)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _model(options: argparse.Namespace) -> tuple[CogVideoXConfig, torch.dtype, str]:
    """(configuration, the type that the model was trained in, what it is called)."""
    from cogvideox_diff.config import PRESETS
    from cogvideox_diff.formats import open_folder
    from shared.runtime import parse_dtype

    if options.preset is None:
        folder = open_folder(options.model_path)
        return folder.config, folder.trained_dtype, str(options.model_path)
    make = pick("preset", options.preset, PRESETS)
    return make(), parse_dtype(TRAINED_IN.get(options.preset, "bfloat16")), options.preset


def _plan(config: CogVideoXConfig, options: argparse.Namespace, num_frames: int | None) -> Plan:
    """The checked call, with a black image or video where one is needed."""
    import torch

    from cogvideox_diff.planning import check_request, tasks_of
    from shared.video import Video

    call = _call(options, num_frames)
    native = config.geometry
    height, width = options.height or native.height, options.width or native.width
    legal = tasks_of(config)
    task = options.generate_type or ("i2v" if legal == {"i2v"} else "t2v")
    if task == "i2v":
        return check_request(config, call, image=torch.zeros(height, width, 3, dtype=torch.uint8))
    if task == "v2v":
        frames = torch.zeros(num_frames or native.num_frames, height, width, 3, dtype=torch.uint8)
        return check_request(config, call, video=Video(frames=frames, fps=native.fps))
    return check_request(config, call)


def _call(options: argparse.Namespace, num_frames: int | None) -> CallSettings:
    from cogvideox_diff.planning import CallSettings

    return CallSettings(
        num_frames=num_frames,
        height=options.height,
        width=options.width,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        strength=options.strength,
    )


def _weights_on_disk(config: CogVideoXConfig, trained: torch.dtype) -> int:
    from cogvideox_diff.memory import net_bytes

    return sum(whole for whole, _ in net_bytes(config, trained, "none").values())


# ---- the ladder


def _rungs(
    config: CogVideoXConfig, plan: Plan, dtype: torch.dtype, options: argparse.Namespace, device: Device
) -> Iterator[Rung]:
    """As asked, then with more and more savers: what changes nothing but time comes first, tiles change the
    frames a little, 8-bit weights more, fewer frames are another video."""
    asked: dict[str, Any] = {
        "mode": options.offload,
        "tiled": options.tiling == "on",
        "quantize": options.quantize,
    }
    seen: list[dict[str, Any]] = []
    for more in _more_savers(dtype, on_cpu=device.name == "cpu"):
        chosen = {**asked, "dtype": dtype, **more}
        if _weaker(chosen, asked) or chosen in seen:
            continue
        seen.append(chosen)
        yield _rung(config, plan, options, _flags({**asked, "dtype": dtype}, chosen), chosen)
    if not seen:
        return
    for count in _fewer_frames(config, plan):
        shorter = _plan(config, options, count)
        flags = " ".join([_flags({**asked, "dtype": dtype}, seen[-1]), f"--num_frames {count}"]).strip()
        yield _rung(config, shorter, options, flags, seen[-1])


def _more_savers(dtype: torch.dtype, *, on_cpu: bool) -> list[dict[str, Any]]:
    import torch

    half = {} if dtype.itemsize == 2 else {"dtype": torch.bfloat16}
    modes = [{}] if on_cpu else [{}, {"mode": "model"}, {"mode": "sequential"}]
    tiles = [{**mode, "tiled": True} for mode in modes]
    least = tiles[-1]
    return [*modes, *tiles, {**least, **half}, {**least, **half, "quantize": "int8"}]


def _weaker(chosen: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a saver that was asked for is missing."""
    modes = ("none", "model", "sequential")
    return modes.index(chosen["mode"]) < modes.index(asked["mode"]) or asked["tiled"] > chosen["tiled"]


def _flags(asked: dict[str, Any], chosen: dict[str, Any]) -> str:
    words = {
        "mode": f"--offload {chosen['mode']}",
        "tiled": "--tiling on",
        "dtype": f"--dtype {_word(chosen['dtype'])}",
        "quantize": f"--quantize {chosen['quantize']}",
    }
    return " ".join(word for name, word in words.items() if chosen[name] != asked[name])


def _fewer_frames(config: CogVideoXConfig, plan: Plan) -> list[int]:
    """About half and a quarter of the frames, by legal counts."""
    from cogvideox_diff.geometry import nearest_frames

    step, count = config.geometry.frame_step, plan.geometry.num_frames
    counts = [nearest_frames(count // part, step) for part in (2, 4)]
    return [number for number in dict.fromkeys(counts) if 1 < number < count]


def _rung(
    config: CogVideoXConfig, plan: Plan, options: argparse.Namespace, flags: str, chosen: dict[str, Any]
) -> Rung:
    from cogvideox_diff.costs import stage_costs

    if options.batch < 1:
        raise SettingError(f"batch must be at least 1, got {options.batch}")
    stages = stage_costs(
        config,
        plan,
        chosen["dtype"],
        tiled=chosen["tiled"],
        quantize=chosen["quantize"],
        batch=options.batch,
    )
    return Rung(flags=flags, mode=chosen["mode"], dtype=chosen["dtype"], stages=stages)
