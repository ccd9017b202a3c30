"""The weight formats of CogVideoX as tables for `shared.checkpoints`: foreign name -> name in our modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cogvideox_diff.config import TransformerConfig
from shared.checkpoints import Drop, Rename, Split, Table

# ---- transformer

_SAT = "model.diffusion_model."

_SAT_COMMON = (
    Rename(_SAT + "mixins.patch_embed.proj.{p}", "patch_embed.proj.{p}"),
    Rename(_SAT + "mixins.patch_embed.text_proj.{p}", "text_proj.{p}"),
    Rename(_SAT + "time_embed.0.{p}", "time_embed.fc1.{p}"),
    Rename(_SAT + "time_embed.2.{p}", "time_embed.fc2.{p}"),
    Rename(_SAT + "ofs_embed.0.{p}", "ofs_embed.fc1.{p}"),
    Rename(_SAT + "ofs_embed.2.{p}", "ofs_embed.fc2.{p}"),
    Split(
        _SAT + "mixins.adaln_layer.adaLN_modulations.{n}.1.{p}",
        tuple(
            f"blocks.{{n}}.{part}.{{p}}"
            for part in ("norm1.video", "norm2.video", "norm1.text", "norm2.text")
        ),
    ),
    Rename(_SAT + "mixins.adaln_layer.query_layernorm_list.{n}.{p}", "blocks.{n}.attn.norm_q.{p}"),
    Rename(_SAT + "mixins.adaln_layer.key_layernorm_list.{n}.{p}", "blocks.{n}.attn.norm_k.{p}"),
    Rename(_SAT + "transformer.layers.{n}.input_layernorm.{p}", "blocks.{n}.norm1.norm.{p}"),
    Rename(_SAT + "transformer.layers.{n}.post_attention_layernorm.{p}", "blocks.{n}.norm2.norm.{p}"),
    Split(
        _SAT + "transformer.layers.{n}.attention.query_key_value.{p}",
        ("blocks.{n}.attn.q.{p}", "blocks.{n}.attn.k.{p}", "blocks.{n}.attn.v.{p}"),
    ),
    Rename(_SAT + "transformer.layers.{n}.attention.dense.{p}", "blocks.{n}.attn.out.{p}"),
    Rename(_SAT + "transformer.layers.{n}.mlp.dense_h_to_4h.{p}", "blocks.{n}.mlp.fc1.{p}"),
    Rename(_SAT + "transformer.layers.{n}.mlp.dense_4h_to_h.{p}", "blocks.{n}.mlp.fc2.{p}"),
    Rename(_SAT + "transformer.final_layernorm.{p}", "norm_final.{p}"),
    Rename(_SAT + "mixins.final_layer.norm_final.{p}", "norm_out.norm.{p}"),
    Rename(_SAT + "mixins.final_layer.adaLN_modulation.1.{p}", "norm_out.modulation.{p}"),
    Rename(_SAT + "mixins.final_layer.linear.{p}", "proj_out.{p}"),
    Drop(_SAT + "mixins.pos_embed.freqs_{name}"),  # rotation tables, computed here
    Drop(_SAT + "transformer.position_embeddings.{p}"),  # unused remains of the SAT trunk
    Drop(_SAT + "transformer.word_embeddings.{p}"),
)

# `pos_embedding` is the fixed sin/cos table of 2B (computed here), but learned in 5B-I2V
SAT_TRANSFORMER = (*_SAT_COMMON, Drop(_SAT + "mixins.pos_embed.pos_embedding"))
SAT_TRANSFORMER_LEARNED = (*_SAT_COMMON, Rename(_SAT + "mixins.pos_embed.pos_embedding", "pos_embedding"))


def sat_transformer_table(config: TransformerConfig) -> Table:
    """The SAT table of one variant."""
    return SAT_TRANSFORMER_LEARNED if config.position == "rope+learned" else SAT_TRANSFORMER


def merge_sat_adapters(tensors: Mapping[str, Tensor], *, alpha: float = 1.0) -> dict[str, Tensor]:
    """Add the low-rank adapters of a SAT fine-tuning file to their base weights, in float32.

    The rows of pair k (`matrix_A.k` [r, D], `matrix_B.k` [D, r]; q, k, v are three) get alpha/r * B A. A file
    without adapters comes back as it is."""
    merged = {}
    for name, x in tensors.items():
        if ".matrix_" in name:
            continue
        base = name.removesuffix(".original.weight")
        if base != name:
            ups = [tensors[key].float() for key in sorted(tensors) if key.startswith(f"{base}.matrix_B.")]
            downs = [tensors[key].float() for key in sorted(tensors) if key.startswith(f"{base}.matrix_A.")]
            deltas = [alpha / len(down) * up @ down for up, down in zip(ups, downs, strict=True)]
            x = x.float() + torch.cat(deltas)
        merged[name.replace(".original.", ".")] = x
    return merged


DIFFUSERS_TRANSFORMER = (
    Rename("patch_embed.proj.{p}", "patch_embed.proj.{p}"),
    Rename("patch_embed.text_proj.{p}", "text_proj.{p}"),
    Rename("patch_embed.pos_embedding", "pos_embedding"),  # in 5B-I2V only
    Rename("time_embedding.linear_1.{p}", "time_embed.fc1.{p}"),
    Rename("time_embedding.linear_2.{p}", "time_embed.fc2.{p}"),
    Rename("ofs_embedding.linear_1.{p}", "ofs_embed.fc1.{p}"),
    Rename("ofs_embedding.linear_2.{p}", "ofs_embed.fc2.{p}"),
    Split(
        "transformer_blocks.{n}.norm1.linear.{p}", ("blocks.{n}.norm1.video.{p}", "blocks.{n}.norm1.text.{p}")
    ),
    Split(
        "transformer_blocks.{n}.norm2.linear.{p}", ("blocks.{n}.norm2.video.{p}", "blocks.{n}.norm2.text.{p}")
    ),
    Rename("transformer_blocks.{n}.norm1.norm.{p}", "blocks.{n}.norm1.norm.{p}"),
    Rename("transformer_blocks.{n}.norm2.norm.{p}", "blocks.{n}.norm2.norm.{p}"),
    Rename("transformer_blocks.{n}.attn1.to_q.{p}", "blocks.{n}.attn.q.{p}"),
    Rename("transformer_blocks.{n}.attn1.to_k.{p}", "blocks.{n}.attn.k.{p}"),
    Rename("transformer_blocks.{n}.attn1.to_v.{p}", "blocks.{n}.attn.v.{p}"),
    Rename("transformer_blocks.{n}.attn1.norm_q.{p}", "blocks.{n}.attn.norm_q.{p}"),
    Rename("transformer_blocks.{n}.attn1.norm_k.{p}", "blocks.{n}.attn.norm_k.{p}"),
    Rename("transformer_blocks.{n}.attn1.to_out.0.{p}", "blocks.{n}.attn.out.{p}"),
    Rename("transformer_blocks.{n}.ff.net.0.proj.{p}", "blocks.{n}.mlp.fc1.{p}"),
    Rename("transformer_blocks.{n}.ff.net.2.{p}", "blocks.{n}.mlp.fc2.{p}"),
    Rename("norm_final.{p}", "norm_final.{p}"),
    Rename("norm_out.norm.{p}", "norm_out.norm.{p}"),
    Rename("norm_out.linear.{p}", "norm_out.modulation.{p}"),
    Rename("proj_out.{p}", "proj_out.{p}"),
)


# ---- VAE


def _vae_block(src: str, dst: str, shortcut: str) -> Table:
    return (
        *_vae_norm(f"{src}.norm{{k}}", f"{dst}.norm{{k}}"),
        Rename(f"{src}.conv{{k}}.conv.{{p}}", f"{dst}.conv{{k}}.conv.{{p}}"),
        Rename(f"{src}.{shortcut}.{{p}}", f"{dst}.shortcut.{{p}}"),
    )


def _vae_norm(src: str, dst: str) -> Table:
    """The encoder has a plain group norm, the decoder one with a scale and a shift made from the latents."""
    if dst.startswith("encoder"):
        return (Rename(f"{src}.{{p}}", f"{dst}.norm.{{p}}"),)
    return (
        Rename(f"{src}.norm_layer.{{p}}", f"{dst}.norm.{{p}}"),
        Rename(f"{src}.conv_y.conv.{{p}}", f"{dst}.scale.{{p}}"),
        Rename(f"{src}.conv_b.conv.{{p}}", f"{dst}.shift.{{p}}"),
    )


def _vae_ends(half: str) -> Table:
    """What both layouts name alike in the encoder and in the decoder."""
    convs = (
        Rename(f"{half}.{conv}.conv.{{p}}", f"{half}.{conv}.conv.{{p}}") for conv in ("conv_in", "conv_out")
    )
    return (*convs, *_vae_norm(f"{half}.norm_out", f"{half}.norm_out"))


def _sat_decoder_level(level: int, num_levels: int = 4) -> Table:
    """SAT counts the decoder's levels from the full size, we from the deepest."""
    src, dst = f"decoder.up.{num_levels - 1 - level}", f"decoder.levels.{level}"
    return (
        *_vae_block(f"{src}.block.{{j}}", f"{dst}.blocks.{{j}}", "nin_shortcut"),
        Rename(f"{src}.upsample.conv.{{p}}", f"{dst}.upsample.conv.{{p}}"),
    )


def _sat_middle(half: str, block: int) -> Table:
    return _vae_block(f"{half}.mid.block_{block + 1}", f"{half}.middle.{block}", "nin_shortcut")


SAT_VAE: Table = (
    *_vae_ends("encoder"),
    *_vae_block("encoder.down.{i}.block.{j}", "encoder.levels.{i}.blocks.{j}", "nin_shortcut"),
    Rename("encoder.down.{i}.downsample.conv.{p}", "encoder.levels.{i}.downsample.conv.{p}"),
    *_sat_middle("encoder", 0),
    *_sat_middle("encoder", 1),
    *_vae_ends("decoder"),
    *_sat_middle("decoder", 0),
    *_sat_middle("decoder", 1),
    *_sat_decoder_level(0),
    *_sat_decoder_level(1),
    *_sat_decoder_level(2),
    *_sat_decoder_level(3),
    Drop("loss.{name}"),  # discriminator and learned variance of the upstream training
)

DIFFUSERS_VAE: Table = (
    *_vae_ends("encoder"),
    *_vae_block("encoder.down_blocks.{i}.resnets.{j}", "encoder.levels.{i}.blocks.{j}", "conv_shortcut"),
    Rename("encoder.down_blocks.{i}.downsamplers.0.conv.{p}", "encoder.levels.{i}.downsample.conv.{p}"),
    *_vae_block("encoder.mid_block.resnets.{j}", "encoder.middle.{j}", "conv_shortcut"),
    *_vae_ends("decoder"),
    *_vae_block("decoder.mid_block.resnets.{j}", "decoder.middle.{j}", "conv_shortcut"),
    *_vae_block("decoder.up_blocks.{i}.resnets.{j}", "decoder.levels.{i}.blocks.{j}", "conv_shortcut"),
    Rename("decoder.up_blocks.{i}.upsamplers.0.conv.{p}", "decoder.levels.{i}.upsample.conv.{p}"),
)
