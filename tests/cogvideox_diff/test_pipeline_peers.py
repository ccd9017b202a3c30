"""diffusers' own pipelines live, with our weights and our random streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER, DIFFUSERS_VAE
from cogvideox_diff.diffusers_config import diffusers_configs
from shared.checkpoints import invert
from shared.runtime import generator
from tests.cogvideox_diff.tiny_pipeline import (
    FRAMES,
    HEIGHT,
    PROMPT,
    WIDTH,
    clip,
    make,
    picture,
    tiny_config,
    write_tokenizer,
)
from tests.figures import record_figure


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipe(spiece: Path) -> CogVideoXPipeline:
    return make("5b", spiece)


Draw = Callable[..., Tensor]


def peer_draw(stream: str, *, latent_order: bool) -> Draw:
    """diffusers' `randn_tensor` on our stream of seed 0; the posterior's axes there are [B, C, T, H, W]."""
    random = generator(0, 0, stream)

    def draw(shape: tuple[int, ...], **_options: object) -> Tensor:
        if latent_order:
            return torch.randn(*shape[1:], generator=random)[None]
        c, t, h, w = shape[1:]
        return torch.randn(t, c, h, w, generator=random).transpose(0, 1)[None]

    return draw


def use_our_streams(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    places = {
        f"diffusers.pipelines.cogvideo.pipeline_cogvideox{kind}": ("noise", True),
        "diffusers.schedulers.scheduling_dpm_cogvideox": ("sampler", True),
        "diffusers.models.autoencoders.vae": ("posterior", False),
    }
    for module, (stream, latent_order) in places.items():
        monkeypatch.setattr(f"{module}.randn_tensor", peer_draw(stream, latent_order=latent_order))


def peer_parts(pipe: CogVideoXPipeline, scheduler: str) -> dict[str, Any]:
    """diffusers' modules holding our weights, carried over by the tables run backwards."""
    diffusers = pytest.importorskip("diffusers")
    config = replace(pipe.config, sampling=replace(pipe.config.sampling, scheduler=scheduler))  # type: ignore[arg-type]
    plain = diffusers_configs(config)
    parts = {
        "transformer": diffusers.CogVideoXTransformer3DModel.from_config(plain["transformer"]),
        "vae": diffusers.AutoencoderKLCogVideoX.from_config(plain["vae"]),
    }
    for name, table in {"transformer": DIFFUSERS_TRANSFORMER, "vae": DIFFUSERS_VAE}.items():
        ours = pipe.parts.transformer if name == "transformer" else pipe.parts.vae
        parts[name].load_state_dict(invert(ours.state_dict(), table), strict=True)
        parts[name].eval()
    kind = getattr(diffusers, plain["scheduler"]["_class_name"])
    return {
        **parts,
        "scheduler": kind.from_config(plain["scheduler"]),
        "tokenizer": None,
        "text_encoder": None,
    }


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


PEER_CASES = [
    ("2b", "t2v"),
    ("5b", "t2v"),
    ("1.5-5b", "t2v"),
    ("5b-i2v", "i2v"),
    ("1.5-5b-i2v", "i2v"),
    ("2b", "v2v"),
    ("5b", "v2v"),
    ("1.5-5b", "v2v"),
]
PEER_MODULES = {"t2v": "", "i2v": "_image2video", "v2v": "_video2video"}
PEER_CLASSES = {
    "t2v": "CogVideoXPipeline",
    "i2v": "CogVideoXImageToVideoPipeline",
    "v2v": "CogVideoXVideoToVideoPipeline",
}


@pytest.mark.peers
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize(("variant", "task"), PEER_CASES)
def test_diffusers_pipelines(
    variant: str, task: str, scheduler: str, spiece: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, text features and random streams through diffusers' own pipelines, up to the latents;
    its 1.5 takes only clips of an even number of latent frames."""
    diffusers = pytest.importorskip("diffusers")
    frames = 5 if (variant, task) == ("1.5-5b", "v2v") else FRAMES
    geometry = replace(tiny_config(variant).geometry, frame_step=4)
    pipe = make(variant, spiece, geometry=geometry)
    use_our_streams(monkeypatch, PEER_MODULES[task])
    peer = getattr(diffusers, PEER_CLASSES[task])(**peer_parts(pipe, scheduler))
    peer.set_progress_bar_config(disable=True)
    features = torch.randn(2, 1, 12, 32)
    common = {
        "prompt_embeds": features[0],
        "negative_prompt_embeds": features[1],
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "height": HEIGHT,
        "width": WIDTH,
        "output_type": "latent",
    }
    own: dict[str, Any] = {"dynamic_cfg": True, "scheduler": scheduler}
    foreign: dict[str, Any] = {"prompt": None, "use_dynamic_cfg": True}
    if task != "v2v":
        own["num_frames"] = foreign["num_frames"] = frames
    if task == "i2v":
        own["image"] = picture()
        foreign["image"] = picture().permute(2, 0, 1)[None].float() / 255
    if task == "v2v":
        own |= {"video": clip(frames), "strength": 0.6}
        foreign |= {"video": [Image.fromarray(x.numpy()) for x in clip(frames).frames], "strength": 0.6}
    with torch.no_grad():
        wanted = peer(**common, **foreign).frames[0]
    got = pipe(**common, **own)
    error = relative_error(got, wanted[len(wanted) - len(got) :])
    print(f"{task} {variant} {scheduler}: {error:.1e}")
    record_figure(f"pipeline {task} {variant} {scheduler}, to latents", error, 1e-4)
    assert error <= 1e-4


@pytest.mark.peers
def test_diffusers_loads_what_we_write(pipe: CogVideoXPipeline, tmp_path: Path) -> None:
    """The folder as a whole: diffusers' own reader, tokenizer, text encoder and VAE, to frames."""
    diffusers = pytest.importorskip("diffusers")
    folder = pipe.save_pretrained(tmp_path / "m", format="diffusers")
    peer = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    peer.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 4, 4, 6)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
    with torch.no_grad():
        wanted = peer(
            PROMPT,
            latents=noise[None],
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            max_sequence_length=12,
            **options,
        ).frames[0]
    (folder / "cogvideox_diff.json").unlink()  # then our reader has diffusers' files only
    loaded = CogVideoXPipeline.from_pretrained(folder, device="cpu")
    for ours in (pipe, loaded):
        error = relative_error(ours(PROMPT, latents=noise, **options), wanted)
        print(f"frames after diffusers' files: {error:.1e}")
        record_figure("pipeline t2v 5b ddim, text to frames, from our folder", error, 1e-4)
        assert error <= 1e-4
