"""What CLIP says of a video: does it show the text, and do its frames agree? Needs a CLIP folder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.metrics.base import Metric

NAME = "clip"
PREPARED = (
    "shorter side bicubically (PIL) to the folder's size, middle square, the folder's mean and deviation"
)

METRICS = (
    Metric(
        name=f"{NAME}/sim",
        title="CLIPSIM",
        recipe=f"mean over all frames of the cosine between CLIP's text and frame embeddings; {PREPARED}; "
        "the prompt is cut at the model's text length",
        needs="clip",
    ),
    Metric(
        name=f"{NAME}/consistency",
        title="CLIP temporal consistency",
        recipe=f"mean cosine between CLIP's embeddings of neighbouring frames; {PREPARED}",
        better="neither",
        per_frame_step=True,
        needs="clip",
    ),
)


def scores(frames_TD: Tensor, text_D: Tensor) -> dict[str, float]:
    """Both values from embeddings that need not be normalised; consistency only for two frames or more."""
    frames, text = F.normalize(frames_TD.double(), dim=-1), F.normalize(text_D.double(), dim=-1)
    values = {f"{NAME}/sim": float((frames @ text).mean())}
    if len(frames) > 1:
        values[f"{NAME}/consistency"] = float((frames[1:] * frames[:-1]).sum(1).mean())
    return values
