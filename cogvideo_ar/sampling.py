"""Logits -> one token: the two-step draw of CogView2 (first a cluster of tokens, then a token of it).

Upstream: `coglm_strategy.py` of CogVideo. Sums run in float64 over tokens sorted by cluster, so that a row's
token depends on its logits and its two random numbers alone, never on the rest of the batch.
Legend: B batch, V tokens, K clusters, M kept clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.runtime import check_finite

INVALID_LOGIT = -65504.0  # as upstream: the lowest float16, which no softmax in use gives any weight
TokenRange = tuple[int, int | None]  # first token, and the one behind the last (None: to the end)


class CogLMSampler:
    """Draw from the `top_k` clusters of largest mass at `temperature`, then inside the drawn cluster at
    `temperature` * `temperature2`: logits [B, V] -> tokens int64 [B].

    `labels` int [V] names each token's cluster; None makes every token a cluster of its own, which is plain
    top-k sampling. `top_k` counts clusters; too large keeps all. Tokens in `invalid` are never drawn.
    """

    def __init__(
        self,
        labels: Tensor | None,
        *,
        temperature: float = 1.05,
        top_k: int = 12,
        temperature2: float = 0.89,
        invalid: Sequence[TokenRange] = (),
    ) -> None:
        for name, value in (("temperature", temperature), ("temperature2", temperature2)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.temperature, self.top_k, self.temperature2 = temperature, top_k, temperature2
        self.invalid = tuple(invalid)
        self.order_V: Tensor | None = None  # tokens sorted by cluster
        self.largest = 1  # tokens of the largest cluster
        self.starts_K1 = torch.zeros(
            0, dtype=torch.long
        )  # first sorted token of each cluster, and V behind them
        if labels is not None:
            self._set_labels(labels)

    def sample(self, logits_BV: Tensor, randomness: Sequence[torch.Generator] | Tensor) -> Tensor:
        """One token per row, int64 [B]; `randomness`: a CPU generator per row, or uniforms [B, 2] below 1.
        OutputCheckError where logits are not finite."""
        z_BV = self._scaled(logits_BV)
        uniforms = randomness if isinstance(randomness, Tensor) else draw_uniforms(randomness)
        if uniforms.shape != (len(z_BV), 2):
            raise ValueError(f"randomness must be [{len(z_BV)}, 2] uniforms, got {list(uniforms.shape)}")
        finite = z_BV.sum().isfinite()
        tokens_B = self._draw(z_BV, uniforms.to(z_BV))
        if not finite:  # asked last: a device has the whole draw to do before it is waited for
            check_finite("image logits over the temperature", z_BV)
        return tokens_B

    def _draw(self, z_BV: Tensor, uniforms_B2: Tensor) -> Tensor:
        """Tokens [B]; any of them where the logits are not finite."""
        masses_BM, kept_BM = self._kept(z_BV)
        cluster_B = kept_BM.gather(1, draw_index(masses_BM, uniforms_B2[:, 0])[:, None])[:, 0]
        if self.order_V is None:
            return cluster_B
        return self.order_V[self._draw_within(z_BV, cluster_B, uniforms_B2[:, 1])]

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """Exact probability of every token, float64 [B, V]: its cluster's share of the kept mass, times the
        softmax inside the cluster."""
        z_BV = self._scaled(logits_BV)
        masses_BM, kept_BM = self._kept(z_BV)
        masses_BM = masses_BM / masses_BM.sum(1, keepdim=True)
        if self.order_V is None:
            return torch.zeros_like(z_BV).scatter_(1, kept_BM, masses_BM)
        sorted_BV = torch.zeros_like(z_BV)
        for mass_B, cluster_B in zip(masses_BM.T, kept_BM.T, strict=True):
            sorted_BV += mass_B[:, None] * self._within(z_BV, cluster_B)
        return torch.zeros_like(z_BV).index_copy_(1, self.order_V, sorted_BV)

    def _set_labels(self, labels: Tensor) -> None:
        if labels.ndim != 1 or labels.is_floating_point() or labels.numel() == 0 or int(labels.min()) < 0:
            raise ValueError(f"labels must be integers [V] from 0, got {labels.dtype} {list(labels.shape)}")
        sorted_labels, self.order_V = labels.long().sort(stable=True)
        clusters = torch.arange(int(sorted_labels[-1]) + 2, device=labels.device)
        self.starts_K1 = torch.searchsorted(sorted_labels, clusters)
        self.largest = int(self.starts_K1.diff().max())

    def _scaled(self, logits_BV: Tensor) -> Tensor:
        """float64 logits over the temperature, sorted by cluster; invalid tokens at the bottom."""
        if logits_BV.ndim != 2:
            raise ValueError(f"logits must be [B, V], got {list(logits_BV.shape)}")
        z_BV = logits_BV.double() / self.temperature
        for start, stop in self.invalid:
            z_BV[:, start:stop] = INVALID_LOGIT
        if self.order_V is None:
            return z_BV
        if len(self.order_V) != z_BV.shape[1]:
            raise ValueError(f"{len(self.order_V)} cluster labels for logits of {z_BV.shape[1]} tokens")
        if self.order_V.device != z_BV.device:  # once: the table stays where the logits are
            self.order_V, self.starts_K1 = self.order_V.to(z_BV.device), self.starts_K1.to(z_BV.device)
        return z_BV.index_select(1, self.order_V)

    def _kept(self, z_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Masses [B, M] of the kept clusters, largest first, and their numbers [B, M]."""
        masses = z_BV.softmax(1)
        if self.order_V is not None:
            sums_BK = masses.cumsum(1)[:, (self.starts_K1 - 1).clamp(min=0)]
            masses = sums_BK.masked_fill_(self.starts_K1 == 0, 0.0).diff(dim=1)
        top = masses.topk(min(self.top_k, masses.shape[1]), dim=1)
        return top.values, top.indices

    def _draw_within(self, z_BV: Tensor, cluster_B: Tensor, uniform_B: Tensor) -> Tensor:
        """Sorted token drawn in each row's cluster: as by `_within`, without looking at the others."""
        start_B1, stop_B1 = self.starts_K1[cluster_B, None], self.starts_K1[cluster_B + 1, None]
        place_BS = start_B1 + torch.arange(self.largest, device=z_BV.device)
        z_BS = z_BV.gather(1, place_BS.clamp(max=z_BV.shape[1] - 1)) / self.temperature2
        inside_BS = z_BS.masked_fill(place_BS >= stop_B1, -torch.inf).softmax(1)
        return (start_B1[:, 0] + draw_index(inside_BS, uniform_B)).clamp_(max=z_BV.shape[1] - 1)

    def _within(self, z_BV: Tensor, cluster_B: Tensor) -> Tensor:
        """Probabilities [B, V] of the sorted tokens given each row's cluster."""
        place_V = torch.arange(z_BV.shape[1], device=z_BV.device)
        start_B1, stop_B1 = self.starts_K1[cluster_B, None], self.starts_K1[cluster_B + 1, None]
        outside = (place_V < start_B1) | (place_V >= stop_B1)
        inside = (z_BV / self.temperature2).masked_fill(outside, -torch.inf)
        # an empty cluster has mass 0 and is never drawn: it only must not become NaN in `probabilities`
        return inside.softmax(1).nan_to_num(0.0)


def draw_uniforms(generators: Sequence[torch.Generator]) -> Tensor:
    """Two numbers in [0, 1) from each CPU generator: float64 [B, 2]."""
    return torch.stack([torch.rand(2, generator=g, dtype=torch.float64) for g in generators])


def guide(cond: Tensor, uncond: Tensor, alpha: float) -> Tensor:
    """Classifier-free guidance on logits: uncond + (cond - uncond) * alpha; alpha 1 is no guidance."""
    return uncond + (cond - uncond) * alpha


@torch.no_grad()
def cluster_codebook(codebook: Tensor, num_clusters: int, seed: int, *, max_rounds: int = 50) -> Tensor:
    """k-means over codebook rows [V, D] -> labels int64 [V], the same for a seed; no cluster is empty."""
    if not 1 <= num_clusters <= len(codebook):
        raise ValueError(f"num_clusters must lie in 1..{len(codebook)}, got {num_clusters}")
    points = codebook.detach().cpu().double()
    labels = _assign(points, _spread_centres(points, num_clusters, seed))
    for _ in range(max_rounds):
        sums = torch.zeros(num_clusters, points.shape[1], dtype=points.dtype).index_add_(0, labels, points)
        previous, labels = labels, _assign(points, sums / labels.bincount()[:, None])
        if torch.equal(labels, previous):
            break
    return labels


def draw_index(weights_BN: Tensor, uniform_B: Tensor) -> Tensor:
    """Index [B] by inverse CDF; an entry of weight 0 is never returned, but the last if no sum is above 0."""
    sums_BN = weights_BN.cumsum(1)
    total_B = sums_BN[:, -1]
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return torch.searchsorted(sums_BN, target_B[:, None], right=True)[:, 0].clamp_(max=sums_BN.shape[1] - 1)


def _spread_centres(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """k-means++: the next centre is a point drawn by its squared distance to the nearest centre so far."""
    generator = torch.Generator().manual_seed(seed)
    picks = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = torch.full((len(points),), torch.inf, dtype=points.dtype)
    squares = points.square().sum(1)
    for uniform in torch.rand(num_clusters - 1, generator=generator, dtype=points.dtype):
        last = picks[-1]
        nearest = nearest.minimum(squares + squares[last] - 2 * (points @ points[last])).clamp(min=0)
        nearest[last] = 0
        picks.append(int(draw_index(nearest[None], uniform[None])))
    return points[picks]


def _assign(points: Tensor, centres: Tensor) -> Tensor:
    """Nearest centre of each point; a centre without points takes the worst placed point of a shared one."""
    distances, labels = torch.cdist(points, centres).min(1)
    counts = labels.bincount(minlength=len(centres))
    for empty in (counts == 0).nonzero()[:, 0].tolist():
        worst = int(distances.masked_fill(counts[labels] == 1, -1).argmax())
        counts[labels[worst]] -= 1
        labels[worst], distances[worst], counts[empty] = empty, 0, 1
    return labels
