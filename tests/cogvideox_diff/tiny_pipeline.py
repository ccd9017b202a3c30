"""Tiny random models of every variant, and their inputs. Not a test file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.config import (
    CogVideoXConfig,
    GeometryConfig,
    SamplingConfig,
    T5Config,
    TransformerConfig,
    VAEConfig,
)
from cogvideox_diff.formats import Parts
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.tokenizers.sentencepiece_training import T5_IDS, train_text_model
from shared.video import Video

PROMPT = "a red circle moves left"
HEIGHT, WIDTH, FRAMES = 32, 48, 9


def tiny_config(variant: str) -> CogVideoXConfig:
    """One of the five released models, with all that tells them apart, small enough to run in no time."""
    is_i2v, is_1_5 = variant.endswith("i2v"), variant.startswith("1.5")
    position = "sincos" if variant == "2b" else "rope+learned" if variant == "5b-i2v" else "rope"
    net = TransformerConfig(
        num_layers=2,
        num_heads=2,
        head_dim=16,
        in_channels=8 if is_i2v else 4,
        out_channels=4,
        patch_size=(2 if is_1_5 else 1, 2, 2),
        position=position,
        grid_rule="slice" if is_1_5 else "linspace",
        sample_size=(3, 12, 12) if is_1_5 else (3, HEIGHT // 8, WIDTH // 8),
        time_embed_dim=16,
        ofs_embed_dim=16 if is_1_5 and is_i2v else 0,
        text_dim=32,
        text_len=12,
    )
    vae = VAEConfig(
        latent_channels=4,
        widths=(8, 8, 8, 16),
        blocks_per_level=1,
        norm_groups=4,
        sample_size=(96, 128),
        invert_scale_latents=is_1_5,
    )
    text = T5Config(text_len=12, vocab_size=160, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    most = FRAMES if variant == "5b-i2v" else 17
    return CogVideoXConfig(
        transformer=net,
        vae=vae,
        text=text,
        sampling=SamplingConfig(num_inference_steps=4, guidance_scale=3.0),
        geometry=GeometryConfig(height=HEIGHT, width=WIDTH, num_frames=FRAMES, max_frames=most),
    )


def write_tokenizer(folder: Path) -> Path:
    """A T5 model file of a few words."""
    words = ["a red circle moves left", "a blue square stays", "two green stars move up slowly", "noise"]
    return train_text_model(words, folder / "spiece.model", vocab_size=60, ids=T5_IDS, whole_words=True)


def randomised(net: nn.Module, std: float = 0.2) -> nn.Module:
    random = torch.Generator().manual_seed(7)
    for name, x in net.named_parameters():
        fan_in = x[0].numel() if x.ndim > 1 else 1
        scale = std if name.startswith("t5") or x.ndim < 2 else 1.5 / fan_in**0.5
        x.data = (1.0 if "norm" in name and x.ndim < 2 else 0.0) + scale * torch.randn(
            x.shape, generator=random
        )
    return net.eval().requires_grad_(False)


def make(variant: str, tokenizer: Path, **changes: Any) -> CogVideoXPipeline:
    config = replace(tiny_config(variant), **changes)
    parts = Parts(
        transformer=randomised(ExpertTransformer(config.transformer)),  # type: ignore[arg-type]
        vae=randomised(CausalVAE(config.vae)),  # type: ignore[arg-type]
        text_encoder=randomised(T5TextEncoder(config.text)),  # type: ignore[arg-type]
    )
    parts.vae.decoder.conv_out.conv.weight *= 0.1  # most values within 0..255
    return CogVideoXPipeline(config, parts, tokenizer, name=variant)


def clip(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> Video:
    random = torch.Generator().manual_seed(3)
    return Video(frames=torch.randint(256, (frames, height, width, 3), generator=random).byte(), fps=8)


def picture(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    return clip(1, height, width).frames[0]
