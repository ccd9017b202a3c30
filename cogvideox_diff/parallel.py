"""One video on several processes: where to cut; `shared.distributed` knows how to exchange.

Three cuts, each equal to one process up to rounding in float32 and for inference only:
- guidance: the rows of the transformer's batch, so that each half of classifier-free guidance has its ranks;
- sequence: the tokens, text and then video, between the blocks and the heads inside attention
  (DeepSpeed-Ulysses, arXiv 2309.14509);
- clip: the frames or pieces of the VAE, whose convolutions hand frames to the next rank (upstream:
  `sat/vae_modules/cp_enc_dec.py`).

Legend: as in `transformer.py` and `vae/blocks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogvideox_diff.config import TransformerConfig, VAEConfig
from cogvideox_diff.fast_block import quick_attend
from cogvideox_diff.transformer import Attend, ExpertTransformer, Rope, unpatchify
from cogvideox_diff.vae.autoencoder import CausalVAE
from cogvideox_diff.vae.causal_conv import ClipContext, Stage, chunk_bounds, run_causal
from shared.distributed import (
    ParallelContext,
    all_to_all,
    all_to_all_stacked,
    check_degree,
    divisors,
    exchange,
    gather_parts,
    part_sizes,
    sum_over,
)


@dataclass(frozen=True, kw_only=True)
class InferenceGroups:
    """The groups that this process belongs to, one per cut."""

    guidance: ParallelContext
    sequence: ParallelContext
    clip: ParallelContext

    @classmethod
    def of(
        cls, world: ParallelContext, *, guidance: int = 1, sequence: int | None = None, clip: bool = True
    ) -> InferenceGroups:
        """`guidance` (1 or 2) groups of neighbouring ranks, each of `sequence` (None: all that are left) for
        the tokens of its rows; `clip`: all for the VAE.

        Where the transformer takes one rank, each runs it alone. SettingError lists the legal numbers. Every
        process must call it.
        """
        check_degree("guidance", guidance, [d for d in (1, 2) if d in divisors(world.degree)])
        left = world.degree // guidance
        degree = left if sequence is None else sequence
        check_degree("sequence", degree, [1, left] if guidance == 1 else [left])
        return cls(
            guidance=world.split(guidance, stride=left),
            sequence=world.split(degree),
            clip=world if clip else ParallelContext(),
        )


# ---- transformer


class UlyssesAttention:
    """An `attend` over tokens that are spread over ranks: q, k, v [B, N, own S, D] -> the same shape.

    Each rank trades its tokens of the other ranks' heads for all tokens of its own heads, and back. Neither
    tokens nor heads must divide: 30 heads on 4 ranks are 8, 8, 7 and 7.
    """

    def __init__(self, context: ParallelContext, kernel: Attend = quick_attend) -> None:
        self.context, self.kernel = context, kernel
        self.sizes: Sequence[int] = ()  # tokens of each rank; whoever cuts the tokens sets it

    def __call__(self, q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
        rank, sizes = self.context.rank, self.sizes
        batch, num_heads, length, dim = q_BNSD.shape
        heads = part_sizes(num_heads, self.context.degree)

        if self.context.degree == 1:
            return self.kernel(q_BNSD, k_BNSD, v_BNSD)
        cuts = zip(*(x.split(heads, dim=1) for x in (q_BNSD, k_BNSD, v_BNSD)), strict=True)
        shapes = [(3, batch, heads[rank], tokens, dim) for tokens in sizes]
        received = all_to_all_stacked(list(cuts), shapes, self.context)
        out_BnSD = self.kernel(*torch.cat(received, dim=3))  # own heads, all tokens

        shapes = [(batch, count, length, dim) for count in heads]
        received = all_to_all(out_BnSD.split(list(sizes), dim=2), shapes, self.context)
        return torch.cat(received, dim=1)


class ParallelTransformer(ExpertTransformer):
    """An `ExpertTransformer` that every rank calls with the same inputs; each gets the whole result.

    The rows of the batch are shared in the group `guidance`, their tokens in the group `sequence`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        guidance: ParallelContext,
        sequence: ParallelContext,
        kernel: Attend = quick_attend,
    ) -> None:
        check_degree("sequence", sequence.degree, range(1, config.num_heads + 1))
        ulysses = UlyssesAttention(sequence, kernel)
        super().__init__(config, ulysses)
        self.guidance, self.sequence, self.ulysses = guidance, sequence, ulysses
        self.processes = guidance.degree * sequence.degree

    @classmethod
    def of(
        cls, model: ExpertTransformer, groups: InferenceGroups, kernel: Attend = quick_attend
    ) -> ParallelTransformer:
        """The same model on several ranks; it shares the weights of `model`."""
        with torch.device("meta"):
            parallel = cls(model.config, guidance=groups.guidance, sequence=groups.sequence, kernel=kernel)
        parallel.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        return parallel.train(model.training)

    def attend_by(self, kernel: Attend) -> None:
        """The kernel sees all tokens of a rank's own heads; who trades them stays."""
        self.ulysses.kernel = kernel

    def forward(
        self, latents_BTCHW: Tensor, text_BLD: Tensor, timesteps_B: Tensor, ofs: Tensor | None = None
    ) -> Tensor:
        """As in one process, with a batch of at least as many rows as `guidance` has ranks."""
        batch, rank = len(latents_BTCHW), self.guidance.rank
        check_degree(f"guidance with {batch} rows", self.guidance.degree, range(1, batch + 1))
        rows = part_sizes(batch, self.guidance.degree)
        latents, text, timesteps = (x.split(rows)[rank] for x in (latents_BTCHW, text_BLD, timesteps_B))
        v = self.run_rows(
            latents, text, timesteps, None if ofs is None else ofs.expand(batch).split(rows)[rank]
        )
        return torch.cat(gather_parts(v, self.guidance, [(count, *v.shape[1:]) for count in rows]))

    def run_rows(self, latents: Tensor, text: Tensor, timesteps: Tensor, ofs: Tensor | None) -> Tensor:
        """The forward pass of these rows, their tokens shared in the group `sequence`."""
        grid, rank = self.grid_of(latents, text), self.sequence.rank
        emb_BE = self.embed_time(timesteps, ofs)
        text_BLD, video_BVD = self.embed(latents, text, grid)
        num_tokens, text_len = video_BVD.shape[1], text_BLD.shape[1]
        check_degree(f"sequence of {num_tokens} video tokens", self.sequence.degree, range(1, num_tokens + 1))
        cuts = cut_tokens(text_len, num_tokens, self.sequence.degree)
        rope = cut_rope(self.rope(grid, text_len, latents.device), cuts, rank)

        self.ulysses.sizes = [sum(cut) for cut in cuts]
        texts, videos = zip(*cuts, strict=True)
        own_text, own_video = text_BLD.split(texts, dim=1)[rank], video_BVD.split(videos, dim=1)[rank]
        # row by row, since blocks choose their path by size: ranks may differ, but must exchange the same
        rows = zip(own_text.split(1), own_video.split(1), emb_BE.split(1), strict=True)
        own_video = torch.cat([self.run_blocks(*row, rope)[1] for row in rows])
        patches = self.head(own_video, emb_BE)
        shapes = [(len(patches), size, patches.shape[2]) for size in videos]
        whole = torch.cat(gather_parts(patches, self.sequence, shapes), dim=1)
        return unpatchify(whole, grid, self.config.patch_size)


def cut_tokens(text_len: int, num_video: int, degree: int) -> list[tuple[int, int]]:
    """How many tokens (of the text, of the video) each rank has of the joint sequence, cut equally."""
    cuts, left = [], text_len
    for size in part_sizes(text_len + num_video, degree):
        cuts.append((min(size, left), size - min(size, left)))
        left -= cuts[-1][0]
    return cuts


def cut_rope(rope: Rope | None, cuts: Sequence[tuple[int, int]], rank: int) -> Rope | None:
    """The rows [own S, D/2] of (cos, sin) [S, D/2] for this rank's tokens."""
    if rope is None:
        return None
    cos, sin = (x.split([sum(cut) for cut in cuts])[rank] for x in rope)
    return cos, sin


# ---- VAE


def parallel_vae(vae: CausalVAE, context: ParallelContext) -> CausalVAE:
    """The same VAE on several ranks: each calls it with the same input and gets the whole result.

    It shares the weights of `vae`. Tiles and slices work as in one process, one after the other.
    """
    with torch.device("meta"):
        parallel = CausalVAE(vae.config, run=ParallelRun(context=context))
    parallel.load_state_dict(vae.state_dict(keep_vars=True), assign=True)
    return parallel.train(vae.training)


@dataclass(frozen=True, kw_only=True)
class ParallelRun:
    """`run_causal` on several ranks, equal to it in either case:

    - a whole clip (`chunk` 0) is cut into a run of frames per rank, and group norms sum over the ranks;
    - pieces go round the ranks, each at work on a piece as soon as the one before has left its first layers:
      the norms of a piece are its own, as in the released models. Ranks without a piece wait.

    A clip of a single piece or frame has nothing to share and is run by every rank.
    """

    context: ParallelContext

    def __call__(self, stage: Stage, x_BCTHW: Tensor, *, chunk: int, single_frame: str) -> Tensor:
        num_frames = x_BCTHW.shape[2]
        bounds = chunk_bounds(num_frames, chunk)
        if self.context.degree == 1 or num_frames == 1 or (chunk and len(bounds) == 1):
            return run_causal(stage, x_BCTHW, chunk=chunk, single_frame=single_frame)
        if chunk == 0:
            own = run_own_frames(stage, x_BCTHW, self.context, single_frame=single_frame)
            return torch.cat(gather_parts(own, self.context), dim=2)
        own = run_own_pieces(stage, x_BCTHW, bounds, self.context, single_frame=single_frame)
        return torch.cat(deal_back(gather_parts(own, self.context), len(bounds)), dim=2)


def check_clip_degree(config: VAEConfig, num_frames: int, degree: int) -> None:
    """SettingError where a clip of `num_frames` encoded, or its latents decoded, whole leave a rank without
    frames; clips in pieces and single frames never do."""
    latents = (num_frames - 1) // config.time_factor + 1
    if num_frames > 1 and config.encode_frames == 0:
        frame_sizes(num_frames, degree, unit=config.time_factor, single=True)
    if latents > 1 and config.decode_latents == 0:
        single = ClipContext(single_frame=config.single_frame).has_single_frame(latents)
        frame_sizes(latents, degree, unit=1, single=single)


def frame_sizes(num_frames: int, degree: int, *, unit: int, single: bool) -> tuple[int, ...]:
    """Frames of each rank: whole `unit`s as equally as can be, and a `single` first frame with the first.

    Where the units divide it is upstream's rule (25 frames, 2 ranks, units of 4: 13 and 12), which drops a
    remainder without a word. SettingError where a rank would have no unit, listing the legal degrees.
    """
    units = (num_frames - single) // unit
    check_degree(f"VAE with {num_frames} frames", degree, range(1, max(units, 1) + 1))
    first, *others = (unit * count for count in part_sizes(units, degree))
    return first + single, *others


def run_own_frames(stage: Stage, x_BCTHW: Tensor, context: ParallelContext, *, single_frame: str) -> Tensor:
    """This rank's frames of the result of `stage` on a whole clip [B, C, T, H, W] that every rank has."""
    num_frames = x_BCTHW.shape[2]
    single = ClipContext(single_frame=single_frame).has_single_frame(num_frames)
    sizes = frame_sizes(num_frames, context.degree, unit=stage.frame_unit, single=single)
    return stage(x_BCTHW.split(sizes, dim=2)[context.rank], FramesContext(context, single=single))


class FramesContext(ClipContext):
    """A run of frames whose neighbours in the clip are on the neighbouring ranks."""

    def __init__(self, context: ParallelContext, *, single: bool) -> None:
        super().__init__(single_frame="first_piece" if single else "never", keep=False)
        self.context = context
        self.first_piece = context.rank == 0

    def extend(self, conv: nn.Module, x_BCTHW: Tensor, num_frames: int) -> Tensor:
        """Put the last `num_frames` frames of the rank before in front. A rank with fewer of its own passes
        on some of what it gets, so it must get that first."""
        rank, after = self.context.rank, self.context.rank + 1
        history = x_BCTHW.new_empty(_with_frames(x_BCTHW, num_frames))
        receive = {rank - 1: history} if rank > 0 else {}
        at_once = not self.context.is_last and x_BCTHW.shape[2] >= num_frames
        exchange(self.context, send={after: x_BCTHW[:, :, -num_frames:]} if at_once else {}, receive=receive)
        if receive:
            x_BCTHW = torch.cat([history, x_BCTHW], dim=2)
        else:
            x_BCTHW = super().extend(conv, x_BCTHW, num_frames)
        if not at_once and not self.context.is_last:
            exchange(self.context, send={after: x_BCTHW[:, :, -num_frames:]})
        return x_BCTHW

    def group_norm(self, norm: nn.GroupNorm, x_BCTHW: Tensor) -> Tensor:
        """Mean, then variance of the whole clip as sums over the ranks, weighted by their frames, in float32.

        Summing deviations from the common mean loses no digits, as a sum of squares would.
        """
        frames = x_BCTHW.shape[2]
        grouped = x_BCTHW.float().unflatten(1, (norm.num_groups, -1))  # [B, G, C/G, T, H, W]
        own_var, own_mean = torch.var_mean(grouped, dim=(2, 3, 4, 5), correction=0)  # [B, G]
        weights = torch.full_like(own_mean[:1], frames)
        *totals, count = sum_over(torch.cat([own_mean * frames, weights]), self.context).split(1)
        mean = torch.cat(totals) / count
        var = sum_over((own_var + (own_mean - mean).square()) * frames, self.context) / count
        return _normalise(norm, x_BCTHW, mean, var)


def _normalise(norm: nn.GroupNorm, x_BCTHW: Tensor, mean_BG: Tensor, var_BG: Tensor) -> Tensor:
    """Group norm with the given statistics, as one scale and shift per channel."""
    repeats = norm.num_channels // norm.num_groups
    rstd_BC, mean_BC = (x.repeat_interleave(repeats, dim=1) for x in ((var_BG + norm.eps).rsqrt(), mean_BG))
    scale_BC = rstd_BC * norm.weight.float()
    shift_BC = norm.bias.float() - mean_BC * scale_BC
    y = torch.addcmul(shift_BC[:, :, None, None, None], x_BCTHW.float(), scale_BC[:, :, None, None, None])
    return y.to(x_BCTHW.dtype)


def run_own_pieces(
    stage: Stage,
    x_BCTHW: Tensor,
    bounds: Sequence[tuple[int, int]],
    context: ParallelContext,
    *,
    single_frame: str,
) -> Tensor:
    """The results of this rank's pieces, joined along time: every `degree`-th one, from its own number on."""
    pieces = PiecesContext(context, len(bounds), single_frame=single_frame)
    outputs = []
    for start, end in bounds[context.rank :: context.degree]:
        outputs.append(stage(x_BCTHW[:, :, start:end], pieces))
        pieces.next_piece()
    return torch.cat(outputs, dim=2) if outputs else x_BCTHW.new_empty([0] * x_BCTHW.ndim)


class PiecesContext(ClipContext):
    """Every `degree`-th piece of a clip, the ones between being on the other ranks.

    A convolution gets its history from the rank before as soon as that has it. Only the first rank gets all
    histories of a piece together, once the last rank has finished it: sent one by one, they would wait for a
    rank that is itself still sending.
    """

    def __init__(self, context: ParallelContext, num_pieces: int, *, single_frame: str) -> None:
        super().__init__(single_frame=single_frame)
        self.context, self.num_pieces = context, num_pieces
        self.piece = context.rank
        self.first_piece = self.piece == 0

    def extend(self, conv: nn.Module, x_BCTHW: Tensor, num_frames: int) -> Tensor:
        rank = self.context.rank
        if rank > 0:
            self.histories[conv] = x_BCTHW.new_empty(_with_frames(x_BCTHW, num_frames))
            exchange(self.context, receive={rank - 1: self.histories[conv]})
        x_BCTHW = super().extend(conv, x_BCTHW, num_frames)
        if not self.context.is_last and self.piece + 1 < self.num_pieces:
            exchange(self.context, send={rank + 1: self.histories[conv]})
        return x_BCTHW

    def next_piece(self) -> None:
        """End a piece: from the last rank all histories go to the first, whose own have the same shapes."""
        flat = torch.cat([history.flatten() for history in self.histories.values()])
        if self.context.is_last and self.piece + 1 < self.num_pieces:
            exchange(self.context, send={0: flat})
        self.piece += self.context.degree
        self.first_piece = False
        if self.context.rank == 0 and self.piece < self.num_pieces:
            exchange(self.context, receive={self.context.degree - 1: flat})
            sizes = [history.numel() for history in self.histories.values()]
            for (conv, history), x in zip(self.histories.items(), flat.split(sizes), strict=True):
                self.histories[conv] = x.view(history.shape)


def deal_back(parts: Sequence[Tensor], num_pieces: int) -> list[Tensor]:
    """The ranks' joined pieces [B, C, T, H, W] apart and in the clip's order; all but the first are equally
    long, as `chunk_bounds` makes them."""
    degree = len(parts)
    counts = [len(range(rank, num_pieces, degree)) for rank in range(degree)]
    size = parts[1].shape[2] // counts[1]
    pieces: list[Tensor] = [parts[0]] * num_pieces
    for rank, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if count:
            lengths = [part.shape[2] - (count - 1) * size] + [size] * (count - 1)
            pieces[rank::degree] = part.split(lengths, dim=2)
    return pieces


def _with_frames(x_BCTHW: Tensor, num_frames: int) -> tuple[int, ...]:
    return *x_BCTHW.shape[:2], num_frames, *x_BCTHW.shape[3:]
