"""One number for a set of videos: distances from reference videos, and the inception score.

Each distance is measured twice, as CogVideo's paper does with FVD and FVD*: against true clips, and
(`/codec`) against the same clips passed through the model's own codec, which takes the codec's loss out.
`/limit` is the distance extrapolated to infinitely many videos; the difference from the plain value is the
sample-size bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.metrics.base import Metric
from benchmarks.metrics.frechet import extrapolated, frechet_distance, inception_score, kernel_distance
from benchmarks.metrics.fvd import PRESETS

Array = NDArray[np.float64]
Reference = Literal["truth", "codec", "none"]

FIXED, OWN, C3D = "fixed", "own", "c3d"  # names of feature nets beside those of the FVD presets
FIXED_MARK = "fixed-seed features, not comparable with published FVD"
MIN_VIDEOS = 8  # a covariance of fewer says nothing
MIN_LIMIT = 16  # videos, so that half of them still make a set
SPLITS, SCORE_SEED = 10, 42
PAIRING = "one video per prompt, as many reference clips as videos, of the same captions"
AGAINST = {
    "truth": "against true clips",
    "codec": "against true clips passed through the model's own codec",
}


@dataclass(frozen=True, kw_only=True)
class SetMetric:
    """A metric over sets: which net's features, compared with what, by which pure function, and how many
    videos it needs at least."""

    metric: Metric
    features: str
    reference: Reference
    least: int
    distance: Callable[[Array, Array], float] = frechet_distance
    limit: bool = False

    def value(self, made_ND: Array, reference_ND: Array | None, ids_N: NDArray[np.int64]) -> float:
        """Of sets whose members are named by `ids_N`; the score alone has no reference."""
        if reference_ND is None:
            return inception_score(made_ND, splits=SPLITS)
        if self.limit:
            return extrapolated(self.distance, made_ND, reference_ND, ids_N)
        return self.distance(made_ND, reference_ND)


def _variants(
    name: str,
    title: str,
    recipe: str,
    distance: Callable[[Array, Array], float],
    *,
    features: str,
    needs: str = "",
    mark: str = "",
    limits: bool = True,
    parameters: dict[str, Any],
) -> list[SetMetric]:
    """The distance from both references, and its extrapolation."""
    found = []
    variants: tuple[tuple[Reference, str, str], ...] = (("truth", "", ""), ("codec", "/codec", "*"))
    for reference, suffix, star in variants:
        for limit in (False, True) if limits else (False,):
            words = f"{recipe}; {AGAINST[reference]}; {PAIRING}"
            words += "; intercept of a line in 1/N over subsets of half to all videos" * limit
            metric = Metric(
                name=f"{name}{suffix}{'/limit' * limit}",
                title=f"{title}{star}{', N to infinity' * limit}",
                recipe=words,
                unit="",
                better="lower",
                per_frame_step=True,
                over="sets",
                needs=needs,
                mark=mark,
                parameters={**parameters, "reference": reference, "limit": limit},
            )
            found.append(
                SetMetric(
                    metric=metric,
                    features=features,
                    reference=reference,
                    least=MIN_LIMIT if limit else MIN_VIDEOS,
                    distance=distance,
                    limit=limit,
                )
            )
    return found


def _features_of(kind: str) -> tuple[str, str, str]:
    """(words, needed file, mark) of the two kinds of features that are no FVD preset."""
    if kind == FIXED:
        words = "features of a 3D convolutional net with weights drawn from a fixed seed"
        return words, "", FIXED_MARK
    return "features of the file given as `features`", "features", ""


def _net_distances(kind: str) -> list[SetMetric]:
    words, needs, mark = _features_of(kind)
    return [
        *_variants(
            f"frechet/{kind}",
            f"Fréchet distance ({kind} features)",
            f"Fréchet distance of {words}, covariance over N - 1",
            frechet_distance,
            parameters={"features": kind, "covariance_ddof": 1},
            features=kind,
            needs=needs,
            mark=mark,
        ),
        *_variants(
            f"kid/{kind}",
            f"Kernel distance ({kind} features)",
            f"squared MMD, kernel (x.y / D + 1)^3, unbiased from N, without pairs of one prompt; {words}",
            kernel_distance,
            parameters={"features": kind, "degree": 3},
            limits=False,
            features=kind,
            needs=needs,
            mark=mark,
        ),
    ]


def _fvd(name: str) -> list[SetMetric]:
    preset = PRESETS[name]
    note = f"; published numbers use {preset.published_n} videos" if preset.published_n else ""
    return _variants(
        f"fvd/{name}",
        f"FVD ({name})",
        f"FVD as {name} measures it: {preset.words}{note}",
        partial(frechet_distance, ddof=preset.covariance_ddof),
        features=name,
        needs=preset.weights,
        parameters=preset.parameters(),
    )


SCORE = SetMetric(
    metric=Metric(
        name="inception_score",
        title="Inception score",
        recipe=f"C3D class probabilities of the first 16 frames (uint8, resized by the network), {SPLITS} "
        f"splits shuffled with seed {SCORE_SEED}, as in StyleGAN-V; published numbers use 10,000 videos",
        over="sets",
        needs=C3D,
        parameters={"splits": SPLITS, "seed": SCORE_SEED, "frames": 16},
    ),
    features=C3D,
    reference="none",
    least=2 * SPLITS,
)
SET_METRICS: dict[str, SetMetric] = {
    found.metric.name: found
    for found in (
        *_net_distances(FIXED),
        *_net_distances(OWN),
        *(found for name in PRESETS for found in _fvd(name)),
        SCORE,
    )
}
METRICS = tuple(found.metric for found in SET_METRICS.values())
