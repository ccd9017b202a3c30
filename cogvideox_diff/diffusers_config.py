"""diffusers' configuration files of a CogVideoX folder as ours, and back. Dicts only: `formats` has
the files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cogvideox_diff.config import (
    CogVideoXConfig,
    GeometryConfig,
    SamplingConfig,
    ScheduleConfig,
    T5Config,
    TransformerConfig,
    VAEConfig,
)
from shared.errors import WeightsError

VERSION = "0.42.1"  # whose files the writer's are like
PIECES = (8, 2)  # frames that diffusers encodes and latents that it decodes at a time


# ---- reading


def config_from_diffusers(plain: Mapping[str, Mapping[str, Any]]) -> CogVideoXConfig:
    """Our configuration from the dicts of the parts "transformer", "vae", "text_encoder" and "scheduler"."""
    transformer, vae = _transformer_config(plain["transformer"]), _vae_config(plain["vae"])
    return CogVideoXConfig(
        transformer=transformer,
        vae=vae,
        text=_text_config(plain["text_encoder"], transformer.text_len),
        schedule=_schedule_config(plain["scheduler"]),
        sampling=SamplingConfig(scheduler="dpm" if "DPM" in plain["scheduler"]["_class_name"] else "ddim"),
        geometry=_geometry_config(plain["transformer"], vae),
    )


def _fixed(plain: Mapping[str, Any], part: str, values: Mapping[str, object]) -> None:
    """Refuse settings that another network would need."""
    for name, legal in values.items():
        if plain.get(name, legal) != legal:
            raise WeightsError(f"{part} setting {name} must be {legal!r}, got {plain[name]!r}")


def _transformer_config(plain: Mapping[str, Any]) -> TransformerConfig:
    fixed = {"attention_bias": True, "activation_fn": "gelu-approximate", "timestep_activation_fn": "silu"}
    fixed |= {"norm_elementwise_affine": True, "flip_sin_to_cos": True, "freq_shift": 0}
    _fixed(plain, "transformer", fixed | {"temporal_interpolation_scale": 1.0})
    patch_t, patch = plain.get("patch_size_t"), plain["patch_size"]
    learned, rope = plain.get("use_learned_positional_embeddings"), plain["use_rotary_positional_embeddings"]
    frames = (plain["sample_frames"] - 1) // plain["temporal_compression_ratio"] + 1
    return TransformerConfig(
        num_layers=plain["num_layers"],
        num_heads=plain["num_attention_heads"],
        head_dim=plain["attention_head_dim"],
        in_channels=plain["in_channels"],
        out_channels=plain["out_channels"],
        patch_size=(patch_t or 1, patch, patch),
        position="rope+learned" if learned else "rope" if rope else "sincos",
        grid_rule="slice" if patch_t else "linspace",
        sample_size=(frames, plain["sample_height"], plain["sample_width"]),
        sincos_scale=plain["spatial_interpolation_scale"],
        time_embed_dim=plain["time_embed_dim"],
        ofs_embed_dim=plain.get("ofs_embed_dim") or 0,
        text_dim=plain["text_embed_dim"],
        text_len=plain["max_text_seq_length"],
        norm_eps=plain["norm_eps"],
        final_norm_eps=plain["norm_eps"],
    )


def _vae_config(plain: Mapping[str, Any]) -> VAEConfig:
    _fixed(plain, "vae", {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "use_quant_conv": False})
    return VAEConfig(
        latent_channels=plain["latent_channels"],
        widths=tuple(plain["block_out_channels"]),
        blocks_per_level=plain["layers_per_block"],
        temporal_levels=int(math.log2(plain["temporal_compression_ratio"])),
        norm_groups=plain["norm_num_groups"],
        norm_eps=plain["norm_eps"],
        scaling_factor=plain["scaling_factor"],
        invert_scale_latents=plain.get("invert_scale_latents", False),
        sample_size=(plain["sample_height"], plain["sample_width"]),
        encode_frames=PIECES[0],
        decode_latents=PIECES[1],
    )


def _text_config(plain: Mapping[str, Any], text_len: int) -> T5Config:
    _fixed(plain, "text encoder", {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32})
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    return T5Config(text_len=text_len, **{name: plain[name] for name in names})


def _schedule_config(plain: Mapping[str, Any]) -> ScheduleConfig:
    fixed = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    _fixed(plain, "scheduler", fixed | {"timestep_spacing": "trailing", "set_alpha_to_one": True})
    return ScheduleConfig(
        num_timesteps=plain["num_train_timesteps"],
        beta_start=plain["beta_start"],
        beta_end=plain["beta_end"],
        snr_shift=plain["snr_shift_scale"],
        zero_terminal_snr=plain["rescale_betas_zero_snr"],
    )


def _geometry_config(plain: Mapping[str, Any], vae: VAEConfig) -> GeometryConfig:
    """Native sizes. The 1.5 files state the extent of the position table (300 x 300) instead of a size, and
    neither version states frame rates or legal lengths: those are the released models'."""
    frames, factor = plain["sample_frames"], vae.space_factor
    height, width = plain["sample_height"] * factor, plain["sample_width"] * factor
    is_1_5 = bool(plain.get("patch_size_t"))
    if is_1_5:
        height, width = min(height, 768), min(width, 1360)
    step = 4 * vae.time_factor if is_1_5 else 2 * vae.time_factor
    return GeometryConfig(
        height=height,
        width=width,
        num_frames=frames,
        fps=16 if is_1_5 else 8,
        frame_step=math.gcd(step, frames - 1) if frames > 1 else step,
        max_frames=2 * frames - 1 if is_1_5 else frames,
    )


# ---- writing


def pipeline_index(config: CogVideoXConfig) -> dict[str, Any]:
    """model_index.json: the pipeline's class and those of its parts."""
    is_i2v = config.transformer.in_channels != config.transformer.out_channels
    return {
        "_class_name": "CogVideoXImageToVideoPipeline" if is_i2v else "CogVideoXPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", _scheduler_class(config.sampling)],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def _scheduler_class(sampling: SamplingConfig) -> str:
    return "CogVideoXDPMScheduler" if sampling.scheduler == "dpm" else "CogVideoXDDIMScheduler"


def diffusers_configs(config: CogVideoXConfig) -> dict[str, dict[str, Any]]:
    """What diffusers' constructors take, by part; the inverse of `config_from_diffusers`."""
    parts = {
        "transformer": _diffusers_transformer(config),
        "vae": _diffusers_vae(config.vae),
        "text_encoder": _diffusers_text(config.text),
        "scheduler": _diffusers_scheduler(config),
    }
    classes = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}
    classes |= {"scheduler": _scheduler_class(config.sampling)}
    for part, name in classes.items():
        parts[part] = {"_class_name": name, "_diffusers_version": VERSION, **parts[part]}
    return parts


def _diffusers_transformer(config: CogVideoXConfig) -> dict[str, Any]:
    net = config.transformer
    patch_t, patch, _ = net.patch_size
    return {
        "num_attention_heads": net.num_heads,
        "attention_head_dim": net.head_dim,
        "in_channels": net.in_channels,
        "out_channels": net.out_channels,
        "time_embed_dim": net.time_embed_dim,
        "ofs_embed_dim": net.ofs_embed_dim or None,
        "text_embed_dim": net.text_dim,
        "num_layers": net.num_layers,
        "sample_height": net.sample_size[1],
        "sample_width": net.sample_size[2],
        "sample_frames": config.geometry.num_frames,
        "patch_size": patch,
        "patch_size_t": patch_t if patch_t > 1 else None,
        "patch_bias": patch_t == 1,
        "temporal_compression_ratio": config.vae.time_factor,
        "max_text_seq_length": net.text_len,
        "norm_eps": net.norm_eps,
        "spatial_interpolation_scale": net.sincos_scale,
        "temporal_interpolation_scale": 1.0,
        "use_rotary_positional_embeddings": net.position != "sincos",
        "use_learned_positional_embeddings": net.position == "rope+learned",
    }


def _diffusers_vae(vae: VAEConfig) -> dict[str, Any]:
    levels = len(vae.widths)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        "block_out_channels": list(vae.widths),
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.blocks_per_level,
        "act_fn": "silu",
        "norm_eps": vae.norm_eps,
        "norm_num_groups": vae.norm_groups,
        "temporal_compression_ratio": vae.time_factor,
        "sample_height": vae.sample_size[0],
        "sample_width": vae.sample_size[1],
        "scaling_factor": vae.scaling_factor,
        "invert_scale_latents": vae.invert_scale_latents,
    }


def _diffusers_text(text: T5Config) -> dict[str, Any]:
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        **{name: getattr(text, name) for name in names},
    }


def _diffusers_scheduler(config: CogVideoXConfig) -> dict[str, Any]:
    schedule = config.schedule
    return {
        "num_train_timesteps": schedule.num_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "snr_shift_scale": schedule.snr_shift,
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
