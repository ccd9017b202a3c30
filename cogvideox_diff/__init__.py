"""CogVideoX (Yang et al. 2024, arXiv 2408.06072): text, image or video to video by diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogvideox_diff.pipeline import CogVideoXPipeline

__all__ = ["CogVideoXPipeline"]


def __getattr__(name: str) -> Any:
    """Import on first use: the parts (configuration, nets, training) do not need the pipeline."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cogvideox_diff import pipeline

    return getattr(pipeline, name)
