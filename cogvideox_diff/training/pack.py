"""Multi-Resolution Frame Pack (CogVideoX paper section 3.1): images and clips of any size and length in one
sequence. Every sample attends to itself alone, with its own positions, timestep and modulation, so that its
loss is what it would be alone; what is saved is the padding to a common size.

Legend: P samples of a pack, T/C/H/W of one sample's latents, L/V text and video tokens of all together,
l/v of one, S = L + V, N heads, D width or head dim. The row is [text 1 .. text P ; video 1 .. video P]; a
sample's own sequence is [its text ; its video], as without packing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cogvideox_diff.geometry import frames_to_pad
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.transformer import ExpertTransformer, unpatchify
from shared.attention import attend
from shared.errors import SettingError

Method = Literal["slices", "mask"]


# ---- which samples share a pack


def first_fit(lengths: Sequence[int], budget: int, order: Sequence[int]) -> list[list[int]]:
    """Samples, taken in `order`, each into the first pack that still has room for its tokens, or a new one.
    SettingError for a sample that is longer than a whole pack."""
    packs: list[list[int]] = []
    room: list[int] = []
    for i in order:
        if lengths[i] > budget:
            raise SettingError(f"sample {i} has {lengths[i]} tokens, more than a pack of {budget} holds")
        place = next((p for p, free in enumerate(room) if lengths[i] <= free), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(budget)
        packs[place].append(i)
        room[place] -= lengths[i]
    return packs


@dataclass
class PackPlan:
    """Packs as a function of (seed, number): an epoch is a new order that uses every sample once."""

    lengths: Sequence[int]
    budget: int
    seed: int = 0
    _ends: list[int] = field(default_factory=list, init=False, repr=False)  # packs up to an epoch's end
    _last: tuple[int, list[list[int]]] = field(default=(-1, []), init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.lengths:
            raise SettingError("there are no samples to pack")
        self.epoch(0)  # refuses samples that are too long

    def epoch(self, number: int) -> list[list[int]]:
        if self._last[0] != number:
            order = np.random.default_rng([self.seed, number]).permutation(len(self.lengths))
            self._last = number, first_fit(self.lengths, self.budget, order.tolist())
        return self._last[1]

    def batch(self, step: int) -> list[int]:
        """As `shared.clips.stream` asks for it."""
        return self.pack(step)

    def pack(self, step: int) -> list[int]:
        """The samples of a step, any number from 0 on."""
        while not self._ends or self._ends[-1] <= step:
            done = self._ends[-1] if self._ends else 0
            self._ends.append(done + len(self.epoch(len(self._ends))))
        number = next(i for i, end in enumerate(self._ends) if step < end)
        return self.epoch(number)[step - (self._ends[number - 1] if number else 0)]


def num_tokens(shape: Sequence[int], text_len: int, patch: tuple[int, int, int]) -> int:
    """Tokens of a sample with latents [T, C, H, W] of this shape, its padding frames included."""
    frames, _, rows, columns = shape
    padded = frames + frames_to_pad(frames, patch[0])
    return text_len + padded * rows * columns // math.prod(patch)


# ---- a pack in the transformer


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Where the tokens of each sample stand in the row.

    "slices" attends sample by sample, at the cost of the samples alone; "mask" in one call over the whole row
    with what is not one's own masked out, at the cost of its square."""

    text_lens: tuple[int, ...]
    video_lens: tuple[int, ...]
    text_owner: Tensor  # int64 [L]
    video_owner: Tensor  # int64 [V]
    method: Method = "slices"

    @classmethod
    def of(
        cls,
        text_lens: Sequence[int],
        video_lens: Sequence[int],
        *,
        device: torch.device | None = None,
        method: Method = "slices",
    ) -> Pack:
        if method not in get_args(Method):
            raise SettingError(f"method must be slices or mask, got {method!r}")
        samples = torch.arange(len(text_lens), device=device)
        text, video = (torch.tensor(lens, device=device) for lens in (text_lens, video_lens))
        return cls(
            text_lens=tuple(text_lens),
            video_lens=tuple(video_lens),
            text_owner=samples.repeat_interleave(text),
            video_owner=samples.repeat_interleave(video),
            method=method,
        )

    def attend(self, q_1NSD: Tensor, k_1NSD: Tensor, v_1NSD: Tensor) -> Tensor:
        if self.method == "mask":
            owner_S = torch.cat([self.text_owner, self.video_owner])
            return attend(q_1NSD, k_1NSD, v_1NSD, bias=owner_S[:, None] == owner_S)
        own = [self._own_sequences(x) for x in (q_1NSD, k_1NSD, v_1NSD)]
        outputs = [attend(q, k, v) for q, k, v in zip(*own, strict=True)]
        texts = [x[:, :, :n] for x, n in zip(outputs, self.text_lens, strict=True)]
        videos = [x[:, :, n:] for x, n in zip(outputs, self.text_lens, strict=True)]
        return torch.cat([*texts, *videos], dim=2)

    def _own_sequences(self, x_1NSD: Tensor) -> list[Tensor]:
        """[1, N, l + v, D] of every sample."""
        parts = x_1NSD.split([*self.text_lens, *self.video_lens], dim=2)
        count = len(self.text_lens)
        return [torch.cat(pair, dim=2) for pair in zip(parts[:count], parts[count:], strict=True)]


def packed_forward(
    model: ExpertTransformer,
    latents: Sequence[Tensor],
    texts: Sequence[Tensor],
    timesteps_P: Tensor,
    ofs: Tensor | None = None,
    *,
    method: Method = "slices",
) -> list[Tensor]:
    """v [T, C_out, H, W] of every sample, from latents [T, C, H, W] and text features [l, text_dim]; T must
    divide by the patch. Positions are the model's own for a sample of that size: with the grid rule "slice"
    integers from 0 on, as the paper's definition has it. ValueError for shapes that do not fit the model."""
    rows = [(x[None], text[None]) for x, text in zip(latents, texts, strict=True)]
    grids = [model.grid_of(x, text) for x, text in rows]
    tokens = [model.embed(x, text, grid) for (x, text), grid in zip(rows, grids, strict=True)]
    text_1LD, video_1VD = (torch.cat(parts, dim=1) for parts in zip(*tokens, strict=True))
    pack = Pack.of(
        [len(text) for text in texts], [math.prod(grid) for grid in grids],
        device=text_1LD.device, method=method,
    )  # fmt: skip
    emb_PE = model.embed_time(timesteps_P, ofs)
    rope = _packed_rope(model, grids, pack.text_lens, text_1LD.device)
    text_1LD, video_1VD = model.run_blocks(text_1LD, video_1VD, emb_PE, rope, pack)
    patches = model.head(video_1VD, emb_PE, pack).split(list(pack.video_lens), dim=1)
    return [unpatchify(x, g, model.config.patch_size)[0] for x, g in zip(patches, grids, strict=True)]


def _packed_rope(
    model: ExpertTransformer,
    grids: Sequence[tuple[int, int, int]],
    text_lens: Sequence[int],
    device: torch.device,
) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) [S, head_dim/2] in the order of the row; None for models without."""
    found = [model.rope(grid, n, device) for grid, n in zip(grids, text_lens, strict=True)]
    pairs = [pair for pair in found if pair is not None]
    if not pairs:
        return None
    cos, sin = (
        torch.cat(
            [*(x[:n] for x, n in zip(tables, text_lens, strict=True)),
             *(x[n:] for x, n in zip(tables, text_lens, strict=True))]
        )
        for tables in zip(*pairs, strict=True)
    )  # fmt: skip
    return cos, sin


def packed_loss(
    model: ExpertTransformer,
    schedule: NoiseSchedule,
    x0: Sequence[Tensor],
    texts: Sequence[Tensor],
    timesteps_P: Tensor,
    noise: Sequence[Tensor],
    *,
    ofs: Tensor | None = None,
    method: Method = "slices",
) -> Tensor:
    """Loss [P] of every sample in float32, the mean over its own elements: `objective.diffusion_loss` of the
    sample alone. x0 and noise are scaled latents [T, C, H, W] with their padding frames."""
    batches = [
        (x[None], n[None], timesteps_P[i : i + 1]) for i, (x, n) in enumerate(zip(x0, noise, strict=True))
    ]
    noisy = [schedule.add_noise(*batch)[0] for batch in batches]
    dtype = model.proj_out.weight.dtype
    texts = [text.to(dtype) for text in texts]
    outputs = packed_forward(model, [x.to(dtype) for x in noisy], texts, timesteps_P, ofs, method=method)
    targets = [schedule.velocity(*batch)[0] for batch in batches]
    errors = [v.float() - target.float() for v, target in zip(outputs, targets, strict=True)]
    return torch.stack([error.square().mean() for error in errors])
