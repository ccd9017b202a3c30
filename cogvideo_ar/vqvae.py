"""The image codec: pixels <-> discrete codes at one, two or three rates (icetk's hierarchical VQVAE).

One encoder, residual down-samplers behind it for the coarser rates, one codebook, one decoder per rate.
Names inside encoder and decoders follow the released checkpoint, so that the checkpoint table stays short.
Pixels are in -1..1 outside; inside they are normalised as icetk does it on 0..1.
Legend: B batch, C channels, H/W pixels, h/w grid of codes, N positions, D code dim, K codebook size,
L sequence.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo_ar.config import VQVAEConfig
from shared.attention import attend

NORM_EPS = 1e-6
# Quirk(vqvae_attention_level): attention sits where a nominal 256 px image is 16 px wide, whatever the real
# size; only the decoder of rate 16 is that deep.
ATTENTION_LEVEL = 4
DISTANCES_PER_CHUNK = 2**24  # nearest-code search: 64 MiB of float32 distances at a time


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each behind GroupNorm and SiLU, plus the input: [B, C, h, w] -> [B, C2, h, w]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_channels = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if self.changes_channels else x) + h


class AttentionBlock(nn.Module):
    """One head over all positions, residual: [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q_BNLC, k_BNLC, v_BNLC = (part(h).flatten(2).mT.unsqueeze(1) for part in (self.q, self.k, self.v))
        out_BCL = attend(q_BNLC, k_BNLC, v_BNLC).squeeze(1).mT
        return x + self.proj_out(out_BCL.reshape(x.shape))


class Downsample(nn.Module):
    """Halve both axes (floor) by a stride-2 convolution; zeros are padded right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResidualDownsample(nn.Module):
    """Average pooling plus `Downsample`: from one rate to the next coarser one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_down_sampler = Downsample(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) + self.conv_down_sampler(x)


class Upsample(nn.Module):
    """Double both axes (nearest), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution; `resample` is "downsample", "upsample" or None."""

    def __init__(
        self,
        channels: tuple[int, int],
        num_blocks: int,
        groups: int,
        *,
        resample: str | None,
        attention: bool,
    ) -> None:
        super().__init__()
        in_channels, out_channels = channels
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResBlock(i, o, groups) for i, o in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(out_channels, groups) for _ in range(num_blocks * attention))
        if resample:
            self.add_module(resample, (Upsample if resample == "upsample" else Downsample)(out_channels))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.get_submodule(self.resample)(x) if self.resample else x


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Normalised pixels [B, 3, H, W] -> features [B, encoder_out_channels, H/rate, W/rate] (floored)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        groups, last = config.norm_groups, len(config.encoder_multipliers) - 1
        widths = [config.base_channels * m for m in (1, *config.encoder_multipliers)]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                (widths[i], widths[i + 1]),
                config.num_res_blocks,
                groups,
                resample="downsample" if i < last else None,
                attention=False,
            )
            for i in range(last + 1)
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.encoder_out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Codebook vectors [B, D, h, w] -> normalised pixels [B, 3, h*rate, w*rate]."""

    def __init__(self, config: VQVAEConfig, multipliers: tuple[int, ...]) -> None:
        super().__init__()
        groups = config.norm_groups
        widths = [config.base_channels * m for m in (*multipliers, multipliers[-1])]
        self.conv_in = nn.Conv2d(config.code_dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(  # numbered by level, run from the last to the first
            Level(
                (widths[i + 1], widths[i]),
                config.decoder_res_blocks,
                groups,
                resample="upsample" if i > 0 else None,
                attention=i == ATTENTION_LEVEL,
            )
            for i in range(len(multipliers))
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantized(NamedTuple):
    """z_q [B, D, h, w] (gradient straight through), the loss, codes int64 [B, h, w], z_e."""

    z_q: Tensor
    loss: Tensor
    codes: Tensor
    z_e: Tensor


class Quantizer(nn.Module):
    """Nearest row of one codebook [K, D], trained by moving averages ("ema") or by its loss ("gradient").

    The moving averages are ours: icetk stores their buffers and never updates them (van den Oord et al. 2017,
    appendix A.1, is the rule)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        size, dim = config.codebook_size, config.code_dim
        self.commitment_cost = config.commitment_cost
        self.by_gradient = config.codebook_update == "gradient"
        self.proj = nn.Conv2d(config.encoder_out_channels, dim, 1)
        codebook = torch.empty(size, dim).uniform_(-1 / size, 1 / size)
        self.codebook = nn.Parameter(codebook, requires_grad=self.by_gradient)
        self.register_buffer("code_counts", torch.ones(size))
        self.register_buffer("code_sums", codebook.clone())

    code_counts: Tensor
    code_sums: Tensor

    def forward(self, features: Tensor) -> Quantized:
        z_e = self.proj(features)
        codes = self.nearest(z_e)
        e = self.lookup(codes).to(z_e.dtype)
        loss = self.commitment_cost * F.mse_loss(z_e, e.detach())
        if self.by_gradient:
            loss = loss + F.mse_loss(e, z_e.detach())
        return Quantized(z_e + (e - z_e).detach(), loss, codes, z_e)

    @torch.no_grad()
    def nearest(self, z_BDhw: Tensor) -> Tensor:
        """Codes int64 [B, h, w] by squared distance, in float32 (without |z|^2, a constant)."""
        z_ND, codebook = _positions(z_BDhw).float(), self.codebook.float()
        norms_K = codebook.square().sum(1)
        rows = max(1, DISTANCES_PER_CHUNK // len(codebook))
        chunks = [torch.addmm(norms_K, z, codebook.T, alpha=-2).argmin(1) for z in z_ND.split(rows)]
        batch, _, height, width = z_BDhw.shape
        return torch.cat(chunks).view(batch, height, width)

    def lookup(self, codes_Bhw: Tensor) -> Tensor:
        """Codebook vectors [B, D, h, w] of integer codes."""
        return F.embedding(codes_Bhw, self.codebook).permute(0, 3, 1, 2)  # [B, h, w, D] -> [B, D, h, w]

    @torch.no_grad()
    def init_codebook(self, z_BDhw: Tensor, generator: torch.Generator) -> None:
        """Fill the codebook with positions drawn from z; if z has too few, they repeat with some noise."""
        z_ND = _positions(z_BDhw).float()
        size, count = len(self.codebook), len(z_ND)
        picks = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-size // count))])[
            :size
        ]
        rows = z_ND[picks.to(z_ND.device)]
        if count < size:
            noise = torch.randn(rows.shape, generator=generator).to(rows.device)
            rows = rows + 0.01 * z_ND.std(0, correction=0) * noise
        self.codebook.copy_(rows)
        self.restart_averages()

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Make the moving averages agree with the codebook; needed before tuning released weights, whose
        averages were never updated."""
        self.code_counts.fill_(1)
        self.code_sums.copy_(self.codebook)

    @torch.no_grad()
    def ema_update(
        self,
        z: Tensor,
        codes: Tensor,
        *,
        decay: float = 0.99,
        eps: float = 1e-5,
        dead_below: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> int:
        """Move the codebook towards the means of the z [B, D, h, w] that chose each code [B, h, w].

        Counts are Laplace-smoothed by `eps`. With a CPU `generator`, codes whose average count is under
        `dead_below` of the mean count start again at positions drawn from z. Returns how many did."""
        z_ND, codes_N = _positions(z).float(), codes.reshape(-1)
        error_N = (z_ND - self.codebook[codes_N]).square().sum(1)
        counts_K = torch.bincount(codes_N, minlength=len(self.codebook)).to(self.code_counts)
        sums_KD = torch.zeros_like(self.code_sums, dtype=torch.float32).index_add_(0, codes_N, z_ND)
        self.code_counts.lerp_(counts_K, 1 - decay)
        self.code_sums.lerp_(sums_KD.to(self.code_sums), 1 - decay)
        total = self.code_counts.sum()
        smoothed_K = (self.code_counts + eps) / (total + eps * len(self.codebook)) * total
        self.codebook.copy_(self.code_sums / smoothed_K[:, None])
        return 0 if generator is None else self._restart_dead(z_ND, error_N, dead_below, generator)

    def _restart_dead(
        self, z_ND: Tensor, error_N: Tensor, dead_below: float, generator: torch.Generator
    ) -> int:
        """Restarts go where the codebook is worst: positions drawn in proportion to their squared error."""
        mean_count = self.code_counts.mean()
        dead = (self.code_counts < dead_below * mean_count).nonzero()[:, 0]
        if not len(dead):
            return 0
        chances = error_N.cpu() + 1e-12
        picks = torch.multinomial(chances, len(dead), replacement=True, generator=generator)
        rows = z_ND[picks.to(z_ND.device)].to(self.codebook.dtype)
        self.codebook[dead] = rows
        self.code_counts[dead] = mean_count
        self.code_sums[dead] = rows * mean_count
        return len(dead)


class VQVAEOutput(NamedTuple):
    """What training needs, by rate: reconstructions [B, 3, H, W] in -1..1 (not clamped), codes int64
    [B, h, w] and z_e [B, D, h, w]; the quantiser's loss is summed over the rates."""

    reconstructions: dict[int, Tensor]
    commitment_loss: Tensor
    codes: dict[int, Tensor]
    z_e: dict[int, Tensor]


class VQVAE(nn.Module):
    """Images [B, 3, H, W] in -1..1 <-> codes int64 [B, h, w]; h = H/rate, floored (icetk 0.0.7)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        extra = config.legal_rates.index(max(config.rates))
        self.downsamplers = nn.ModuleList(
            ResidualDownsample(config.encoder_out_channels) for _ in range(extra)
        )
        self.quantizer = Quantizer(config)
        self.decoders = nn.ModuleDict(
            {str(r): Decoder(config, config.multipliers_of(r)) for r in config.rates}
        )

    def forward(self, pixels: Tensor) -> VQVAEOutput:
        """Encode, quantise and decode at every built rate, with gradients straight through."""
        features = self.features(pixels, max(self.config.rates))
        quantized = {rate: self.quantizer(features[rate]) for rate in self.config.rates}
        return VQVAEOutput(
            reconstructions={
                r: self._denormalise(self.decoders[str(r)](q.z_q)) for r, q in quantized.items()
            },
            commitment_loss=torch.stack([q.loss for q in quantized.values()]).sum(),
            codes={rate: q.codes for rate, q in quantized.items()},
            z_e={rate: q.z_e for rate, q in quantized.items()},
        )

    def reconstruct_unquantized(self, pixels: Tensor, rate: int) -> Tensor:
        """Encode and decode without the codebook: how training begins, before the codebook is any good."""
        z_e = self.quantizer.proj(self.features(pixels, rate)[rate])
        return self._denormalise(self.decoders[str(rate)](z_e))

    @torch.no_grad()
    def encode(self, pixels: Tensor, rate: int = 8) -> Tensor:
        """Pixels [B, 3, H, W] in -1..1 -> codes int64 [B, h, w]."""
        self._check_rate(rate)
        return self.quantizer.nearest(self.quantizer.proj(self.features(pixels, rate)[rate]))

    @torch.no_grad()
    def decode(self, codes: Tensor, rate: int = 8) -> Tensor:
        """Codes [B, h, w] -> pixels [B, 3, h*rate, w*rate], about -1..1: not clamped, as upstream."""
        self._check_rate(rate)
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(f"codes must be integers [B, h, w], got {codes.dtype} {list(codes.shape)}")
        low, high, size = int(codes.min()), int(codes.max()), self.config.codebook_size
        if low < 0 or high >= size:
            raise ValueError(f"codes must lie in 0..{size - 1}, got {low}..{high}")
        return self._denormalise(self.decoders[str(rate)](self.quantizer.lookup(codes.long())))

    @torch.no_grad()
    def init_codebook(self, pixels: Tensor, generator: torch.Generator) -> None:
        """Start the codebook from encoded images [B, 3, H, W]: random positions of all built rates."""
        features = self.features(pixels, max(self.config.rates))
        z = [self.quantizer.proj(features[rate]) for rate in self.config.rates]
        self.quantizer.init_codebook(_joined(z), generator)

    def ema_update(
        self,
        output: VQVAEOutput,
        *,
        decay: float = 0.99,
        dead_below: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> int:
        """One moving-average step over all rates of a training forward; returns how many codes restarted."""
        codes = torch.cat([codes.flatten() for codes in output.codes.values()])
        z = _joined([*output.z_e.values()])
        return self.quantizer.ema_update(z, codes, decay=decay, dead_below=dead_below, generator=generator)

    def features(self, pixels: Tensor, coarsest_rate: int) -> dict[int, Tensor]:
        """Encoder features [B, C, h, w] of every rate up to the coarsest one asked for."""
        self._check_pixels(pixels, coarsest_rate)
        rates = self.config.legal_rates
        features = {rates[0]: self.encoder(self._normalise(pixels))}
        for fine, coarse, down in zip(rates, rates[1:], self.downsamplers, strict=False):
            if coarse <= coarsest_rate:
                features[coarse] = down(features[fine])
        return features

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (
            pixels.new_tensor(v).view(3, 1, 1) for v in (self.config.pixel_mean, self.config.pixel_std)
        )
        return (((pixels + 1) / 2 - mean) / std).to(self.encoder.conv_in.weight.dtype)

    def _denormalise(self, x: Tensor) -> Tensor:
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (self.config.pixel_mean, self.config.pixel_std))
        return (x * std + mean) * 2 - 1

    def _check_rate(self, rate: int) -> None:
        if rate not in self.config.rates:
            raise ValueError(f"rate must be one of {self.config.rates} (those built), got {rate}")

    def _check_pixels(self, pixels: Tensor, rate: int) -> None:
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            got = f"{pixels.dtype} {list(pixels.shape)}"
            raise ValueError(f"pixels must be floats in -1..1 of shape [B, 3, H, W], got {got}")
        if min(pixels.shape[2:]) < rate:
            height, width = pixels.shape[2:]
            raise ValueError(f"a {width}x{height} image is too small for rate {rate}: at least {rate}x{rate}")


def _positions(z_BDhw: Tensor) -> Tensor:
    return z_BDhw.permute(0, 2, 3, 1).reshape(-1, z_BDhw.shape[1])  # [B, D, h, w] -> [B, h, w, D] -> [N, D]


def _joined(z: list[Tensor]) -> Tensor:
    """Positions of several rates as one [N, D, 1, 1], in the order of their flattened codes."""
    return torch.cat([_positions(part) for part in z])[:, :, None, None]
