"""Settings of CogVideoX (2024): frozen, keyword-only, checked when made.

`PRESETS` maps a name to a function, so that nothing is built at import. Values: the SAT and diffusers
configurations of the five released models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from shared.config_io import MOST_LAYERS

Position = Literal["sincos", "rope", "rope+learned"]
GridRule = Literal["linspace", "slice"]
DynamicMode = Literal["upstream", "rise", "fall"]
SchedulerName = Literal["ddim", "dpm"]
SamplerRules = Literal["diffusers", "sat"]
Unconditional = Literal["empty_prompt", "zeros"]
# Where 1.5 gets the latent frames that complete a pair, dropped before decoding: "front" as diffusers and SAT
# 1.5 sample and CogVideoX's fine-tuning trains, "back" as finetrainers.
FramePadding = Literal["front", "back"]

SAT_FINAL_NORM_EPS = (
    1e-6  # what the models were trained with; diffusers has 1e-5: 5e-6 relative on the output
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_choice(name: str, value: object, legal: tuple) -> None:
    _require(value in legal, f"{name} must be one of {', '.join(map(repr, legal))}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The expert transformer. `sample_size` is the latent size that positions are defined on: the base box of
    the "linspace" rule, the largest rows and columns of the "slice" rule, the extent of the learned table."""

    num_layers: int
    num_heads: int
    head_dim: int = 64
    in_channels: int = 16  # 32 for image-to-video: noisy latents, then image latents
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)  # (t, h, w)
    position: Position = "sincos"
    grid_rule: GridRule = "linspace"  # of the RoPE coordinates
    sample_size: tuple[int, int, int] = (13, 60, 90)  # latent (frames, rows, columns)
    sincos_scale: float = 1.875  # rows and columns of the sin/cos table are divided by it
    time_embed_dim: int = 512
    ofs_embed_dim: int = 0  # 0: no offset input
    text_dim: int = 4096
    text_len: int = 226
    mlp_ratio: int = 4
    norm_eps: float = 1e-5
    qk_norm_eps: float = 1e-6
    final_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _require_choice("position", self.position, get_args(Position))
        _require_choice("grid_rule", self.grid_rule, get_args(GridRule))
        legal_ofs = (0, self.time_embed_dim)  # both embeddings are added
        _require(self.ofs_embed_dim in legal_ofs, f"ofs_embed_dim must be one of {legal_ofs}")
        sizes = (self.num_layers, self.num_heads, self.head_dim, self.in_channels, self.out_channels)
        _require(min(sizes) > 0, f"layers, heads, head size and channels must be positive, got {sizes}")
        _require(self.num_layers <= MOST_LAYERS, f"num_layers must be at most {MOST_LAYERS}")
        _require(min(self.patch_size) > 0, f"patch_size must be positive, got {self.patch_size}")
        if self.position == "sincos":
            _require(
                self.hidden_dim % 16 == 0, f"the sin/cos table needs width % 16 == 0, got {self.hidden_dim}"
            )
        else:
            _require(self.head_dim % 16 == 0, f"3D RoPE needs head_dim % 16 == 0, got {self.head_dim}")
        uncut = [n % p for n, p in zip(self.sample_size, self.patch_size, strict=True)]
        if self.position != "rope+learned":
            uncut = uncut[1:]  # frames matter to the learned table only
        _require(
            not any(uncut), f"sample_size {self.sample_size} must divide by patch_size {self.patch_size}"
        )

    @property
    def hidden_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def sample_grid(self) -> tuple[int, int, int]:
        """Patches (time, rows, columns) of `sample_size`, an odd frame count rounded up."""
        t, h, w = (-(-n // p) for n, p in zip(self.sample_size, self.patch_size, strict=True))
        return t, h, w


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The 3D causal VAE: 8x8 in space and 4x in time with the released sizes, which are the defaults."""

    latent_channels: int = 16
    widths: tuple[int, ...] = (128, 256, 256, 512)  # per level, full size first
    blocks_per_level: int = 3  # the decoder has one more
    temporal_levels: int = 2  # space is halved between all levels, time only after the first so many
    norm_groups: int = 32
    norm_eps: float = 1e-6
    scaling_factor: float = 0.7
    invert_scale_latents: bool = False  # image latents are divided by the factor instead
    sample_size: tuple[int, int] = (480, 720)  # (height, width) in pixels; a tile is half of it
    # Group norm statistics are taken per piece, so piece lengths belong to the model; 0 is the whole clip.
    encode_frames: int = 8
    decode_latents: int = 2
    # Quirk(even_latent_count): the released decoder keeps a piece's first frame single when its count is odd,
    # so an even number of latents decodes to 4 frames each. "first_piece" turns k+1 latents into 4k+1 frames,
    # always; "never" makes 4 frames of every latent, as the newest SAT engine does on one GPU.
    single_frame: Literal["odd_count", "first_piece", "never"] = "odd_count"

    def __post_init__(self) -> None:
        _require(min(self.norm_groups, *self.widths) > 0, "widths and norm_groups must be positive")
        _require(0 <= self.blocks_per_level <= MOST_LAYERS, f"blocks_per_level must be 0..{MOST_LAYERS}")
        odd_widths = [width for width in self.widths if width % self.norm_groups]
        if odd_widths:
            raise ValueError(f"widths must be multiples of norm_groups={self.norm_groups}, got {odd_widths}")
        if not 0 <= self.temporal_levels < len(self.widths):
            raise ValueError(f"temporal_levels must be 0..{len(self.widths) - 1}, got {self.temporal_levels}")
        if self.encode_frames % self.time_factor or self.encode_frames < 0:
            raise ValueError(
                f"encode_frames must be 0 (whole clip) or a multiple of {self.time_factor}, "
                f"got {self.encode_frames}"
            )
        if self.decode_latents % 2 or self.decode_latents < 0:
            raise ValueError(f"decode_latents must be 0 (whole clip) or even, got {self.decode_latents}")
        if self.single_frame not in ("odd_count", "first_piece", "never"):
            raise ValueError(
                f'single_frame is "odd_count", "first_piece" or "never", got {self.single_frame!r}'
            )

    @property
    def time_factor(self) -> int:
        return 2**self.temporal_levels

    @property
    def space_factor(self) -> int:
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The text encoder, T5 v1.1 (encoder only, gated GELU); the default is XXL."""

    text_len: int = 226  # a prompt is padded and cut to it; padding takes part in all attention
    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64

    def __post_init__(self) -> None:
        _require(0 < self.num_layers <= MOST_LAYERS, f"the encoder's num_layers must be 1..{MOST_LAYERS}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Noise levels: scaled-linear betas, SNR shift, zero terminal SNR."""

    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift: float = 1.0  # log SNR falls by log(snr_shift) everywhere
    zero_terminal_snr: bool = True

    def __post_init__(self) -> None:
        _require(self.num_timesteps > 1, f"num_timesteps must exceed 1, got {self.num_timesteps}")
        _require(0 < self.beta_start < self.beta_end < 1, "betas must satisfy 0 < beta_start < beta_end < 1")
        _require(self.snr_shift > 0, f"snr_shift must be positive, got {self.snr_shift}")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How latents are sampled. `rules`: whose timesteps and noise levels, diffusers' or the SAT samplers'."""

    num_inference_steps: int = 50
    guidance_scale: float = 6.0  # 1: no guidance
    dynamic_cfg: Literal[False] | DynamicMode = False
    scheduler: SchedulerName = "ddim"
    rules: SamplerRules = "diffusers"
    unconditional: Unconditional = "empty_prompt"  # SAT: all-zero text features
    strength: float = 0.8  # video-to-video: share of the steps that are run
    ofs: float = 2.0  # read only where the transformer has an offset input

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        _require(steps > 0, f"num_inference_steps must be positive, got {steps}")
        _require(self.guidance_scale >= 0, f"guidance_scale must not be negative, got {self.guidance_scale}")
        _require_choice("dynamic_cfg", self.dynamic_cfg, (False, *get_args(DynamicMode)))
        _require_choice("scheduler", self.scheduler, get_args(SchedulerName))
        _require_choice("rules", self.rules, get_args(SamplerRules))
        _require_choice("unconditional", self.unconditional, get_args(Unconditional))
        _require(0 < self.strength <= 1, f"strength must be in (0, 1], got {self.strength}")


@dataclass(frozen=True, kw_only=True)
class GeometryConfig:
    """The native size, and the legal frame counts: `frame_step` * N + 1 up to `max_frames`."""

    height: int = 480  # pixels
    width: int = 720
    num_frames: int = 49
    fps: int = 8
    frame_step: int = 8
    max_frames: int = 49

    def __post_init__(self) -> None:
        _require(self.frame_step > 0, f"frame_step must be positive, got {self.frame_step}")
        for name, count in (("num_frames", self.num_frames), ("max_frames", self.max_frames)):
            _require((count - 1) % self.frame_step == 0, f"{name} must be {self.frame_step}N+1, got {count}")
        _require(1 <= self.num_frames <= self.max_frames, f"num_frames must be in 1..{self.max_frames}")
        _require(min(self.height, self.width, self.fps) > 0, "height, width and fps must be positive")


@dataclass(frozen=True, kw_only=True)
class CogVideoXConfig:
    """One complete model."""

    transformer: TransformerConfig
    vae: VAEConfig
    text: T5Config
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)

    def __post_init__(self) -> None:
        transformer, vae, text, geometry = self.transformer, self.vae, self.text, self.geometry
        given, read = (text.text_len, text.d_model), (transformer.text_len, transformer.text_dim)
        _require(given == read, f"text (tokens, width) {given} differ from the transformer's {read}")
        channels = (transformer.in_channels, transformer.out_channels)
        legal = channels[1] == vae.latent_channels and channels[0] in (channels[1], 2 * channels[1])
        _require(
            legal,
            f"transformer channels (in, out) {channels} do not fit {vae.latent_channels} latent channels",
        )
        step, factor = geometry.frame_step, vae.time_factor
        _require(step % factor == 0, f"frame_step must be a multiple of {factor}, got {step}")
        for name, size, patch in (
            ("height", geometry.height, transformer.patch_size[1]),
            ("width", geometry.width, transformer.patch_size[2]),
        ):
            unit = vae.space_factor * patch
            _require(size % unit == 0, f"{name} must be a multiple of {unit}, got {size}")


def cogvideox_2b() -> CogVideoXConfig:
    return CogVideoXConfig(
        transformer=TransformerConfig(num_layers=30, num_heads=30),
        vae=VAEConfig(scaling_factor=1.15258426),
        text=T5Config(),
        schedule=ScheduleConfig(snr_shift=3.0),
    )


def cogvideox_5b() -> CogVideoXConfig:
    return CogVideoXConfig(
        transformer=TransformerConfig(num_layers=42, num_heads=48, position="rope"),
        vae=VAEConfig(scaling_factor=0.7),
        text=T5Config(),
        sampling=SamplingConfig(scheduler="dpm"),
    )


def cogvideox_5b_i2v() -> CogVideoXConfig:
    return CogVideoXConfig(
        transformer=TransformerConfig(num_layers=42, num_heads=48, in_channels=32, position="rope+learned"),
        vae=VAEConfig(scaling_factor=0.7),
        text=T5Config(),
        sampling=SamplingConfig(scheduler="dpm"),
    )


def _cogvideox_1_5(*, in_channels: int, ofs_embed_dim: int) -> CogVideoXConfig:
    transformer = TransformerConfig(
        num_layers=42,
        num_heads=48,
        in_channels=in_channels,
        patch_size=(2, 2, 2),
        position="rope",
        grid_rule="slice",
        sample_size=(42, 300, 300),  # 161 frames give 41 latents, padded to 42
        ofs_embed_dim=ofs_embed_dim,
        text_len=224,
    )
    return CogVideoXConfig(
        transformer=transformer,
        vae=VAEConfig(scaling_factor=0.7, invert_scale_latents=True),
        text=T5Config(text_len=224),
        sampling=SamplingConfig(scheduler="dpm"),
        geometry=GeometryConfig(height=768, width=1360, num_frames=81, fps=16, frame_step=16, max_frames=161),
    )


def cogvideox_1_5_5b() -> CogVideoXConfig:
    return _cogvideox_1_5(in_channels=16, ofs_embed_dim=0)


def cogvideox_1_5_5b_i2v() -> CogVideoXConfig:
    return _cogvideox_1_5(in_channels=32, ofs_embed_dim=512)


def cogvideox_demo() -> CogVideoXConfig:
    """The same model small enough to be trained on two CPU cores, for the world of `shared.clips.shapes`:
    17 frames of 64 x 64 pixels at 8 per second."""
    text = T5Config(text_len=16, vocab_size=192, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
    return CogVideoXConfig(
        transformer=TransformerConfig(
            num_layers=6,
            num_heads=6,
            head_dim=32,
            position="rope",
            sample_size=(5, 8, 8),
            time_embed_dim=64,
            text_dim=text.d_model,
            text_len=text.text_len,
        ),
        vae=VAEConfig(
            widths=(16, 32, 48, 48),
            blocks_per_level=1,
            norm_groups=8,
            scaling_factor=1.0,  # training measures it
            sample_size=(64, 64),
            encode_frames=0,
            decode_latents=0,
        ),
        text=text,
        sampling=SamplingConfig(num_inference_steps=25, guidance_scale=3.0, scheduler="dpm"),
        geometry=GeometryConfig(height=64, width=64, num_frames=17, fps=8, frame_step=8, max_frames=17),
    )


PRESETS: dict[str, Callable[[], CogVideoXConfig]] = {
    "cogvideox-demo": cogvideox_demo,
    "cogvideox-2b": cogvideox_2b,
    "cogvideox-5b": cogvideox_5b,
    "cogvideox-5b-i2v": cogvideox_5b_i2v,
    "cogvideox-1.5-5b": cogvideox_1_5_5b,
    "cogvideox-1.5-5b-i2v": cogvideox_1_5_5b_i2v,
}
