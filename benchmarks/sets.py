"""Distances between sets of videos: features are taken while videos are read, compared when all are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.features.extractors import Extractor
from benchmarks.metrics import RefusedError, digest
from benchmarks.metrics.distances import SCORE_SEED, SET_METRICS, SetMetric
from benchmarks.statistics import Interval, Jackknife, jackknife
from benchmarks.storage import frames_digest
from shared.errors import WeightsError
from shared.video import Video

Features = dict[int, NDArray[np.float64]]  # prompt index -> [D]


@dataclass(kw_only=True)
class VideoSet:
    """Features of one video per prompt by every net that could take it."""

    name: str
    features: dict[str, Features] = field(default_factory=dict)
    kinds: set[tuple[float, int]] = field(default_factory=set)  # (fps, frames)
    frames: dict[int, str] = field(default_factory=dict)  # prompt index -> checksum of the video that counts
    refused: dict[str, str] = field(default_factory=dict)  # by net

    def add(self, nets: Mapping[str, Extractor], prompt_index: int, video: Video) -> None:
        """The first video of a prompt counts; a net that cannot take one is out for the whole set."""
        self.kinds.add((video.fps, video.num_frames))
        if nets and prompt_index not in self.frames:
            self.frames[prompt_index] = frames_digest(video)
        for net, extract in nets.items():
            found = self.features.setdefault(net, {})
            if prompt_index in found or net in self.refused:
                continue
            try:
                found[prompt_index] = extract(video)
            except (RefusedError, WeightsError) as reason:
                self.refused[net] = str(reason)

    def of(self, net: str) -> Features:
        """Raises RefusedError where the net could not take a video."""
        if net in self.refused:
            raise RefusedError(f"{self.name}: {self.refused[net]}")
        return self.features.get(net, {})


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """One value of a set metric, which can be taken over some of the prompts."""

    metric: SetMetric
    prompts: tuple[int, ...]
    statistic: Callable[[NDArray[np.int64]], float]  # of places in `prompts`
    reference: str = ""  # digest of the clips that it was measured against

    @cached_property
    def replicates(self) -> Jackknife:
        return jackknife(self.statistic, len(self.prompts))

    def interval(self) -> Interval:
        return self.replicates.interval()

    def saved(self, texts: Mapping[int, str]) -> dict[str, Any]:
        """All that a paired difference from another run's value needs, as JSON; `texts` are the prompts."""
        made = self.replicates
        return {
            "prompts": [texts[index] for index in self.prompts],
            "reference": self.reference,
            "value": made.value,
            "without": made.without.tolist(),
            "shares": made.shares.tolist(),
        }

    def minus(self, other: SetScore) -> Interval:
        """The difference on the same prompts. RefusedError where they differ: a distance falls with N."""
        if self.prompts != other.prompts:
            counts = f"{len(self.prompts)} and {len(other.prompts)} videos"
            raise RefusedError(f"measured on {counts} of different prompts; a distance depends on the number")
        return self.replicates.minus(other.replicates).interval()


def score_sets(
    made: VideoSet, truth: VideoSet, coded: VideoSet, nets: Mapping[str, Extractor]
) -> tuple[dict[str, SetScore], dict[str, str]]:
    """Every set metric of one model's videos, and for those that have no value the reason."""
    references = {"truth": truth, "codec": coded}
    scores: dict[str, SetScore] = {}
    refused: dict[str, str] = {}
    for name, metric in SET_METRICS.items():
        if metric.features in nets:
            try:
                scores[name] = score(metric, made, references.get(metric.reference))
            except RefusedError as reason:
                refused[name] = str(reason)
    return scores, refused


def score(metric: SetMetric, made: VideoSet, reference: VideoSet | None) -> SetScore:
    """One metric; both sets are cut to the prompts that both have. RefusedError for too few of them, or where
    the videos differ in length or rate from the reference."""
    own = made.of(metric.features)
    if reference is None:
        prompts = tuple(sorted(own))
        check_count(metric, len(prompts), made.name)
        shuffled = np.random.RandomState(SCORE_SEED).permutation(len(prompts))  # once, as StyleGAN-V does
        own_ND = stacked(own, prompts)[shuffled]
        return SetScore(metric=metric, prompts=prompts, statistic=lambda i: metric.value(own_ND[i], None, i))
    other = reference.of(metric.features)
    prompts = tuple(sorted(own.keys() & other.keys()))
    check_count(metric, len(prompts), f"{made.name} and {reference.name}")
    check_kinds(made, reference)
    first_ND, second_ND = stacked(own, prompts), stacked(other, prompts)
    return SetScore(
        metric=metric,
        prompts=prompts,
        statistic=lambda i: metric.value(first_ND[i], second_ND[i], i),
        reference=digest([reference.frames.get(index) for index in prompts])[:16],
    )


def saved_difference(
    first: Mapping[str, Any], second: Mapping[str, Any], *, same_reference: bool
) -> Interval:
    """The difference of two values as `SetScore.saved` keeps them, group by group of the same prompts.

    RefusedError where the prompts differ, since a distance depends on their number and kind, or the reference
    does, where it must be the same for both."""
    if first["prompts"] != second["prompts"]:
        counts = f"{len(first['prompts'])} and {len(second['prompts'])}"
        raise RefusedError(
            f"one number for a set, and the sets show other prompts ({counts} videos): run both with the "
            "same prompts"
        )
    if same_reference and first["reference"] != second["reference"]:
        raise RefusedError(
            f"measured against other true clips ({first['reference']}, {second['reference']}): run both with "
            "the same seed"
        )
    scores = [
        Jackknife(
            value=one["value"],
            without=np.asarray(one["without"]),
            shares=np.asarray(one["shares"]),
            n=len(one["prompts"]),
        )
        for one in (first, second)
    ]
    return scores[0].minus(scores[1]).interval()


def stacked(features: Features, prompts: tuple[int, ...]) -> NDArray[np.float64]:
    return np.stack([features[index] for index in prompts])


def check_count(metric: SetMetric, count: int, names: str) -> None:
    if count < metric.least:
        raise RefusedError(f"needs {metric.least} prompts with a video of {names}, got {count}")


def check_kinds(made: VideoSet, reference: VideoSet) -> None:
    if made.kinds != reference.kinds:
        words = [kinds_words(videos) for videos in (made, reference)]
        raise RefusedError(f"{made.name} has {words[0]}, {reference.name} {words[1]}")


def kinds_words(videos: VideoSet) -> str:
    return " and ".join(f"{frames} frames at {fps:g} fps" for fps, frames in sorted(videos.kinds)) or "none"
