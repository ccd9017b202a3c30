"""Names of the models that a suite can ask for. The only place in the benchmark that knows the families."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.suites import one_of
from shared.errors import SettingError, UserError
from shared.protocol import VideoGenerator

if TYPE_CHECKING:
    from shared.costs import StageCost


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model by name: its family and where its weights come from ("demo" or a folder)."""

    name: str
    family: str
    source: str
    description: str = ""


def _cogvideo(source: str) -> VideoGenerator:
    from cogvideo_ar import CogVideoPipeline

    return CogVideoPipeline.from_pretrained(source)


def _cogvideox(source: str) -> VideoGenerator:
    from cogvideox_diff import CogVideoXPipeline

    return CogVideoXPipeline.from_pretrained(source)


def _external(source: str) -> VideoGenerator:
    from benchmarks.imports import ImportedVideos

    return ImportedVideos.open(Path(source))


def _diffusers(source: str) -> VideoGenerator:
    """With the size and the sampling that our own pipeline would use for these weights."""
    from benchmarks.peers.generator import DiffusersVideos, PeerCall
    from cogvideox_diff.formats import open_folder

    folder = open_folder(source)
    config, size, sampling = folder.config, folder.config.geometry, folder.config.sampling
    call = PeerCall(
        num_frames=size.num_frames,
        height=size.height,
        width=size.width,
        fps=size.fps,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        use_dynamic_cfg=bool(sampling.dynamic_cfg),
        text_len=config.text.text_len,
        dtype=folder.trained_dtype,
    )
    return DiffusersVideos.open(Path(source), call)


def _cogvideo_costs(source: str, settings: Mapping[str, Any]) -> list[StageCost]:
    from cogvideo_ar.costs import stage_costs
    from cogvideo_ar.formats import open_folder
    from cogvideo_ar.options import Options, resolve
    from shared.config_io import to_plain
    from shared.runtime import parse_dtype

    config = open_folder(source).config
    plan = resolve(config, Options())
    made = {name: getattr(plan, name) for name in ("num_frames", "num_keyframes", "height", "width")}
    same = _agree(settings, {**made, "sampling": to_plain(plan.sampling)})
    on_cpu = str(settings.get("device", "cpu")) == "cpu"
    return stage_costs(config, plan, parse_dtype(settings["dtype"]), on_cpu=on_cpu) if same else []


def _cogvideox_costs(source: str, settings: Mapping[str, Any]) -> list[StageCost]:
    from cogvideox_diff.costs import stage_costs
    from cogvideox_diff.formats import open_folder
    from cogvideox_diff.planning import check_request, tasks_of
    from shared.runtime import parse_dtype

    config = open_folder(source).config
    if "t2v" not in tasks_of(config):
        return []
    plan = check_request(config)
    size = {name: getattr(plan.geometry, name) for name in ("num_frames", "height", "width")}
    sampling = {name: getattr(plan.sampling, name) for name in ("num_inference_steps", "guidance_scale")}
    tiled = bool(settings.get("tiled"))
    same = _agree(settings, {**size, **sampling})
    return stage_costs(config, plan, parse_dtype(settings["dtype"]), tiled=tiled) if same else []


def _agree(settings: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Was the run made with the model's own settings?"""
    return "dtype" in settings and all(settings.get(name) == value for name, value in own.items())


PACKAGES = {"cogvideo": "cogvideo_ar", "cogvideox": "cogvideox_diff"}


def module(family: str, name: str) -> Any:
    """A module of a family's package, e.g. ("cogvideox", "vae.autoencoder"), to time single nets."""
    return importlib.import_module(f"{PACKAGES[family]}.{name}")


FAMILIES: dict[str, Callable[[str], VideoGenerator]] = {
    "cogvideo": _cogvideo,
    "cogvideox": _cogvideox,
    "diffusers": _diffusers,
    "external": _external,
}
MEANING = {
    "diffusers": "weights of your own in diffusers' pipeline (extra `peers`)",
    "external": "videos that were made elsewhere, as `import_videos` reads them",
}
COSTS: dict[str, Callable[[str, Mapping[str, Any]], list[StageCost]]] = {
    "cogvideo": _cogvideo_costs,
    "cogvideox": _cogvideox_costs,
}
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="cogvideo-demo",
            family="cogvideo",
            source="demo",
            description="CogVideo 2022, autoregressive: key frames, then interpolation; demo weights",
        ),
        Preset(
            name="cogvideox-demo",
            family="cogvideox",
            source="demo",
            description="CogVideoX 2024, diffusion: expert transformer over causal 3D latents; demo weights",
        ),
    )
}


def resolve(name: str) -> Preset:
    """A preset by name, or FAMILY:FOLDER for weights of one's own, e.g. `cogvideox:weights/CogVideoX-2b`."""
    family, colon, source = name.partition(":")
    if not colon:
        one_of("model", name, [*PRESETS, *(f"{family}:FOLDER" for family in FAMILIES)])
        if name not in PRESETS:
            raise SettingError(f"model {name!r}: FOLDER stands for a folder of weights")
        return PRESETS[name]
    one_of("family", family, list(FAMILIES))
    if not Path(source).is_dir():
        raise SettingError(f"model {name!r}: there is no folder {source!r}")
    return Preset(name=name, family=family, source=source, description=f"weights of {source}")


def build(name: str) -> VideoGenerator:
    """Load the model that `name` stands for. Raises SettingError for a name, WeightsError for its weights."""
    preset = resolve(name)
    return FAMILIES[preset.family](preset.source)


def descriptions(models: Sequence[str] | dict[str, Any]) -> dict[str, str]:
    """A line on each model that the registry knows."""
    return {name: PRESETS[name].description for name in models if name in PRESETS}


def cost_models(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the cost model says of the models of a run.json; those whose configuration is not there, or that
    were run with other settings than their own, are left out."""
    from benchmarks.expected import cost_model
    from shared.runtime import parse_dtype

    found = {}
    for name, described in models.items():
        settings = described["settings"]
        try:
            preset = resolve(name)
            stages = COSTS[preset.family](preset.source, settings)
        except (UserError, KeyError):  # no such folder any more, or a family without a cost model
            continue
        if stages:
            found[name] = cost_model(stages, parse_dtype(settings["dtype"]))
    return found
