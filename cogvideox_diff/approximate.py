"""Less work than the model asks for. Every way here changes the video, none is on by default, and
docs/approximations.md says what each costs.

Legend: as in `transformer.py`; a row is a sample of the transformer's batch (a video has two with guidance).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_diff.config import TransformerConfig
from cogvideox_diff.transformer import ExpertBlock, ExpertTransformer, Rope, unpatchify
from shared.errors import SettingError

BROADCAST_TIMESTEPS = (100, 850)  # between them attention changes slowly (arXiv 2408.12588, figure 4)


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """What denoising may leave out; by default nothing. One of the two at a time.

    `feature_cache`, 0 is off: while the first block's modulated input has changed by less than this share
    since the blocks last ran, they are skipped and what they added then is added again. The share is the sum
    of the relative changes from step to step, so it may pass 1 (the idea of TeaCache, arXiv 2411.19108,
    without its polynomials, which are fitted to each model). The first and the last step always run.

    `attention_every`, 1 is off: between the `BROADCAST_TIMESTEPS` a block's attention runs in one of so many
    steps, and the others take its output again (Pyramid Attention Broadcast, arXiv 2408.12588; a model with
    one kind of attention has one step of the pyramid). The MLPs run in every step.
    """

    feature_cache: float = 0.0
    attention_every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.feature_cache < math.inf:
            raise SettingError(
                f"feature_cache must be a number from 0 (off) on, got {self.feature_cache}; nearest: 0"
            )
        if self.attention_every < 1:
            raise SettingError(
                f"attention_every must be at least 1 (off), got {self.attention_every}; nearest: 1"
            )
        if self.feature_cache and self.attention_every > 1:
            raise SettingError("got feature_cache and attention_every; legal: one of them")

    @property
    def is_on(self) -> bool:
        return self.feature_cache > 0 or self.attention_every > 1

    def settings(self) -> dict[str, Any]:
        """What is on, as JSON values."""
        cache = {"feature_cache": self.feature_cache} if self.feature_cache else {}
        return cache | ({"attention_every": self.attention_every} if self.attention_every > 1 else {})

    def check(self, *, offload: str = "none", processes: int = 1, compile: str = "none") -> None:
        """SettingError where it does not go with how the transformer is run."""
        if self.is_on and processes > 1:
            raise SettingError(
                f"approximations take one process for the transformer, it has {processes}; legal: 1"
            )
        legal = ("none", "blocks") if self.feature_cache else ("none",)  # compiled blocks miss new hooks
        if self.is_on and compile not in legal:
            raise SettingError(
                f"compile {compile} does not go with {', '.join(self.settings())}; legal: {', '.join(legal)}"
            )
        if self.attention_every > 1 and offload == "sequential":
            raise SettingError(
                "attention_every keeps blocks' outputs, and offload sequential has no room for blocks; "
                "legal: none, model"
            )

    def kept_bytes(self, config: TransformerConfig, num_video: int, rows: int, size: int) -> int:
        """What is kept between steps, for `num_video` video tokens a row and `size` bytes a number."""
        row = config.hidden_dim * size * rows
        if self.feature_cache:
            return 2 * row * num_video
        return config.num_layers * row * (config.text_len + num_video) if self.attention_every > 1 else 0


EXACT = Approximation()


class ApproximateTransformer:
    """A transformer of which one video (or batch of videos) leaves something out. Called as the transformer,
    once per step with all rows; `num_steps` steps are coming. A row's result does not depend on the others.
    """

    def __init__(self, model: ExpertTransformer, approximation: Approximation, num_steps: int) -> None:
        approximation.check(processes=model.processes)
        self.model = model
        self.blocks: FeatureCache | AttentionBroadcast
        if approximation.feature_cache:
            self.blocks = FeatureCache(approximation.feature_cache, num_steps)
        else:
            self.blocks = AttentionBroadcast(approximation.attention_every)

    def __call__(
        self, latents_BTCHW: Tensor, text_BLD: Tensor, timesteps_B: Tensor, ofs: Tensor | None = None
    ) -> Tensor:
        model = self.model
        grid = model.grid_of(latents_BTCHW, text_BLD)
        emb_BE = model.embed_time(timesteps_B, ofs)
        text_BLD, video_BVD = model.embed(latents_BTCHW, text_BLD, grid)
        rope = model.rope(grid, text_BLD.shape[1], latents_BTCHW.device)
        video_BVD = self.blocks.run(model, text_BLD, video_BVD, emb_BE, rope, float(timesteps_B[0]))
        return unpatchify(model.head(video_BVD, emb_BE), grid, model.config.patch_size)

    def report(self, num_videos: int) -> list[dict[str, Any]]:
        """For every video what was left out so far, as JSON values."""
        return self.blocks.report(num_videos)


# ---- feature cache


@dataclass
class FeatureCache:
    """Skips all blocks of the rows whose input has not changed enough."""

    threshold: float
    num_steps: int
    step: int = 0
    skipped: list[int] = field(default_factory=list)  # steps, by row
    _input: Tensor | None = None  # of the step before [B, V, D]
    _added: Tensor | None = None  # to the video tokens, when the blocks last ran [B, V, D]
    _drift: Tensor | None = None  # since the blocks last ran, float32 [B]

    def run(
        self,
        model: ExpertTransformer,
        text_BLD: Tensor,
        video_BVD: Tensor,
        emb_BE: Tensor,
        rope: Rope | None,
        timestep: float,
    ) -> Tensor:
        """The video tokens behind the last block."""
        self.step += 1
        rows = self._rows_to_run(modulated_input(model.blocks[0], video_BVD, emb_BE))  # type: ignore[arg-type]
        if len(rows) == len(video_BVD):
            _, out_BVD = model.run_blocks(text_BLD, video_BVD, emb_BE, rope)
            self._added = out_BVD - video_BVD
            return out_BVD
        assert self._added is not None
        if rows:
            _, some = model.run_blocks(text_BLD[rows], video_BVD[rows], emb_BE[rows], rope)
            self._added[rows] = some - video_BVD[rows]
        return video_BVD + self._added

    def _rows_to_run(self, input_BVD: Tensor) -> list[int]:
        before, self._input = self._input, input_BVD
        everyone = list(range(len(input_BVD)))
        if before is None or self._drift is None:
            self.skipped = [0] * len(everyone)
            self._drift = input_BVD.new_zeros(len(everyone), dtype=torch.float32)
            return everyone
        self._drift += relative_change(before, input_BVD)
        last = self.step >= self.num_steps
        rows = [i for i, drift in enumerate(self._drift.tolist()) if last or not drift < self.threshold]
        for i in set(everyone).difference(rows):
            self.skipped[i] += 1
        self._drift[rows] = 0
        return rows

    def report(self, num_videos: int) -> list[dict[str, Any]]:
        return [{"steps": self.step, "steps_skipped": count} for count in self.skipped[-num_videos:]]


def modulated_input(block: ExpertBlock, video_BVD: Tensor, emb_BE: Tensor) -> Tensor:
    """What the block's attention reads of the video: it knows the noisy latents and the timestep."""
    shift, scale, _ = block.norm1.video(F.silu(emb_BE))[:, None].chunk(3, dim=-1)
    return block.norm1.norm(video_BVD) * (1 + scale) + shift


def relative_change(before_BVD: Tensor, after_BVD: Tensor) -> Tensor:
    """Mean absolute change of every row over its mean absolute value, in float32 [B]."""
    change = (after_BVD - before_BVD).abs().mean(dim=(1, 2), dtype=torch.float32)
    return change / before_BVD.abs().mean(dim=(1, 2), dtype=torch.float32)


# ---- attention broadcast


@dataclass
class AttentionBroadcast:
    """Takes the blocks' attention outputs of an earlier step again."""

    every: int
    step: int = 0
    reused: int = 0  # steps
    _age: int = 0  # steps since attention ran
    _attended: list[Tensor] = field(default_factory=list)  # by block, before the gates [B, S, D]

    def run(
        self,
        model: ExpertTransformer,
        text_BLD: Tensor,
        video_BVD: Tensor,
        emb_BE: Tensor,
        rope: Rope | None,
        timestep: float,
    ) -> Tensor:
        """The video tokens behind the last block."""
        self.step += 1
        low, high = BROADCAST_TIMESTEPS
        if self._attended and low < timestep < high and self._age < self.every - 1:
            self._age += 1
            self.reused += 1
            for block, attended_BSD in zip(model.blocks, self._attended, strict=True):
                text_BLD, video_BVD = run_with(block, attended_BSD, text_BLD, video_BVD, emb_BE)  # type: ignore[arg-type]
            return video_BVD
        self._age = 0
        with attention_outputs(model.blocks) as outputs:
            _, video_BVD = model.run_blocks(text_BLD, video_BVD, emb_BE, rope)
        self._attended = [x[0] if x[0].ndim == 3 else torch.stack(x) for x in outputs]
        return video_BVD

    def report(self, num_videos: int) -> list[dict[str, Any]]:
        return [{"steps": self.step, "steps_with_old_attention": self.reused}] * num_videos


@contextmanager
def attention_outputs(blocks: nn.ModuleList) -> Iterator[list[list[Tensor]]]:
    """In the block: per transformer block what its attention puts out, [B, S, D] or a [S, D] for each row."""
    outputs: list[list[Tensor]] = [[] for _ in blocks]

    def keeping(found: list[Tensor]) -> Any:
        return lambda _module, _inputs, output: found.append(output)

    handles = [
        block.attn.out.register_forward_hook(keeping(found))  # type: ignore[union-attr]
        for block, found in zip(blocks, outputs, strict=True)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def run_with(
    block: ExpertBlock, attended_BSD: Tensor, text_BLD: Tensor, video_BVD: Tensor, emb_BE: Tensor
) -> tuple[Tensor, Tensor]:
    """What `block` does, with the output of its attention given; gates are those of the present timestep."""
    length = text_BLD.shape[1]
    text_gate, video_gate = (
        layer(F.silu(emb_BE))[:, None].chunk(3, dim=-1)[2] for layer in (block.norm1.text, block.norm1.video)
    )
    text_BLD = text_BLD + text_gate * attended_BSD[:, :length]
    video_BVD = video_BVD + video_gate * attended_BSD[:, length:]
    joint_BSD, text_gate, video_gate = block.norm2(text_BLD, video_BVD, emb_BE)
    hidden_BSD = block.mlp(joint_BSD)
    text_BLD = text_BLD + text_gate * hidden_BSD[:, :length]
    return text_BLD, video_BVD + video_gate * hidden_BSD[:, length:]
