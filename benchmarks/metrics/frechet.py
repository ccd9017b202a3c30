"""Distances between two sets of feature vectors, in float64. Nothing here knows of videos or files.

Legend: N vectors of a set, D features, R = min(N, D).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SUBSET_SIZES = 6  # sizes between half of the set and the whole, of the extrapolation
SUBSET_DRAWS = 3  # subsets of every size


def frechet_distance(first_ND: Array, second_ND: Array, *, ddof: int = 1) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of two vectors or more; `ddof` 0 divides the
    covariances by N, 1 by N - 1.

    The trace of the root is the nuclear norm of A1 A2^T where S = A^T A, which is exact for sets smaller than
    D, where a general matrix root loses digits and turns complex (Dowson & Landau 1982 for the distance)."""
    check_sets(first_ND, second_ND)
    mean = np.square(first_ND.mean(0) - second_ND.mean(0)).sum()
    a_RD, b_RD = covariance_factor(first_ND, ddof), covariance_factor(second_ND, ddof)
    root = np.linalg.svd(a_RD @ b_RD.T, compute_uv=False).sum()
    return float(mean + np.square(a_RD).sum() + np.square(b_RD).sum() - 2 * root)


def covariance_factor(features_ND: Array, ddof: int) -> Array:
    """A [R, D] with A^T A the covariance of the rows."""
    centred_ND = (features_ND - features_ND.mean(0)) / np.sqrt(len(features_ND) - ddof)
    if len(centred_ND) <= centred_ND.shape[1]:
        return centred_ND
    return np.asarray(np.linalg.qr(centred_ND, mode="r"))


def kernel_distance(first_ND: Array, second_ND: Array) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 of two sets of one size: unbiased, so
    that it may be negative (KID, Binkowski et al. 2018; of videos KVD, Unterthiner et al. 2018).

    Row i of either set shows the same prompt. The two are more alike than chance has it, so they are not
    compared with each other (Gretton et al. 2012, lemma 6); with them it would be far below zero."""
    check_sets(first_ND, second_ND)
    n, d = first_ND.shape
    if len(second_ND) != n:
        raise ValueError(f"the kernel distance needs sets of one size, got {n} and {len(second_ND)}")
    pairs = ((first_ND, first_ND), (second_ND, second_ND), (first_ND, second_ND))
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in pairs)
    terms = xx + yy - xy - xy.T
    return float((terms.sum() - terms.trace()) / (n * (n - 1)))


def extrapolated(
    distance: Callable[[Array, Array], float], first_ND: Array, second_ND: Array, ids_N: NDArray[np.int64]
) -> float:
    """The distance at N = infinity: intercept of a line in 1/N through subsets of half to all of both sets
    (Chong & Forsyth 2020). Both sets must be of one size, and a subset takes the same rows of both: where
    they show the same prompts they are alike, and that must be so at every size.

    The subsets are drawn by `ids_N`, so that a set which lacks a few members gets nearly the same ones: a
    jackknife of the limit would otherwise measure the drawing."""
    size = len(first_ND)
    if len(second_ND) != size:
        raise ValueError(f"the extrapolation needs sets of one size, got {size} and {len(second_ND)}")
    sizes = np.linspace(max(2, size // 2), size, SUBSET_SIZES).round().astype(int)
    values = np.zeros(SUBSET_SIZES)
    for draw in range(SUBSET_DRAWS):
        order = _drawn_order(ids_N, draw)
        values += [distance(first_ND[order[:n]], second_ND[order[:n]]) / SUBSET_DRAWS for n in sizes]
    return float(np.polynomial.polynomial.polyfit(1 / sizes, values, 1)[0])


def _drawn_order(ids_N: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """A random order in which an id stands where it does whatever the others are."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return np.argsort(rng.random(int(ids_N.max()) + 1)[ids_N], kind="stable")


def inception_score(probabilities_NC: Array, *, splits: int) -> float:
    """exp of the mean KL divergence of each video's class probabilities from their mean, averaged over
    `splits` parts of the set (Salimans et al. 2016). ValueError for fewer videos than splits."""
    count = len(probabilities_NC)
    if count < splits:
        raise ValueError(f"the inception score needs {splits} videos or more, got {count}")
    bounds = [i * count // splits for i in range(splits + 1)]
    parts = [probabilities_NC[a:b] for a, b in pairwise(bounds)]
    return float(np.mean([np.exp(_mean_divergence(part)) for part in parts]))


def _mean_divergence(part_NC: Array) -> float:
    small = np.finfo(np.float64).tiny  # a class of probability zero adds nothing
    logs = np.log(np.maximum(part_NC, small)) - np.log(np.maximum(part_NC.mean(0), small))
    return float((part_NC * logs).sum(1).mean())


def check_sets(first_ND: Array, second_ND: Array) -> None:
    """ValueError unless both are finite [N >= 2, D] with the same D."""
    shapes = [list(x.shape) for x in (first_ND, second_ND)]
    if any(x.ndim != 2 or len(x) < 2 for x in (first_ND, second_ND)) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"a distance needs two sets of [N >= 2, D] with one D, got {shapes}")
    if not all(bool(np.isfinite(x).all()) for x in (first_ND, second_ND)):
        raise ValueError("features are not finite")
