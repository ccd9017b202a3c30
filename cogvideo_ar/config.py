"""Settings of CogVideo (2022): frozen, checked when built, without a single default that has to be None.

`PRESETS` maps a name to a function, so that nothing is built at import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from shared.config_io import MOST_LAYERS

TemporalChannel = Literal["none", "full", "window", "local"]
Compat = Literal["release", "exact"]
CodebookUpdate = Literal["ema", "gradient"]  # moving averages, or the quantiser's loss
SuperResolutionKind = Literal["direct", "iterative"]
PromptLanguage = Literal["any", "zh"]  # "any" asks nothing of a prompt


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One dual-channel transformer (paper section 4; upstream `models/cogvideo_model.py`).

    `image_position_offset` is the position id of the first image token of the first frame; ids below
    `image_position_offset + frame_len` use the base table, later ones the extra (temporal) table.
    """

    num_layers: int
    num_heads: int
    head_dim: int = 64
    vocab_size: int = 150010  # rows of the embedding table: image tokens, text pieces, spare rows
    num_image_tokens: int = 20000  # image tokens are the ids 0 .. num_image_tokens - 1
    start_of_image: int = 150000
    pad_token: int = 20003
    max_text_len: int = 64  # of a training row; inference pads to the longest text of its batch
    num_positions: int = 1024
    num_extra_positions: int = 2000
    image_position_offset: int = 512
    grid: tuple[int, int] = (20, 20)  # (rows, columns) of one frame's tokens
    num_frames: int = 5
    temporal: TemporalChannel = "full"
    window: int = 0  # side of the square windows of temporal="window", shifted by half on odd layers
    extent: tuple[int, int, int] = (0, 0, 0)  # (frames, rows, columns) of temporal="local": nearer than that
    pb_relax: bool = False  # training's temporal scores stay in the range of float16 (CogView's PB-relax)
    layernorm_eps: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.num_layers > 0 and self.num_heads > 0 and self.head_dim > 0, "sizes must be positive")
        require(self.num_layers <= MOST_LAYERS, f"num_layers must be at most {MOST_LAYERS}")
        legal = get_args(TemporalChannel)
        require(self.temporal in legal, f"unknown temporal channel {self.temporal!r}; legal: {legal}")
        require(
            self.num_image_tokens < self.vocab_size,
            f"vocab_size {self.vocab_size} must exceed num_image_tokens {self.num_image_tokens}",
        )
        for name in ("start_of_image", "pad_token"):
            token = getattr(self, name)
            require(
                self.num_image_tokens <= token < self.vocab_size,
                f"{name} must lie in {self.num_image_tokens}..{self.vocab_size - 1}, got {token}",
            )
        self._check_positions()
        self._check_window()
        self._check_extent()

    def _check_positions(self) -> None:
        needed = self.image_position_offset + self.frame_len
        require(self.num_positions >= needed, f"num_positions must be >= {needed}, got {self.num_positions}")
        extra = (self.num_frames - 1) * self.frame_len
        require(
            self.num_extra_positions >= extra,
            f"num_extra_positions must be >= {extra}, got {self.num_extra_positions}",
        )
        require(
            self.max_text_len <= self.image_position_offset,
            f"max_text_len {self.max_text_len} exceeds image_position_offset {self.image_position_offset}",
        )

    def _check_window(self) -> None:
        if self.temporal != "window":
            require(self.window == 0, f'window {self.window} needs temporal="window"')
            return
        fits = self.window > 0 and all(side % self.window == 0 for side in self.grid)
        require(fits, f"window must divide the grid {self.grid}, got {self.window}")

    def _check_extent(self) -> None:
        if self.temporal != "local":
            require(not any(self.extent), f'extent {self.extent} needs temporal="local"')
            return
        require(min(self.extent) >= 1, f"extent must be >= 1 frames, rows and columns, got {self.extent}")

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def frame_len(self) -> int:
        """Tokens of one frame."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """The hierarchical image codec of icetk; the defaults are the release.

    A rate is the number of pixels per code along each axis. `decoder_multipliers` holds one tuple per rate,
    the coarsest rate first (inside a tuple: finest pixels first); `rates` says which of these are built.
    """

    base_channels: int = 128
    encoder_multipliers: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    encoder_out_channels: int = 256
    codebook_size: int = 20000
    code_dim: int = 256
    decoder_multipliers: tuple[tuple[int, ...], ...] = ((1, 1, 1, 2, 4), (1, 1, 2, 4), (1, 2, 4))
    decoder_res_blocks: int = 1
    norm_groups: int = 32
    rates: tuple[int, ...] = (4, 8, 16)
    commitment_cost: float = 1.0
    codebook_update: CodebookUpdate = "ema"
    pixel_mean: tuple[float, float, float] = (0.79093, 0.76271, 0.75340)  # of RGB in 0..1
    pixel_std: tuple[float, float, float] = (0.30379, 0.32279, 0.32800)

    def __post_init__(self) -> None:
        blocks = self.num_res_blocks, self.decoder_res_blocks
        require(
            0 <= min(blocks) <= max(blocks) <= MOST_LAYERS, f"blocks must be 0..{MOST_LAYERS}, got {blocks}"
        )
        require(
            len(self.rates) > 0 and list(self.rates) == [r for r in self.legal_rates if r in self.rates],
            f"rates must be an ascending part of {self.legal_rates}, got {self.rates}",
        )
        for rate in self.rates:
            got, needed = len(self.multipliers_of(rate)), rate.bit_length()
            require(got == needed, f"the decoder of rate {rate} needs {needed} multipliers, got {got}")
        multipliers = {*self.encoder_multipliers, *(m for ms in self.decoder_multipliers for m in ms)}
        widths = sorted(m * self.base_channels for m in multipliers | {1})
        require(
            all(width % self.norm_groups == 0 for width in widths),
            f"norm_groups {self.norm_groups} must divide the channels {widths}",
        )
        updates = get_args(CodebookUpdate)
        require(
            self.codebook_update in updates,
            f"unknown codebook_update {self.codebook_update!r}; legal: {updates}",
        )

    @property
    def encoder_rate(self) -> int:
        """Pixels per position after the shared encoder, before any extra down-sampler."""
        return 2 ** (len(self.encoder_multipliers) - 1)

    @property
    def legal_rates(self) -> tuple[int, ...]:
        return tuple(self.encoder_rate << level for level in range(len(self.decoder_multipliers)))

    def multipliers_of(self, rate: int) -> tuple[int, ...]:
        """Channel multipliers of the decoder of this rate, finest pixels first."""
        return self.decoder_multipliers[-1 - self.legal_rates.index(rate)]


@dataclass(frozen=True, kw_only=True)
class PromptTemplates:
    """Texts of the stages; {prompt} and {duration} (seconds that five frames span) are filled in. `language`
    is that of the prompts that the model was trained with."""

    language: PromptLanguage = "any"
    first_frame: str = "{prompt} 高清摄影"
    keyframes: str = "{duration}秒<n>{prompt}"
    keyframes_guided: str = "{duration}秒<n>{prompt} 视频"
    keyframes_guider: str = "{duration}秒<n>视频"
    interpolation: str = "{duration}秒<n>{prompt}"
    interpolation_guider: str = "{duration}秒<n>视频"
    super_resolution: str = "{prompt}"


@dataclass(frozen=True, kw_only=True)
class CogLMConfig:
    """One two-step draw (upstream `coglm_strategy.py`): a cluster out of the `top_k` largest at
    `temperature`, then a token of it at `temperature` * `temperature2`."""

    temperature: float = 1.05
    top_k: int = 12
    temperature2: float = 0.89

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"temperature must be > 0, got {self.temperature}")
        require(self.temperature2 > 0, f"temperature2 must be > 0, got {self.temperature2}")
        require(self.top_k >= 1, f"top_k must be >= 1, got {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class Oddities:
    """What the released inference does otherwise than its training, one switch each (docs/quirks.md); with
    none, cached generation equals the training forward."""

    cyclic_prefill_windows: bool = False  # given frames see across their borders on odd layers
    temporal_text_bias_decode_only: bool = False  # the temporal channel of a prefill has no text weight
    interpolation_guider_offset: bool = False  # the guider's given frames begin where the longer text ends
    short_text_cache: bool = False  # the caches have room for 74 text tokens, whatever the text


SANE = Oddities()
RELEASED = Oddities(
    cyclic_prefill_windows=True,
    temporal_text_bias_decode_only=True,
    interpolation_guider_offset=True,
    short_text_cache=True,
)
RELEASED_TEXT_ROOM = 74  # tokens; see `Oddities.short_text_cache`


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn.

    `compat="release"` keeps the oddities of the released inference code: all of `Oddities`, and the first
    frame's last token is drawn with `default` instead of `first_frame`. "exact" makes cached generation equal
    to the training forward.
    """

    first_frame: CogLMConfig = CogLMConfig(temperature=1.0, top_k=16)
    default: CogLMConfig = CogLMConfig()
    guidance_alpha: float = 3.0  # 1 turns guidance of the key frames off
    interpolation_guidance_alpha: float = 1.0  # 1: none, as released
    log_text_attention_weights: float = 1.4  # added to frame -> text scores wherever there is no guidance
    keyframe_duration: float = 4.0  # seconds that the key frames span
    interpolation_durations: tuple[float, ...] = (2.0, 1.0, 0.5)  # one round each, halving the frame distance
    max_batch: int = 8  # interpolation blocks generated together
    prompts: PromptTemplates = PromptTemplates()
    compat: Compat = "exact"

    def __post_init__(self) -> None:
        legal = get_args(Compat)
        require(self.compat in legal, f"unknown compat {self.compat!r}; legal: {legal}")
        require(self.max_batch >= 1, f"max_batch must be >= 1, got {self.max_batch}")
        require(self.keyframe_duration > 0, f"keyframe_duration must be > 0, got {self.keyframe_duration}")


@dataclass(frozen=True, kw_only=True)
class SuperResolutionConfig:
    """One of CogView2's super-resolution transformers; the defaults but `text_len` are those of both.

    "direct" (DSR) makes the tokens of a fine grid from those of a coarse one in one parallel step,
    "iterative" (IterSR) predicts parts of the fine grid anew in several. Kernels are (rows, columns) of the
    neighbourhoods that a fine cell sees.
    """

    kind: SuperResolutionKind
    num_layers: int
    num_heads: int
    text_len: int  # slots of the text; a shorter one is padded on the left
    head_dim: int = 64
    vocab_size: int = 150010
    num_image_tokens: int = 20000
    start_of_image: int = 150000  # stands in every cell that is to be predicted
    num_positions: int = 1024  # of text and coarse cells; fine cells have a table of their own
    coarse_position_offset: int = 513  # position id of the first coarse cell
    coarse_grid: tuple[int, int] = (20, 20)  # (rows, columns); direct only
    fine_grid: tuple[int, int] = (60, 60)
    coarse_kernel: tuple[int, int] = (5, 5)  # direct only
    fine_kernel: tuple[int, int] = (9, 5)
    layernorm_eps: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    draw: CogLMConfig = CogLMConfig(temperature=1.0, top_k=6, temperature2=0.6)  # direct only
    pass_top_k: tuple[int, ...] = (40, 40, 40, 20, 20, 10)  # iterative only: likeliest tokens, per pass
    max_batch: int = 12  # frames that pass the transformer together

    def __post_init__(self) -> None:
        legal = get_args(SuperResolutionKind)
        require(self.kind in legal, f"unknown kind of super-resolution {self.kind!r}; legal: {legal}")
        for name in ("num_layers", "num_heads", "head_dim", "text_len", "max_batch"):
            require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        require(self.num_layers <= MOST_LAYERS, f"num_layers must be at most {MOST_LAYERS}")
        require(
            self.num_image_tokens <= self.start_of_image < self.vocab_size,
            f"start_of_image must lie in {self.num_image_tokens}..{self.vocab_size - 1}, "
            f"got {self.start_of_image}",
        )
        require(min(self.pass_top_k, default=1) >= 1, f"pass_top_k must be >= 1, got {self.pass_top_k}")
        needed = self.text_len if self.kind == "iterative" else self.coarse_position_offset + self.coarse_len
        require(self.num_positions >= needed, f"num_positions must be >= {needed}, got {self.num_positions}")
        fits = all(fine % coarse == 0 for fine, coarse in zip(self.fine_grid, self.coarse_grid, strict=True))
        require(
            fits or self.kind == "iterative",
            f"fine_grid {self.fine_grid} must be a multiple of coarse_grid {self.coarse_grid}",
        )

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def coarse_len(self) -> int:
        """Cells of the coarse grid."""
        return self.coarse_grid[0] * self.coarse_grid[1]

    @property
    def fine_len(self) -> int:
        """Cells of the fine grid."""
        return self.fine_grid[0] * self.fine_grid[1]

    @property
    def max_prompt_len(self) -> int:
        """Text tokens that are used: "direct" refuses longer prompts, "iterative" cuts them."""
        return self.text_len - 1 if self.kind == "direct" else self.text_len


BlockConfig = TransformerConfig | SuperResolutionConfig


@dataclass(frozen=True, kw_only=True)
class CogVideoConfig:
    """The whole model: both stages, the optional super-resolution, the image codec and the sampling."""

    keyframes: TransformerConfig
    interpolation: TransformerConfig
    vqvae: VQVAEConfig
    super_resolution: SuperResolutionConfig | None = None  # None: the frames stay as small as they are made
    refinement: SuperResolutionConfig | None = None  # iterative, of what the direct one made; where asked for
    sampling: SamplingConfig = SamplingConfig()


def cogview2_dsr() -> SuperResolutionConfig:
    """Direct super-resolution, as the released CogVideo uses it: 160 -> 480 pixels."""
    return SuperResolutionConfig(
        kind="direct",
        num_layers=48,
        num_heads=48,
        text_len=96,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )


def cogview2_itersr() -> SuperResolutionConfig:
    """CogView2's refinement of what the direct model made; the released CogVideo does without."""
    return SuperResolutionConfig(
        kind="iterative",
        num_layers=48,
        num_heads=48,
        text_len=16,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )


def cogvideo() -> CogVideoConfig:
    """The released CogVideo without its super-resolution stage."""
    keyframes = TransformerConfig(num_layers=48, num_heads=48, hidden_dropout=0.1, attention_dropout=0.1)
    return CogVideoConfig(
        keyframes=keyframes,
        interpolation=replace(keyframes, temporal="window", window=10),
        vqvae=VQVAEConfig(),
        sampling=SamplingConfig(compat="release", prompts=PromptTemplates(language="zh")),
    )


def cogvideo_window() -> CogVideoConfig:
    """The release's sizes with windows in both stages: the release trains such key frames and cannot sample
    them. Here a key frame starts before the one before it is done (`wavefront`)."""
    config = cogvideo()
    return replace(config, keyframes=config.interpolation, sampling=SamplingConfig())


def cogvideo_local() -> CogVideoConfig:
    """The release's sizes with the paper's 3D local attention in both stages, which the release has not: all
    five frames, 9 x 9 slots around a slot (the paper gives no extent; these cover about a window of 10)."""
    config = cogvideo()
    local = replace(config.keyframes, temporal="local", extent=(5, 5, 5))
    return replace(config, keyframes=local, interpolation=local, sampling=SamplingConfig())


def cogvideo_demo() -> CogVideoConfig:
    """The same model small enough to be trained on two CPU cores, for the world of `shared.clips.shapes`:
    64 x 64 pixels, 8 x 8 tokens a frame, 8 frames per second; 5 -> 9 -> 17 frames."""
    keyframes = TransformerConfig(
        num_layers=6,
        num_heads=5,
        head_dim=32,
        vocab_size=608,
        num_image_tokens=512,
        start_of_image=588,
        pad_token=515,
        max_text_len=16,
        num_positions=96,
        num_extra_positions=256,
        image_position_offset=32,
        grid=(8, 8),
    )
    vqvae = VQVAEConfig(
        base_channels=32,
        encoder_multipliers=(1, 2, 2),
        num_res_blocks=1,
        encoder_out_channels=64,
        codebook_size=512,
        code_dim=32,
        decoder_multipliers=((1, 1, 1, 2, 2), (1, 1, 2, 2), (1, 2, 2)),
        norm_groups=8,
        rates=(8,),
        commitment_cost=0.25,
    )
    sampling = SamplingConfig(
        first_frame=CogLMConfig(temperature=1.0, top_k=32, temperature2=1.0),
        default=CogLMConfig(temperature=0.9, top_k=32, temperature2=1.0),
        guidance_alpha=1.0,
        log_text_attention_weights=0.0,
        keyframe_duration=2.0,
        interpolation_durations=(1.0, 0.5),
        max_batch=64,
        prompts=PromptTemplates(
            first_frame="{prompt}",
            keyframes_guided="{duration}秒<n>{prompt}",
            keyframes_guider="{duration}秒<n>",
            interpolation_guider="{duration}秒<n>",
        ),
    )
    return CogVideoConfig(
        keyframes=keyframes,
        interpolation=replace(keyframes, temporal="window", window=4),
        vqvae=vqvae,
        sampling=sampling,
    )


PRESETS: dict[str, Callable[[], CogVideoConfig]] = {
    "cogvideo": cogvideo,
    "cogvideo-window": cogvideo_window,
    "cogvideo-local": cogvideo_local,
    "cogvideo-demo": cogvideo_demo,
}
