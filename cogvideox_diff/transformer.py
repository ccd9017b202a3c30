"""The expert transformer: text and video tokens in one sequence, shared weights, separate modulation.

CogVideoX paper section 2.2; upstream `sat/dit_video_concat.py`.

Legend: B batch, T/H/W latent frames/rows/columns, C channels, L text tokens, V video tokens, S = L + V,
N heads, D width or head dim, E embedding of time (and offset).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_diff import fast_block
from cogvideox_diff.config import TransformerConfig
from cogvideox_diff.positions import rope_angles, rope_coordinates, rotate, sincos_table, timestep_embedding
from shared.attention import attend
from shared.cpu_linear import apply_linear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, N, S, D] -> [B, N, S, D]
Rope = tuple[Tensor, Tensor]


class Packing(Protocol):
    """Samples of different sizes as one row: whose a token is, and who sees whom (`training.pack`)."""

    @property
    def text_owner(self) -> Tensor: ...  # int64 [L]: rows of the embedding
    @property
    def video_owner(self) -> Tensor: ...  # int64 [V]
    def attend(self, q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, /) -> Tensor: ...


class PatchEmbed(nn.Module):
    """[B, T, C, H, W] -> [B, V, D]. `proj` only holds the kernel in the checkpoint's shape (1.0: a
    convolution's, 1.5: a matrix): a convolution whose kernel is its stride is one linear map per patch."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        t, h, w = config.patch_size
        width = config.hidden_dim
        self.proj: nn.Conv2d | nn.Linear
        if t == 1:
            self.proj = nn.Conv2d(config.in_channels, width, (h, w), stride=(h, w))
        else:
            self.proj = nn.Linear(config.in_channels * t * h * w, width)

    def forward(self, latents_BTCHW: Tensor) -> Tensor:
        return F.linear(patchify(latents_BTCHW, self.patch_size), self.proj.weight.flatten(1), self.proj.bias)


def patchify(latents_BTCHW: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, T, C, H, W] -> [B, V, C * t * h * w]; tokens in order (time, row, column)."""
    t, h, w = patch
    x = latents_BTCHW.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(1, (-1, t))  # B T t C H h W w
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)  # B (T H W) (C t h w)


def unpatchify(tokens_BVD: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Inverse of `patchify`: [B, V, C * t * h * w] -> [B, T, C, H, W]."""
    x = tokens_BVD.unflatten(2, (-1, *patch)).unflatten(1, grid)  # B T H W C t h w
    return x.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, linear: a sinusoid [B, dim_in] -> [B, dim_out]."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim_out)
        self.fc2 = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class ExpertAdaLayerNorm(nn.Module):
    """One LayerNorm for both parts, then each part's own scale and shift; also gives each part's own gate."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.video = nn.Linear(config.time_embed_dim, 3 * width)  # shift, scale, gate
        self.text = nn.Linear(config.time_embed_dim, 3 * width)

    def forward(
        self, text_BLD: Tensor, video_BVD: Tensor, emb_BE: Tensor, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (joint [B, L + V, D], gate of the text [B, 1, D], gate of the video [B, 1, D]); packed, the
        gates are those of every token, [1, L, D] and [1, V, D]."""
        emb_BE = F.silu(emb_BE)
        text_BD, video_BD = self.text(emb_BE), self.video(emb_BE)
        text_shift, text_scale, text_gate = _per_token(text_BD, packing.text_owner if packing else None)
        video_shift, video_scale, video_gate = _per_token(video_BD, packing.video_owner if packing else None)
        text = self.norm(text_BLD) * (1 + text_scale) + text_shift
        video = self.norm(video_BVD) * (1 + video_scale) + video_shift
        return torch.cat([text, video], dim=1), text_gate, video_gate


def _per_token(modulation_BD: Tensor, owner_S: Tensor | None, parts: int = 3) -> tuple[Tensor, ...]:
    """Parts [B, 1, D] for all tokens of a row, or each token's own [1, S, D]."""
    if owner_S is None:
        return modulation_BD[:, None].chunk(parts, dim=-1)
    return modulation_BD[owner_S][None].chunk(parts, dim=-1)


class Attention(nn.Module):
    """Full self-attention over the joint sequence, without any mask; q and k are normalised per head."""

    def __init__(self, config: TransformerConfig, attend: Attend) -> None:
        super().__init__()
        width = config.hidden_dim
        self.head_dim = config.head_dim
        self.attend = attend
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.norm_q = nn.LayerNorm(config.head_dim, eps=config.qk_norm_eps)
        self.norm_k = nn.LayerNorm(config.head_dim, eps=config.qk_norm_eps)
        self.out = nn.Linear(width, width)

    def forward(self, x_BSD: Tensor, rope: Rope | None, packing: Packing | None = None) -> Tensor:
        q_BNSD, k_BNSD, v_BNSD = (
            apply_linear(linear, x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q_BNSD, k_BNSD = self.norm_q(q_BNSD), self.norm_k(k_BNSD)
        if rope is not None:
            q_BNSD, k_BNSD = rotate(q_BNSD, rope), rotate(k_BNSD, rope)
        attend = self.attend if packing is None else packing.attend
        out_BNSD = attend(q_BNSD, k_BNSD, v_BNSD)
        return apply_linear(self.out, out_BNSD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, tanh-approximated GELU, linear."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(self.fc2, apply_linear(self.fc1, x, gelu=True))


class ExpertBlock(nn.Module):
    """Attention and MLP over [text ; video], each with expert modulation before and gates per part behind."""

    def __init__(self, config: TransformerConfig, attend: Attend) -> None:
        super().__init__()
        self.norm1 = ExpertAdaLayerNorm(config)
        self.attn = Attention(config, attend)
        self.norm2 = ExpertAdaLayerNorm(config)
        self.mlp = MLP(config.hidden_dim, config.mlp_ratio)

    def forward(
        self,
        text_BLD: Tensor,
        video_BVD: Tensor,
        emb_BE: Tensor,
        rope: Rope | None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor]:
        if packing is None and not torch.compiler.is_compiling() and fast_block.applies(video_BVD):
            return fast_block.run_block(self, text_BLD, video_BVD, emb_BE, rope)
        joint_BSD, text_gate, video_gate = self.norm1(text_BLD, video_BVD, emb_BE, packing)
        text, video = _cut(self.attn(joint_BSD, rope, packing), text_BLD)
        text_BLD, video_BVD = text_BLD + text_gate * text, video_BVD + video_gate * video

        joint_BSD, text_gate, video_gate = self.norm2(text_BLD, video_BVD, emb_BE, packing)
        text, video = _cut(self.mlp(joint_BSD), text_BLD)
        return text_BLD + text_gate * text, video_BVD + video_gate * video

    def init_weights(self, generator: torch.Generator, num_layers: int, zero_modulation: bool) -> None:
        """Normal with deviation 0.02; what writes to the residual stream is scaled down with the depth."""
        for linear in (self.attn.q, self.attn.k, self.attn.v, self.mlp.fc1):
            _init_normal(linear, 0.02, generator)
        for linear in (self.attn.out, self.mlp.fc2):
            _init_normal(linear, 0.02 / math.sqrt(2 * num_layers), generator)
        if zero_modulation:
            for norm in (self.norm1, self.norm2):
                _zero(norm.text)
                _zero(norm.video)


def _cut(joint_BSD: Tensor, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
    length = text_BLD.shape[1]
    return joint_BSD[:, :length], joint_BSD[:, length:]


class FinalNorm(nn.Module):
    """The last LayerNorm of the video part with a shift and scale from the time embedding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_dim, eps=config.final_norm_eps)
        self.modulation = nn.Linear(config.time_embed_dim, 2 * config.hidden_dim)

    def forward(self, video_BVD: Tensor, emb_BE: Tensor, packing: Packing | None = None) -> Tensor:
        modulation_BD = self.modulation(F.silu(emb_BE))
        shift, scale = _per_token(modulation_BD, packing.video_owner if packing else None, parts=2)
        return self.norm(video_BVD) * (1 + scale) + shift


class ExpertTransformer(nn.Module):
    """Latents [B, T, C_in, H, W], text features [B, L, text_dim], timesteps [B] in 0..999 (may be fractional)
    -> v [B, T, C_out, H, W]; T, H, W must be multiples of the patch size.

    `attend` replaces the attention kernel (another backend, sequence parallelism). The stages `embed`,
    `run_blocks` and `head` may be called apart, to cut the video tokens between them.
    """

    processes = 1  # that share a step

    def __init__(self, config: TransformerConfig, attend: Attend = attend) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_dim
        self.patch_embed = PatchEmbed(config)
        self.text_proj = nn.Linear(config.text_dim, width)
        self.time_embed = EmbeddingMLP(width, config.time_embed_dim)
        if config.ofs_embed_dim:
            self.ofs_embed = EmbeddingMLP(config.ofs_embed_dim, config.time_embed_dim)
        if config.position == "rope+learned":
            tokens = config.text_len + math.prod(config.sample_grid)
            self.pos_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(ExpertBlock(config, attend) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(width, eps=config.norm_eps)
        self.norm_out = FinalNorm(config)
        self.proj_out = nn.Linear(width, config.out_channels * math.prod(config.patch_size))

    def attend_by(self, kernel: Attend) -> None:
        """Let every block's attention take another kernel."""
        for layer in self.modules():
            if isinstance(layer, Attention):
                layer.attend = kernel

    def forward(
        self, latents_BTCHW: Tensor, text_BLD: Tensor, timesteps_B: Tensor, ofs: Tensor | None = None
    ) -> Tensor:
        """`ofs` [B] or [1]: the offset input of the 1.5 image-to-video model (upstream always gives 2.0)."""
        grid = self.grid_of(latents_BTCHW, text_BLD)
        emb_BE = self.embed_time(timesteps_B, ofs)
        text_BLD, video_BVD = self.embed(latents_BTCHW, text_BLD, grid)
        rope = self.rope(grid, text_BLD.shape[1], latents_BTCHW.device)
        text_BLD, video_BVD = self.run_blocks(text_BLD, video_BVD, emb_BE, rope)
        return unpatchify(self.head(video_BVD, emb_BE), grid, self.config.patch_size)

    def grid_of(self, latents_BTCHW: Tensor, text_BLD: Tensor) -> tuple[int, int, int]:
        """Patches (time, rows, columns) of latents; ValueError where shapes do not fit the model."""
        config = self.config
        _, t, c, h, w = latents_BTCHW.shape
        if c != config.in_channels:
            raise ValueError(f"latents have {c} channels, the model reads {config.in_channels}")
        if any(n % p for n, p in zip((t, h, w), config.patch_size, strict=True)):
            raise ValueError(f"latent (frames, rows, columns) {(t, h, w)} must divide by {config.patch_size}")
        if text_BLD.shape[-1] != config.text_dim:
            raise ValueError(
                f"text features have width {text_BLD.shape[-1]}, the model reads {config.text_dim}"
            )
        return t // config.patch_size[0], h // config.patch_size[1], w // config.patch_size[2]

    def embed_time(self, timesteps_B: Tensor, ofs: Tensor | None) -> Tensor:
        """Embedding [B, E] of the timesteps, plus that of the offset where the model has one. Of one timestep
        expanded to all rows it is one embedding, expanded likewise, and blocks take their modulation once."""
        batch = len(timesteps_B)
        if batch > 1 and timesteps_B.stride(0) == 0 and (ofs is None or len(ofs) == 1):
            return self.embed_time(timesteps_B[:1], ofs).expand(batch, -1)
        config, dtype = self.config, self.text_proj.weight.dtype
        emb_BE = self.time_embed(timestep_embedding(timesteps_B, config.hidden_dim).to(dtype))
        if not config.ofs_embed_dim:
            return emb_BE
        if ofs is None:
            raise ValueError("this model has an offset input: pass ofs (a tensor holding 2.0, as trained)")
        return emb_BE + self.ofs_embed(timestep_embedding(ofs, config.ofs_embed_dim).to(dtype))

    def embed(
        self, latents_BTCHW: Tensor, text_BLD: Tensor, grid: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens of both parts with the position table, where the model has one, added."""
        text_BLD, video_BVD = self.text_proj(text_BLD), self.patch_embed(latents_BTCHW)
        match self.config.position:
            case "sincos":
                table_VD = sincos_table(
                    grid, self.config.hidden_dim, scale=self.config.sincos_scale, device=video_BVD.device
                )
                return text_BLD, video_BVD + table_VD.to(video_BVD.dtype)
            case "rope+learned":
                table_text, table_video = self.learned_table(grid, text_BLD.shape[1])
                return text_BLD + table_text, video_BVD + table_video
            case _:
                return text_BLD, video_BVD

    def learned_table(self, grid: tuple[int, int, int], text_len: int) -> tuple[Tensor, Tensor]:
        """The learned table's text part and video part; fewer frames take its first rows, as in SAT.
        (diffusers silently computes a sin/cos table instead.)"""
        most = self.config.sample_grid
        if grid[1:] != most[1:] or grid[0] > most[0]:
            raise ValueError(
                f"the learned table is for {most[0]} x {most[1]} x {most[2]} patches, got {grid}"
            )
        if text_len != self.config.text_len:
            raise ValueError(f"the learned table is for {self.config.text_len} text tokens, got {text_len}")
        end = text_len + math.prod(grid)
        return self.pos_embedding[:, :text_len], self.pos_embedding[:, text_len:end]

    def rope(self, grid: tuple[int, int, int], text_len: int, device: torch.device) -> Rope | None:
        """(cos, sin) [S, head_dim/2] over the joint sequence; text tokens have angle 0, so they stay."""
        config = self.config
        if config.position == "sincos":
            return None
        coordinates = rope_coordinates(grid, config.sample_grid, config.grid_rule, device)
        angles = F.pad(rope_angles(coordinates, config.head_dim), (0, 0, text_len, 0))
        return angles.cos(), angles.sin()

    def run_blocks(
        self,
        text_BLD: Tensor,
        video_BVD: Tensor,
        emb_BE: Tensor,
        rope: Rope | None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            text_BLD, video_BVD = block(text_BLD, video_BVD, emb_BE, rope, packing)
        return text_BLD, video_BVD

    def head(self, video_BVD: Tensor, emb_BE: Tensor, packing: Packing | None = None) -> Tensor:
        """Video tokens -> patches [B, V, C_out * t * h * w]."""
        return self.proj_out(self.norm_out(self.norm_final(video_BVD), emb_BE, packing))

    # ---- initialisation

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, *, zero_modulation: bool) -> None:
        """Initialise as SAT does, from a CPU generator only. With `zero_modulation` every block starts as the
        identity (the usual choice for such models); without it as in the released training code."""
        parts = list(self.modules())
        for part in parts:
            if isinstance(part, nn.LayerNorm):
                part.reset_parameters()
            elif isinstance(part, nn.Linear | nn.Conv2d):
                _init_default(part, generator)
        for part in parts:
            if isinstance(part, ExpertBlock):
                part.init_weights(generator, self.config.num_layers, zero_modulation)
        _init_xavier(self.patch_embed.proj, generator)
        _init_xavier(self.proj_out, generator)
        if self.config.position == "rope+learned":
            nn.init.zeros_(self.pos_embedding)
        if zero_modulation:
            _zero(self.norm_out.modulation)


# A random matrix is drawn in float32 on the CPU and then copied, so that a seed means the same everywhere.


def _init_normal(linear: nn.Linear, std: float, generator: torch.Generator) -> None:
    linear.weight.copy_(torch.empty(linear.weight.shape).normal_(0, std, generator=generator))
    nn.init.zeros_(linear.bias)


def _init_xavier(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    bound = math.sqrt(6 / (layer.weight[0].numel() + len(layer.weight)))
    layer.weight.copy_(torch.empty(layer.weight.shape).uniform_(-bound, bound, generator=generator))
    _zero(layer, weight=False)


def _init_default(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    """torch's own: weights and bias uniform in +-1/sqrt(fan in)."""
    bound = 1 / math.sqrt(layer.weight[0].numel())
    for x in layer.parameters(recurse=False):
        x.copy_(torch.empty(x.shape).uniform_(-bound, bound, generator=generator))


def _zero(layer: nn.Linear | nn.Conv2d, *, weight: bool = True) -> None:
    if weight:
        nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
