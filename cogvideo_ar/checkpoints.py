"""Checkpoint formats of CogVideo's nets as tables for `shared.checkpoints.convert`."""

from __future__ import annotations

from shared.checkpoints import Rename, Table

_LAYER = "transformer.layers.{n}."

# One table for both stages, and for full and windowed temporal channels: names and shapes are identical.
SAT_STAGE: Table = (
    Rename("transformer.word_embeddings.weight", "word_embeddings.weight"),
    Rename("transformer.position_embeddings.weight", "position_embeddings.weight"),
    Rename("mixins.extra_position_embedding.position_embeddings.weight", "extra_position_embeddings.weight"),
    Rename(_LAYER + "input_layernorm.{p}", "blocks.{n}.attention_norm.{p}"),
    Rename(_LAYER + "third_layernorm.{p}", "blocks.{n}.attention_out_norm.{p}"),
    Rename(_LAYER + "post_attention_layernorm.{p}", "blocks.{n}.mlp_norm.{p}"),
    Rename(_LAYER + "fourth_layernorm.{p}", "blocks.{n}.mlp_out_norm.{p}"),
    Rename(_LAYER + "attention.query_key_value.{p}", "blocks.{n}.attention.spatial.qkv.{p}"),
    Rename(_LAYER + "attention.dense.{p}", "blocks.{n}.attention.spatial.out.{p}"),
    Rename(_LAYER + "mlp.dense_h_to_4h.{p}", "blocks.{n}.mlp.up.{p}"),
    Rename(_LAYER + "mlp.dense_4h_to_h.{p}", "blocks.{n}.mlp.down.{p}"),
    Rename("mixins.attention_plus.query_key_value.{n}.{p}", "blocks.{n}.attention.temporal.qkv.{p}"),
    Rename("mixins.attention_plus.dense.{n}.{p}", "blocks.{n}.attention.temporal.out.{p}"),
    Rename("mixins.attention_plus.attn_distribution.{n}", "blocks.{n}.attention.mix"),
    Rename("transformer.final_layernorm.{p}", "final_norm.{p}"),
)

ICETK_VQVAE: Table = (  # `ice_image.pt`; inside encoder and decoders the names are upstream's
    Rename("enc.{name}", "encoder.{name}"),
    Rename("down_samplers.{name}", "downsamplers.{name}"),
    Rename("decs.0.{name}", "decoders.16.{name}"),
    Rename("decs.1.{name}", "decoders.8.{name}"),
    Rename("decs.2.{name}", "decoders.4.{name}"),
    Rename("quantize.proj.{p}", "quantizer.proj.{p}"),
    Rename("quantize.embed.weight", "quantizer.codebook"),
    Rename("quantize.cluster_size", "quantizer.code_counts"),
    Rename("quantize.embed_avg", "quantizer.code_sums"),
)
