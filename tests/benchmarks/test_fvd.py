"""Distances: known answers, and every FVD preset against a computation in NumPy that is written here."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.features.extractors import extractors
from benchmarks.features.files import FeatureFiles
from benchmarks.metrics import RefusedError
from benchmarks.metrics.distances import SET_METRICS
from benchmarks.metrics.frechet import (
    extrapolated,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from benchmarks.metrics.fvd import PRESETS
from benchmarks.sets import VideoSet, score
from benchmarks.statistics import jackknife
from shared.video import Video
from tests.benchmarks.nets import SmallC3D, SmallI3D, SmallLogits, noise_videos, script

Array = NDArray[np.float64]
COUNT = 10


# ---- in NumPy, from the descriptions of the four code bases alone


def linear_weights(size: int, new_size: int) -> Array:
    """[new_size, size]: bilinear interpolation between pixel centres, without antialiasing."""
    places = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    low = np.floor(places).astype(int)
    high, share = np.minimum(low + 1, size - 1), places - low
    weights = np.zeros((new_size, size))
    weights[np.arange(new_size), low] += 1 - share
    weights[np.arange(new_size), high] += share
    return weights


def resized(frames_THWC: Array, height: int, width: int) -> Array:
    rows, columns = linear_weights(frames_THWC.shape[1], height), linear_weights(frames_THWC.shape[2], width)
    return np.einsum("yh,thwc,xw->tyxc", rows, frames_THWC, columns, optimize=True)


def cropped(frames_THWC: Array) -> Array:
    height, width = frames_THWC.shape[1:3]
    scale = 224 / min(height, width)
    large = resized(
        frames_THWC,
        *((224, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), 224)),
    )
    top, left = (large.shape[1] - 224) // 2, (large.shape[2] - 224) // 2
    return large[:, top : top + 224, left : left + 224]


def prepared(video: Video, preset: str) -> Array:
    frames = video.frames.numpy().astype(np.float64)
    if preset == "common_metrics/styleganv":
        return cropped(frames) / 127.5 - 1
    if preset == "videogpt":
        return cropped(frames[:16]) / 127.5 - 1
    return resized(frames[:16], 224, 224) / 127.5 - 1  # squashed: inside the network, or before it


def net_features(pixels_THWC: Array, weight: Array) -> Array:
    half = len(pixels_THWC) // 2
    halves = np.stack([pixels_THWC[:half].mean(0), pixels_THWC[half:].mean(0)])  # [2, H, W, C]
    cells = halves.reshape(2, 4, 56, 4, 56, 3).mean((2, 4))  # [2, 4, 4, C]
    return np.tanh(cells.transpose(3, 0, 1, 2).reshape(-1) @ weight)


def symmetric_root(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def plain_frechet(first: Array, second: Array, ddof: int) -> float:
    s1, s2 = (np.cov(x, rowvar=False, ddof=ddof) for x in (first, second))
    root = symmetric_root(s1)
    mean = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return float(mean + np.trace(s1 + s2) - 2 * np.trace(symmetric_root(root @ s2 @ root)))


DDOF = {"stylegan-v/fvd2048_16f": 0, "common_metrics/styleganv": 1, "videogpt": 1, "cdfvd/i3d": 0}


# ---- presets


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> FeatureFiles:
    folder = tmp_path_factory.mktemp("nets")
    paths = {
        "i3d": script(SmallI3D(seed=1), folder / "i3d.pt"),
        "i3d_400": script(SmallLogits(seed=1), folder / "i3d_400.pt"),
        "c3d": script(SmallC3D(), folder / "c3d.pt"),
    }
    return FeatureFiles(paths=paths)


@pytest.fixture(scope="module")
def videos() -> tuple[list[Video], list[Video]]:
    return noise_videos(COUNT, 1), noise_videos(COUNT, 2, level=15)


def video_set(videos: list[Video], files: FeatureFiles, name: str = "made") -> VideoSet:
    found, nets = VideoSet(name=name), extractors(files)[0]
    for index, video in enumerate(videos):
        found.add(nets, index, video)
    return found


@pytest.fixture(scope="module")
def sets(videos: tuple[list[Video], list[Video]], nets: FeatureFiles) -> tuple[VideoSet, VideoSet]:
    return video_set(videos[0], nets), video_set(videos[1], nets, "truth")


def test_all_presets_are_tested() -> None:
    assert DDOF.keys() == PRESETS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_equals_the_computation_in_numpy(
    preset: str, videos: tuple[list[Video], list[Video]], sets: tuple[VideoSet, VideoSet]
) -> None:
    weight = SmallI3D(seed=1).weight.detach().numpy()
    own, others = (np.stack([net_features(prepared(v, preset), weight) for v in side]) for side in videos)
    found = score(SET_METRICS[f"fvd/{preset}"], *sets).interval()
    assert found.value == pytest.approx(plain_frechet(own, others, DDOF[preset]), rel=1e-6)
    assert found.low < found.value < found.high and found.n == COUNT


@pytest.mark.parametrize("preset", PRESETS)
def test_identical_sets_have_no_distance(preset: str, sets: tuple[VideoSet, VideoSet]) -> None:
    features = np.stack([*sets[0].features[preset].values()])
    trace = float(np.trace(np.cov(features, rowvar=False)))
    assert abs(score(SET_METRICS[f"fvd/{preset}"], sets[0], sets[0]).interval().value) < 1e-6 * trace


def test_conventions_differ(sets: tuple[VideoSet, VideoSet]) -> None:
    """StyleGAN-V's and cdfvd's squash and divide alike: they differ by weights, which are the same here."""
    values = {preset: score(SET_METRICS[f"fvd/{preset}"], *sets).interval().value for preset in PRESETS}
    assert values["stylegan-v/fvd2048_16f"] == pytest.approx(values["cdfvd/i3d"], rel=1e-6)
    assert len({round(value, 4) for value in values.values()}) == 3


def test_videos_that_are_too_short_are_refused_by_name(nets: FeatureFiles) -> None:
    short = video_set(noise_videos(10, 1, frames=12), nets)
    with pytest.raises(RefusedError, match="stylegan-v/fvd2048_16f needs 16 frames or more, got 12"):
        score(SET_METRICS["fvd/stylegan-v/fvd2048_16f"], short, short)
    assert score(SET_METRICS["fvd/common_metrics/styleganv"], short, short).interval().n == 10


def test_an_i3d_of_the_other_kind_is_not_taken(nets: FeatureFiles) -> None:
    wrong = FeatureFiles(paths={"i3d": nets.paths["i3d_400"]})
    found, broken = extractors(wrong)
    assert "takes no rescale, resize, return_features" in broken["i3d"]
    assert not found.keys() & PRESETS.keys()


# ---- fairness of the sample size


def test_sets_of_other_prompts_are_never_compared(
    sets: tuple[VideoSet, VideoSet], videos: tuple[list[Video], list[Video]]
) -> None:
    metric = SET_METRICS["frechet/fixed"]
    fewer = video_set(videos[0][:8], FeatureFiles())
    whole, part = score(metric, *sets), score(metric, fewer, sets[1])
    assert part.interval().n == 8
    with pytest.raises(RefusedError, match="10 and 8 videos"):
        whole.minus(part)
    assert whole.minus(whole).value == 0.0


def test_too_few_videos_and_other_lengths_are_refused(
    nets: FeatureFiles, sets: tuple[VideoSet, VideoSet]
) -> None:
    few = video_set(noise_videos(5, 1), FeatureFiles())
    with pytest.raises(RefusedError, match="needs 8 prompts with a video of made and truth, got 5"):
        score(SET_METRICS["frechet/fixed"], few, sets[1])
    longer = video_set(noise_videos(10, 1, frames=20), FeatureFiles())
    with pytest.raises(RefusedError, match="made has 20 frames at 8 fps, truth 18 frames at 8 fps"):
        score(SET_METRICS["frechet/fixed"], longer, sets[1])


# ---- known distances


def gaussian_set(rng: np.random.Generator, count: int, mean: Array, root: Array) -> Array:
    """Vectors whose sample mean and covariance (over N - 1) are exactly `mean` and `root @ root.T`."""
    x = rng.standard_normal((count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return mean + x @ root.T


def test_gaussians_have_the_analytic_distance() -> None:
    rng = np.random.default_rng(5)
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])  # variances along shared axes
    axes = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    means = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 2.0])
    first, second = (gaussian_set(rng, 50, m, axes * np.sqrt(v)) for m, v in zip(means, (a, b), strict=True))
    analytic = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(analytic, rel=1e-9)


@pytest.mark.parametrize("count", [10, 400])  # fewer vectors than features, and more
def test_frechet_equals_the_matrix_root_at_every_rank(count: int) -> None:
    rng = np.random.default_rng(count)
    first, second = rng.standard_normal((count, 64)), rng.standard_normal((count, 64)) * 1.5 + 0.2
    assert frechet_distance(first, second) == pytest.approx(plain_frechet(first, second, 1), rel=1e-6)
    assert abs(frechet_distance(first, first)) < 1e-9 * 64


def test_kernel_distance_by_hand_and_without_bias() -> None:
    first, second = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    within, across = 1.0 + 27.0, (1 + 8) / 2  # the kernel of 0 and 2, and of 1 and 1
    assert kernel_distance(first, second) == pytest.approx(within - 2 * across)
    rng = np.random.default_rng(0)
    values = [kernel_distance(*rng.standard_normal((2, 12, 4))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20


def test_sets_of_the_same_prompts_bias_no_distance() -> None:
    """Rows that show one prompt are alike without being nearer in distribution."""
    rng = np.random.default_rng(6)
    values, limits = [], []
    for _ in range(300):
        prompts, own, others = rng.standard_normal((3, 16, 4))
        first, second = prompts + 0.3 * own, prompts + 0.3 * others
        values.append(kernel_distance(first, second))
        limits.append(extrapolated(frechet_distance, first, second, np.arange(16)))
    assert abs(np.mean(values)) < 4 * np.std(values) / 300**0.5
    assert abs(np.mean(limits)) < 0.1


def test_extrapolation_takes_the_bias_of_few_videos_out() -> None:
    """Two sets of one distribution: the distance that should be 0 falls with 1/N, its limit does not."""
    rng = np.random.default_rng(1)
    plain, limits = [], []
    for _ in range(20):
        first, second = rng.standard_normal((2, 200, 12))
        plain.append(frechet_distance(first, second))
        limits.append(extrapolated(frechet_distance, first, second, np.arange(200)))
    assert np.mean(plain) > 0.3 and abs(np.mean(limits)) < 0.2 * np.mean(plain)


def test_the_interval_of_the_limit_is_as_wide_as_its_spread() -> None:
    """Drawn anew for every set that lacks a group, the subsets would make it five times as wide."""
    rng = np.random.default_rng(2)

    def limit(first: Array, second: Array, ids: NDArray[np.int64]) -> float:
        return extrapolated(frechet_distance, first[ids], second[ids], ids)

    pairs = [rng.standard_normal((2, 64, 5)) + np.array([[[0]], [[1]]]) for _ in range(40)]
    spread = np.std([limit(*pair, np.arange(64)) for pair in pairs])
    found = [jackknife(lambda i, pair=pair: limit(*pair, i), 64).interval() for pair in pairs[:5]]
    assert 0.6 < np.mean([(f.high - f.low) / 4.08 for f in found]) / spread < 1.8


def test_the_limit_needs_sets_of_one_size() -> None:
    with pytest.raises(ValueError, match="sets of one size, got 60 and 59"):
        extrapolated(frechet_distance, np.zeros((60, 2)), np.zeros((59, 2)), np.arange(60))


@pytest.mark.parametrize(
    ("first", "second"), [((1, 3), (4, 3)), ((4, 3), (4, 2))], ids=["one vector", "other width"]
)
def test_sets_without_a_distance_are_errors(first: tuple[int, int], second: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="two sets of"):
        frechet_distance(np.zeros(first), np.zeros(second))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.full((4, 3), np.nan), np.zeros((4, 3)))


# ---- inception score


def test_inception_score_of_sure_and_unsure_classes() -> None:
    assert inception_score(np.tile(np.eye(4), (5, 1)), splits=5) == pytest.approx(4.0)
    assert inception_score(np.full((20, 4), 0.25), splits=10) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="needs 10 videos or more, got 9"):
        inception_score(np.full((9, 4), 0.25), splits=10)


def test_inception_score_equals_stylegan_vs_computation(nets: FeatureFiles) -> None:
    videos = noise_videos(24, 3)
    made = video_set(videos, FeatureFiles(paths={"c3d": nets.paths["c3d"]}))
    with torch.no_grad():
        found = [SmallC3D()(v.frames[:16].permute(3, 0, 1, 2)[None])[0].numpy() for v in videos]
    probabilities = np.stack(found)
    np.random.RandomState(42).shuffle(probabilities)
    parts = [probabilities[i * 24 // 10 : (i + 1) * 24 // 10] for i in range(10)]
    wanted = [np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()) for p in parts]
    value = score(SET_METRICS["inception_score"], made, None).interval().value
    assert value == pytest.approx(np.mean(wanted), rel=1e-9)


def test_files_of_no_net_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "i3d.pt"
    path.write_bytes(b"not a net")
    assert "is no TorchScript file" in extractors(FeatureFiles(paths={"i3d": path}))[1]["i3d"]
