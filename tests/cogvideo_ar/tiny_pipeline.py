"""A whole CogVideo with random weights: 5, 9 or 17 frames of 16 x 32 pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cogvideo_ar.config import CogVideoConfig, SamplingConfig, TransformerConfig, VQVAEConfig, cogvideo_demo
from cogvideo_ar.parts import Parts, load_tokenizer
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.vqvae import VQVAE
from shared.tokenizers.icetk import IceTokenizer
from shared.tokenizers.sentencepiece_training import train_text_model

NUM_IMAGE_TOKENS = 32
SYMBOLS = ("<n>", "秒", "0.5", "1.0", "2.0")
SENTENCES = ["a red circle moving left", "a blue square standing still", "2.0秒 1.0秒 0.5秒"] * 4


def tiny_parts(folder: Path, seed: int = 0, sentences: list[str] = SENTENCES) -> Parts:
    """Random parts; the text model is made of `sentences` and written into `folder`."""
    path = train_text_model(
        sentences,
        folder / "text.model",
        vocab_size=48,
        user_defined_symbols=SYMBOLS,
    )
    tokenizer = load_tokenizer(path, NUM_IMAGE_TOKENS)
    config = tiny_config(tokenizer)
    torch.manual_seed(seed)
    keyframes = CogVideoTransformer(config.keyframes).eval()
    interpolation = CogVideoTransformer(config.interpolation).eval()
    for model in (keyframes, interpolation):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    own = {name: x for name, x in interpolation.temporal_parameters()}
    interpolation.load_state_dict({**keyframes.state_dict(), **own})
    vqvae = VQVAE(config.vqvae).eval()
    torch.nn.init.normal_(vqvae.quantizer.codebook)
    return Parts(
        config=config,
        keyframes=keyframes,
        interpolation=interpolation,
        vqvae=vqvae,
        tokenizer=tokenizer,
        text_model=path.read_bytes(),
        cluster_labels=torch.arange(NUM_IMAGE_TOKENS) % 8,
    )


def tiny_config(tokenizer: IceTokenizer) -> CogVideoConfig:
    keyframes = TransformerConfig(
        num_layers=2,
        num_heads=2,
        head_dim=4,
        vocab_size=tokenizer.num_tokens + 3,
        num_image_tokens=NUM_IMAGE_TOKENS,
        start_of_image=tokenizer.id_of("<start_of_image>"),
        pad_token=tokenizer["<pad>"],
        max_text_len=28,
        num_positions=48,
        num_extra_positions=40,
        image_position_offset=40,
        grid=(2, 4),
    )
    vqvae = VQVAEConfig(
        base_channels=8,
        encoder_multipliers=(1, 1, 1),
        num_res_blocks=1,
        encoder_out_channels=8,
        codebook_size=NUM_IMAGE_TOKENS,
        code_dim=8,
        decoder_multipliers=((1, 1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1)),
        norm_groups=4,
        rates=(8,),
    )
    return CogVideoConfig(
        keyframes=keyframes,
        interpolation=replace(keyframes, temporal="window", window=2),
        vqvae=vqvae,
        sampling=tiny_sampling(),
    )


def tiny_sampling() -> SamplingConfig:
    return replace(cogvideo_demo().sampling, guidance_alpha=2.0, max_batch=3)
