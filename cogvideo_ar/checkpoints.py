"""Checkpoint formats of CogVideo's nets as tables for `shared.checkpoints.convert`."""

from __future__ import annotations

from shared.checkpoints import Rename, Table

_LAYER = "transformer.layers.{n}."

_TRUNK: Table = (  # what all of CogVideo's and CogView2's transformers have
    Rename("transformer.word_embeddings.weight", "word_embeddings.weight"),
    Rename("transformer.position_embeddings.weight", "position_embeddings.weight"),
    Rename("mixins.extra_position_embedding.position_embeddings.weight", "extra_position_embeddings.weight"),
    Rename(_LAYER + "input_layernorm.{p}", "blocks.{n}.attention_norm.{p}"),
    Rename(_LAYER + "third_layernorm.{p}", "blocks.{n}.attention_out_norm.{p}"),
    Rename(_LAYER + "post_attention_layernorm.{p}", "blocks.{n}.mlp_norm.{p}"),
    Rename(_LAYER + "fourth_layernorm.{p}", "blocks.{n}.mlp_out_norm.{p}"),
    Rename(_LAYER + "mlp.dense_h_to_4h.{p}", "blocks.{n}.mlp.up.{p}"),
    Rename(_LAYER + "mlp.dense_4h_to_h.{p}", "blocks.{n}.mlp.down.{p}"),
    Rename("transformer.final_layernorm.{p}", "final_norm.{p}"),
)


def _base(channel: str) -> Table:
    """The attention that every SAT transformer has."""
    return (
        Rename(_LAYER + "attention.query_key_value.{p}", f"blocks.{{n}}.attention.{channel}.qkv.{{p}}"),
        Rename(_LAYER + "attention.dense.{p}", f"blocks.{{n}}.attention.{channel}.out.{{p}}"),
    )


def _plus(channel: str) -> Table:
    """The second set of projections (upstream's mixin `attention_plus`)."""
    mixin, ours = "mixins.attention_plus.", f"blocks.{{n}}.attention.{channel}."
    return (
        Rename(mixin + "query_key_value.{n}.{p}", ours + "qkv.{p}"),
        Rename(mixin + "dense.{n}.{p}", ours + "out.{p}"),
    )


# One table for both stages, and for full and windowed temporal channels: names and shapes are identical.
SAT_STAGE: Table = (
    *_TRUNK,
    *_base("spatial"),
    *_plus("temporal"),
    Rename("mixins.attention_plus.attn_distribution.{n}", "blocks.{n}.attention.mix"),
)

# CogView2's super-resolution. Upstream lets an IterSR model accept a DSR file; here its names are refused.
SAT_DSR: Table = (*_TRUNK, *_base("base"), *_plus("fine"))
SAT_ITERSR: Table = (*_TRUNK, *_base("base"))

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
