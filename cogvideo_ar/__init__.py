"""CogVideo (Hong et al. 2022): text to video, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogvideo_ar.config import PRESETS, CogVideoConfig
    from cogvideo_ar.options import Options
    from cogvideo_ar.pipeline import CogVideoPipeline

__all__ = ["PRESETS", "CogVideoConfig", "CogVideoPipeline", "Options"]

_HOMES = {
    "CogVideoPipeline": "pipeline",
    "CogVideoConfig": "config",
    "PRESETS": "config",
    "Options": "options",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first asked for: nets take seconds that --help need not pay."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"cogvideo_ar.{_HOMES[name]}"), name)
