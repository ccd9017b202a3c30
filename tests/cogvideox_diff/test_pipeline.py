"""The pipeline on tiny random models: seeds, batches, folders, tasks, errors; diffusers' pipelines live."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER, DIFFUSERS_VAE
from cogvideox_diff.config import (
    PRESETS,
    CogVideoXConfig,
    GeometryConfig,
    SamplingConfig,
    T5Config,
    TransformerConfig,
    VAEConfig,
)
from cogvideox_diff.diffusers_config import config_from_diffusers, diffusers_configs
from cogvideox_diff.formats import Parts, open_folder
from cogvideox_diff.planning import CallSettings, check_request
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.checkpoints import invert
from shared.errors import SettingError, WeightsError
from shared.protocol import GenerationRequest
from shared.runtime import generator
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


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["a red circle moves left", "a blue square stays", "two green stars move up slowly", "noise"]
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    return train_text_model(words, path, vocab_size=60, ids=T5_IDS, whole_words=True)


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


@pytest.fixture(scope="module")
def pipe(spiece: Path) -> CogVideoXPipeline:
    return make("5b", spiece)


@pytest.fixture(scope="module")
def i2v(spiece: Path) -> CogVideoXPipeline:
    return make("1.5-5b-i2v", spiece)


def clip(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> Video:
    random = torch.Generator().manual_seed(3)
    return Video(frames=torch.randint(256, (frames, height, width, 3), generator=random).byte(), fps=8)


def picture(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    return clip(1, height, width).frames[0]


def difference(a: Video, b: Video) -> int:
    return int((a.frames.int() - b.frames.int()).abs().max())


# ---- seeds and batches


def test_a_seed_is_a_video(pipe: CogVideoXPipeline) -> None:
    first, again, other = pipe(PROMPT, seed=1), pipe(PROMPT, seed=1), pipe(PROMPT, seed=2)
    assert first.frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert torch.equal(first.frames, again.frames)
    assert difference(first, other) > 30
    assert difference(first, pipe("two green stars", seed=1)) > 0


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_a_batch_is_its_videos(pipe: CogVideoXPipeline, scheduler: str) -> None:
    """Two prompts with two videos each; sample 0 of a prompt is the video of a plain call."""
    texts = [PROMPT, "a blue square"]
    batch = pipe(texts, num_videos_per_prompt=2, output_type="latent", scheduler=scheduler)
    assert len(batch) == 4
    for i, text in enumerate(texts):
        alone = pipe(text, output_type="latent", scheduler=scheduler)
        assert float((batch[2 * i] - alone).abs().max()) < 1e-4 * float(alone.abs().max())
        assert float((batch[2 * i + 1] - alone).abs().max()) > 0.1


def test_generate_batch_equals_single_requests(pipe: CogVideoXPipeline) -> None:
    """Of two tasks and two sizes: three batches inside, and the order stays."""
    requests = [
        GenerationRequest(prompt=PROMPT, seed=1),
        GenerationRequest(prompt=PROMPT, seed=2, video=clip()),
        GenerationRequest(prompt="a blue square", seed=3),
        GenerationRequest(prompt="noise", seed=4, video=clip(17)),
    ]
    results = pipe.generate_batch(requests)
    assert [result.video.num_frames for result in results] == [9, 9, 9, 17]
    for request, result in zip(requests, results, strict=True):
        alone = pipe.generate(request)
        assert difference(alone.video, result.video) <= 1
        assert result.settings == alone.settings


def test_stages_and_settings(pipe: CogVideoXPipeline) -> None:
    result = pipe.generate(GenerationRequest(prompt=PROMPT))
    assert set(result.stages) == {"text", "model", "decode"}
    assert (result.stages["model"].units, result.stages["model"].unit) == (4, "steps")
    assert (result.stages["decode"].units, result.stages["decode"].unit) == (FRAMES, "frames")
    assert all(seconds > 0 for seconds in result.seconds.values())
    settings = pipe.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["num_inference_steps"] == 4 and settings["num_frames"] == FRAMES
    short = pipe.generate(
        GenerationRequest(prompt="", video=clip()), CallSettings(strength=0.5, guidance_scale=1.0)
    )
    assert set(short.stages) == {"text", "encode", "model", "decode"}
    assert short.stages["model"].units == 2
    assert (short.settings["task"], short.settings["strength"]) == ("v2v", 0.5)


def test_offload_and_codec(pipe: CogVideoXPipeline) -> None:
    rebuilt = pipe.codec.decode(pipe.codec.encode(clip()), 8)
    assert rebuilt.frames.shape == clip().frames.shape
    waiting = CogVideoXPipeline(
        pipe.config, pipe.parts, pipe.engine.tokenizer_path, device="cpu", offload="cpu", tiled=True
    )
    assert torch.equal(waiting(PROMPT).frames, pipe(PROMPT).frames)  # a frame is smaller than a tile


# ---- inputs and outputs


def test_output_types(pipe: CogVideoXPipeline) -> None:
    video = pipe(PROMPT)
    pixels, array = pipe(PROMPT, output_type="pt"), pipe(PROMPT, output_type="np")
    images = pipe(PROMPT, output_type="pil")
    assert pixels.shape == (FRAMES, 3, HEIGHT, WIDTH) and array.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
    assert np.array_equal(np.array(images[4]), video.frames[4].numpy())
    torch.testing.assert_close(pixels.permute(0, 2, 3, 1), torch.from_numpy(array))
    torch.testing.assert_close(torch.from_numpy(array) * 255, video.frames.float(), atol=0.51, rtol=0)
    assert pipe(PROMPT, output_type="latent").shape == (3, 4, 4, 6)


def test_given_features_and_noise_replace_our_own(pipe: CogVideoXPipeline) -> None:
    from cogvideox_diff.text_encoder import encode_prompts

    engine = pipe.engine
    features, _ = encode_prompts(engine.parts.text_encoder, engine.tokenizer, [PROMPT, ""])
    noise = torch.randn(3, 4, 4, 6, generator=generator(5, 0, "noise"))
    wanted = pipe(PROMPT, seed=5)
    got = pipe(prompt_embeds=features[0], negative_prompt_embeds=features[1], latents=noise, seed=99)
    assert difference(wanted, got) <= 1
    assert len(pipe(prompt_embeds=features, output_type="latent", guidance_scale=1.0)) == 2


def test_guidance_and_negative_prompt_matter(pipe: CogVideoXPipeline) -> None:
    def run(**options: Any) -> Tensor:
        return pipe(PROMPT, output_type="latent", **options)

    plain = run()
    assert torch.equal(run(guidance_scale=1.0), run(guidance_scale=0.0))  # both: none
    for options in ({"guidance_scale": 1.0}, {"negative_prompt": "noise"}, {"dynamic_cfg": True}):
        assert float((run(**options) - plain).abs().max()) > 1e-3
    sampling = replace(pipe.config.sampling, unconditional="zeros")
    zeros = CogVideoXPipeline(replace(pipe.config, sampling=sampling), pipe.parts, pipe.engine.tokenizer_path)
    empty = torch.zeros(12, 32)
    assert torch.equal(zeros(PROMPT, output_type="latent"), run(negative_prompt_embeds=empty))


def test_a_long_prompt_warns(pipe: CogVideoXPipeline) -> None:
    long = f"{PROMPT} " * 8
    with pytest.warns(UserWarning, match="exceeds 12 tokens"):
        pipe(long, output_type="latent", num_inference_steps=1)
    assert "exceeds 12 tokens" in pipe.generate(GenerationRequest(prompt=long)).warnings[0]
    assert pipe.generate(GenerationRequest(prompt=PROMPT)).warnings == ()


def test_callback_sees_the_steps(pipe: CogVideoXPipeline) -> None:
    seen: list[int] = []
    pipe(PROMPT, callback_on_step_end=lambda step: seen.append(step.timestep), output_type="latent")
    assert seen == [999, 749, 499, 249]


# ---- tasks


def test_image_to_video(i2v: CogVideoXPipeline) -> None:
    assert i2v.tasks == {"i2v"}
    first = i2v(PROMPT, image=picture(), height=HEIGHT, width=WIDTH)
    assert first.frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    as_pil = i2v(PROMPT, image=Image.fromarray(picture().numpy()), height=HEIGHT, width=WIDTH)
    assert torch.equal(first.frames, as_pil.frames)
    other = i2v(PROMPT, image=255 - picture(), height=HEIGHT, width=WIDTH)
    assert difference(first, other) > 10


def test_image_decides_the_size_of_1_5(i2v: CogVideoXPipeline) -> None:
    """The native short side and at most the native long one, whatever the image's own size."""
    sizes = {(100, 150): (32, 48), (150, 100): (48, 32), (70, 70): (32, 32), (100, 900): (32, 48)}
    for given, wanted in sizes.items():
        plan = check_request(i2v.config, image=picture(*given))
        assert plan.geometry.size == wanted
    config = PRESETS["cogvideox-1.5-5b-i2v"]()
    assert check_request(config, image=picture(72, 128)).geometry.size == (768, 1360)
    assert check_request(PRESETS["cogvideox-5b-i2v"](), image=picture()).geometry.size == (480, 720)


def test_image_conditions(i2v: CogVideoXPipeline) -> None:
    """The image's latent, divided by the factor in 1.5, at frame 0 of the padded length, then zeros."""
    from cogvideox_diff.generation import Item

    plan = check_request(i2v.config, image=picture())
    latents, frames = i2v.engine._encode([Item(prompt="", image=picture())], plan)
    posterior = i2v.parts.vae.encode(picture().permute(2, 0, 1)[None, :, None].float() / 127.5 - 1)
    noise = torch.randn(1, 4, 4, 6, generator=generator(0, 0, "posterior"))
    wanted = posterior.sample(noise.transpose(0, 1)[None]) / i2v.config.vae.scaling_factor
    assert frames == 1 and latents.shape == (1, 4, 4, 4, 6)
    torch.testing.assert_close(latents[:, 0], wanted[:, :, 0])
    assert not latents[:, 1:].any()


def test_video_to_video(pipe: CogVideoXPipeline) -> None:
    """Less strength runs fewer steps and stays nearer to the clip; another size is cut to the model's."""
    weak, strong = (pipe(PROMPT, video=clip(), strength=share, output_type="latent") for share in (0.25, 1.0))
    own = pipe.codec.encode(clip()).transpose(0, 1) * pipe.config.vae.scaling_factor
    assert float((weak - own).std()) < float((strong - own).std())
    assert torch.allclose(strong, pipe(PROMPT, output_type="latent"), atol=1e-4)  # starts at pure noise
    video = pipe(PROMPT, video=replace(clip(12, 50, 50), fps=12.5), num_frames=9)
    assert video.frames.shape == (FRAMES, HEIGHT, WIDTH, 3) and video.fps == 12.5


def test_video_to_video_pads_pairs(spiece: Path) -> None:
    """Three latent frames in patches of two: the first is doubled for sampling and dropped again."""
    pipe = make("1.5-5b", spiece)
    plan = check_request(pipe.config, video=clip())
    assert (plan.geometry.latent_frames, plan.geometry.padded_latent_frames) == (3, 4)
    assert pipe(PROMPT, video=clip()).num_frames == FRAMES


def test_legal_frame_counts(pipe: CogVideoXPipeline) -> None:
    for frames in (1, 9, 17):
        assert pipe(PROMPT, num_frames=frames, num_inference_steps=1).num_frames == frames
    for frames in (0, 8, 10, 25):
        with pytest.raises(SettingError, match=r"8N\+1 up to 17, got .*nearest"):
            pipe(PROMPT, num_frames=frames)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 40}, "height must be a multiple of 16, got 40; nearest: 48"),
        ({"num_inference_steps": 0}, "must be positive, got 0"),
        ({"num_inference_steps": 1001}, "1..1000, got 1001; nearest: 1000"),
        ({"scheduler": "ddmi"}, "'ddim', 'dpm', got 'ddmi'; nearest: ddim"),
        ({"dynamic_cfg": "sideways"}, "dynamic_cfg must be one of"),
        ({"guidance_scale": -1.0}, "must not be negative, got -1"),
        ({"strength": 0.5}, "strength 0.5 is for video-to-video"),
        ({"video": clip(), "strength": 0.1}, "keeps none of 4 steps; nearest: 0.25"),
        ({"video": clip(), "strength": 2.0}, r"strength must be in \(0, 1\], got 2"),
        ({"video": clip(11)}, "got 11; nearest: 9"),
        ({"video": clip(), "num_frames": 17}, "17 exceeds the given video's 9 frames"),
        ({"video": clip(), "image": picture()}, "an image and a video"),
        ({"image": picture()}, "makes t2v and v2v, not i2v"),
        ({"image": 3}, "tensor, an array or a PIL image, got int"),
        ({"output_type": "gif"}, "output_type must be one of video, latent"),
        ({"num_videos_per_prompt": 0}, "at least 1, got 0"),
        ({"prompt": []}, "a text or a list of texts"),
        ({"latents": torch.zeros(3, 4, 4, 4)}, r"latents must be \[1, 3, 4, 4, 6\] or \[3, 4, 4, 6\]"),
        ({"prompt_embeds": torch.zeros(3, 32)}, r"prompt_embeds must be \[1, 12, 32\]"),
    ],
)
def test_errors_before_any_work(pipe: CogVideoXPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        pipe(**({"prompt": PROMPT} | options))


def test_an_image_model_needs_an_image(i2v: CogVideoXPipeline) -> None:
    for inputs, got in ({}, "no image"), ({"video": clip()}, "a video"):
        with pytest.raises(SettingError, match=f"needs an image, got {got}"):
            i2v(PROMPT, **inputs)
    with pytest.raises(SettingError, match="must be uint8"):
        i2v(PROMPT, image=picture().float())


# ---- folders


@pytest.mark.parametrize("layout", ["ours", "diffusers"])
@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_save_and_load_changes_nothing(variant: str, layout: Any, spiece: Path, tmp_path: Path) -> None:
    pipe = make(variant, spiece)
    loaded = CogVideoXPipeline.from_pretrained(
        pipe.save_pretrained(tmp_path / "m", format=layout), device="cpu"
    )
    assert loaded.config == pipe.config and loaded.name == "m"
    assert loaded.settings() == pipe.settings()
    options = {"image": picture()} if "i2v" in variant else {}
    assert torch.equal(
        loaded(PROMPT, output_type="latent", **options), pipe(PROMPT, output_type="latent", **options)
    )
    encoder = loaded.parts.text_encoder.t5
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight


def test_stored_dtype_is_not_the_one_to_compute_in(pipe: CogVideoXPipeline, tmp_path: Path) -> None:
    folder = pipe.save_pretrained(tmp_path, dtype="float16")
    assert CogVideoXPipeline.from_pretrained(folder, device="cpu").engine.dtype == torch.float32
    half = CogVideoXPipeline.from_pretrained(folder, device="cpu", dtype="bf16")
    assert half.settings()["dtype"] == "bfloat16"
    assert half(PROMPT, num_inference_steps=1).num_frames == FRAMES
    again = half.save_pretrained(tmp_path / "half")
    assert open_folder(again).trained_dtype == torch.bfloat16
    with pytest.raises(SettingError, match=r"bfloat16 \(nearest\)"):
        CogVideoXPipeline.from_pretrained(again, dtype="float16")
    forced = CogVideoXPipeline.from_pretrained(again, dtype="fp16", device="cpu", force_dtype=True)
    kept = {x.dtype for name, x in forced.parts.text_encoder.named_parameters() if ".wo." in name}
    assert forced.engine.dtype == torch.float16 and kept == {torch.float32}


def test_folder_errors(pipe: CogVideoXPipeline, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no folder"):
        open_folder(tmp_path / "absent")
    with pytest.raises(WeightsError, match="is no model folder"):
        open_folder(tmp_path)
    folder = pipe.save_pretrained(tmp_path / "m")
    (folder / "vae.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"vae\.safetensors"):
        CogVideoXPipeline.from_pretrained(folder, device="cpu")
    header = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(header | {"family": "cogvideo_ar"}))
    with pytest.raises(WeightsError, match="cogvideo_ar"):
        open_folder(folder)


@pytest.mark.parametrize("preset", [name for name in PRESETS if "demo" not in name])
def test_released_configurations_survive_diffusers_files(preset: str) -> None:
    """Native size and lengths of 1.5 are not in its files; they are filled in as released."""
    config = PRESETS[preset]()
    back = config_from_diffusers(diffusers_configs(config))
    frames = (back.transformer.sample_size[0], *config.transformer.sample_size[1:])
    assert back.transformer == replace(config.transformer, sample_size=frames)
    assert replace(back, transformer=config.transformer) == config


def test_pieces_that_diffusers_does_not_know_warn(pipe: CogVideoXPipeline, tmp_path: Path) -> None:
    whole = replace(pipe.config.vae, decode_latents=0)
    other = CogVideoXPipeline(replace(pipe.config, vae=whole), pipe.parts, pipe.engine.tokenizer_path)
    with pytest.warns(UserWarning, match="num_latent_frames_batch_size"):
        other.save_pretrained(tmp_path, format="diffusers")


# ---- diffusers live

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
        assert error <= 1e-4
