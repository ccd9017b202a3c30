"""The verb `plan`: memory, disk, steps and time of a call, before any weights are read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from cogvideo_ar.part_paths import add_part_flags, chosen_parts, refuse_parts
from shared.config_cli import override_all, pick
from shared.errors import SettingError
from shared.plan_cli import Planned, Rung, add_plan_flags, planned_device, run_plan

if TYPE_CHECKING:
    import torch

    from cogvideo_ar.config import CogVideoConfig
    from cogvideo_ar.options import Options, Plan
    from shared.costs import Device

NAMES = ("cogvideo-demo", "cogvideo")
WISHES = ("num_frames", "height", "width", "duration", "rounds", "num_keyframes", "guidance_alpha",
          "super_resolution")  # fmt: skip


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_flags(parser, NAMES)
    parser.add_argument("--stages", choices=("1", "both"), default="both", help="1: only the key frames")
    parser.add_argument("--duration", type=float, help="seconds that the key frames span: their frame rate")
    parser.add_argument("--rounds", type=int, help="of interpolation; --num_frames says the same")
    parser.add_argument("--num_keyframes", type=int, help="default: as many as the model was trained with")
    parser.add_argument("--guidance_alpha", "--guidance_scale", type=float, dest="guidance_alpha",
                        help="of the key frames; 1 is no guidance")
    parser.add_argument("--super_resolution", help="none, direct or direct+iterative, where the model has it")
    parser.add_argument("--offload", choices=("none", "model", "sequential"), default="none",
                        help="weights wait on the CPU: nets, or their blocks")
    parser.add_argument("--text_len", type=int, help="tokens of the prompt (default: as in training)")
    add_part_flags(parser)
# fmt: on


def run(options: argparse.Namespace) -> int | None:
    from cogvideo_ar.costs import stage_costs
    from cogvideo_ar.options import resolve
    from shared.costs import stored_weights
    from shared.runtime import parse_dtype

    config, trained, name = _model(options)
    config = replace(config, sampling=override_all(config.sampling, options.set))
    plan = resolve(config, _wishes(options))
    _check_text(config, options.text_len)
    dtype = trained if options.dtype is None else parse_dtype(options.dtype)
    everything = stage_costs(config, resolve(config, _everything(config)), trained)
    planned = Planned(
        title=f"{name}: {plan.num_frames} frames of {plan.height}x{plan.width} in {plan.num_keyframes} key "
        f"frames and {plan.num_rounds} rounds, {_word(dtype)}",
        settings=_settings(name, plan, dtype, options),
        device=(device := planned_device(options)),
        rungs=_rungs(config, plan, dtype, options, device),
        disk_weights=stored_weights(everything),
        video_bytes=plan.num_frames * plan.height * plan.width * 3 * options.batch,
    )
    return run_plan(planned, options)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _settings(name: str, plan: Plan, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    from shared.config_io import to_plain

    return {
        "model": name,
        "num_frames": plan.num_frames,
        "num_keyframes": plan.num_keyframes,
        "height": plan.height,
        "width": plan.width,
        "sampling": to_plain(plan.sampling),
        "dtype": _word(dtype),
        "offload": options.offload,
        "batch": options.batch,
    }


def _model(options: argparse.Namespace) -> tuple[CogVideoConfig, torch.dtype, str]:
    """(configuration, the type of its weights, what it is called); the released preset comes with the
    super-resolution that was released beside it."""
    import torch

    from cogvideo_ar.config import PRESETS, cogview2_dsr
    from cogvideo_ar.formats import open_folder

    if options.preset is None:
        parts = chosen_parts(options)
        folder = open_folder(options.model_path, parts)
        named = options.model_path if folder.path is not None else parts.stage1_path
        return folder.config, folder.dtype, str(named)
    refuse_parts(options, "a preset has no files; leave --preset out")
    config = pick("preset", options.preset, PRESETS)()
    if options.preset == "cogvideo":
        return replace(config, super_resolution=cogview2_dsr()), torch.float16, options.preset
    return config, torch.float32, options.preset


def _wishes(options: argparse.Namespace) -> Options:
    from cogvideo_ar.options import Options

    legal = {field.name for field in fields(Options)}
    wishes = Options(**{name: getattr(options, name) for name in WISHES if name in legal})
    if options.stages == "both":
        return wishes
    if wishes.rounds:
        raise SettingError(f"--stages 1 leaves interpolation out, but --rounds asks for {wishes.rounds}")
    return replace(wishes, rounds=0)


def _everything(config: CogVideoConfig) -> Options:
    """A call that uses all nets."""
    from cogvideo_ar.options import Options

    return Options(super_resolution=None if config.refinement is None else "direct+iterative")


def _check_text(config: CogVideoConfig, text_len: int | None) -> None:
    most = config.keyframes.image_position_offset
    if text_len is not None and not 1 <= text_len <= most:
        raise SettingError(f"text_len must be in 1..{most}, got {text_len}")


# ---- the ladder


def _rungs(
    config: CogVideoConfig, plan: Plan, dtype: torch.dtype, options: argparse.Namespace, device: Device
) -> Iterator[Rung]:
    """As asked, then with more and more savers; smaller batches and offloading change no token."""
    import torch

    modes = ["none", "model", "sequential"]
    modes = modes[modes.index(options.offload) :] if device.name != "cpu" else [options.offload]
    most = plan.sampling.max_batch
    smaller = [most, *([1] if most > 1 and plan.num_rounds else [])]
    dtypes = [dtype, *([torch.float16] if dtype.itemsize > 2 and device.name != "cpu" else [])]
    for kind in dtypes:
        for mode in modes:
            for batch in smaller:
                words = [f"--dtype {_word(kind)}" if kind != dtype else ""]
                words += [f"--offload {mode}" if mode != options.offload else ""]
                words += [f"--set max_batch={batch}" if batch != most else ""]
                yield _rung(config, plan, kind, mode, batch, " ".join(filter(None, words)), options, device)
    if plan.fine_draw is not None:
        small = replace(plan, fine_draw=None, refinement=())
        words = [f"--offload {modes[-1]}" if modes[-1] != options.offload else "", "--super_resolution none"]
        yield _rung(config, small, dtypes[-1], modes[-1], 1, " ".join(filter(None, words)), options, device)


def _rung(
    config: CogVideoConfig,
    plan: Plan,
    dtype: torch.dtype,
    mode: Any,
    max_batch: int,
    flags: str,
    options: argparse.Namespace,
    device: Device,
) -> Rung:
    from cogvideo_ar.costs import stage_costs

    chosen = replace(plan, sampling=replace(plan.sampling, max_batch=max_batch))
    counts = {"text_len": options.text_len, "samples": options.batch}
    stages = stage_costs(config, chosen, dtype, **counts, on_cpu=device.name == "cpu")
    return Rung(flags=flags, mode=mode, dtype=dtype, stages=stages)
