"""Names of the models that a suite can ask for. The only place in the benchmark that knows the families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.suites import one_of
from shared.errors import SettingError
from shared.protocol import VideoGenerator


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


FAMILIES: dict[str, Callable[[str], VideoGenerator]] = {"cogvideo": _cogvideo, "cogvideox": _cogvideox}
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
