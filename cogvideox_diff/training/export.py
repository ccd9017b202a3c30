"""From the folders of a finished training run to a model folder with its card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cogvideox_diff.config import CogVideoXConfig
from cogvideox_diff.delta import save_delta
from cogvideox_diff.formats import FAMILY, FORMAT, OUR_CONFIG, Parts
from cogvideox_diff.lora import lora_parameters
from cogvideox_diff.pipeline import CogVideoXPipeline
from cogvideox_diff.training.recipes import Run
from shared.config_io import save_config
from shared.files import atomic_path
from shared.model_card import model_card, read_stage

TRAINED = ("vae", "transformer")
SUMMARY = """CogVideoX (2024) at toy size, for the world of `shared.clips.shapes`: 64 x 64 pixels, 17 frames
at 8 per second, one coloured shape that moves over a plain background. The architecture is the released one
(3D causal VAE, T5 encoder, expert transformer, zero-SNR v-prediction); sizes and data differ, and the small
text encoder learns together with the transformer."""
IMAGE_SUMMARY = """The demo transformer made to continue an image: its patch embedding reads the image's
latents beside the noisy ones, and a low-rank adapter on attention and MLP learned what to do with them. It
loads as `demo-i2v`; only the difference is stored, and the weights beside it are the base."""


def export(run: Run, folder: Path, results: Path | None = None) -> Path:
    """Write the model folder (float16) and its MODEL_CARD.md; `results` is a benchmark's results.json that
    has measured an earlier export of the same run."""
    parts, config = load_parts(run), run.recipe.config
    config = replace(config, vae=replace(config.vae, scaling_factor=run.scaling_factor()))
    pipeline = CogVideoXPipeline(config, parts, run.folder / "tokenizer")
    pipeline.save_pretrained(folder, dtype="float16")
    measured = json.loads(results.read_text(encoding="utf-8"))["models"] if results else {}
    nets = {"VAE": parts.vae, "T5 encoder": parts.text_encoder, "expert transformer": parts.transformer}
    card = model_card(
        "CogVideoX demo weights",
        SUMMARY,
        command="cogvideox train --preset demo --stage all --output_path runs/diff",
        stages=[read_stage(run.folder / name) for name in TRAINED],
        parameters={name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()},
        results=measured.get("cogvideox-demo"),
    )
    with atomic_path(folder / "MODEL_CARD.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    if run.image_to_video_model() is not None:
        write_image_to_video(run, parts, config, folder)
    return folder


def write_image_to_video(run: Run, parts: Parts, config: CogVideoXConfig, folder: Path) -> Path:
    """The image-to-video model as its difference from the one in `folder`, in a folder inside."""
    model, target = run.image_to_video_model(), folder / "image_to_video"
    assert model is not None
    save_delta(model, parts.transformer.state_dict(), target)
    own = replace(config, transformer=model.config)
    with atomic_path(target / OUR_CONFIG) as temporary:
        save_config(own, temporary, family=FAMILY, format=FORMAT, dtype="float32", base="..")
    nets = {"patch embedding": list(model.patch_embed.parameters()), "adapter": lora_parameters(model)}
    card = model_card(
        "CogVideoX demo weights, image to video",
        IMAGE_SUMMARY,
        command="cogvideox train --preset demo --stage image_to_video --output_path runs/diff",
        stages=[read_stage(run.folder / "image_to_video")],
        parameters={name: sum(p.numel() for p in some) for name, some in nets.items()},
        results=None,
    )
    with atomic_path(target / "MODEL_CARD.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    return target


def load_parts(run: Run) -> Parts:
    """The trained nets of a run, with the averaged weights."""
    joint = run.joint_model()
    return Parts(transformer=joint.transformer, vae=run.vae(), text_encoder=joint.text_encoder)
