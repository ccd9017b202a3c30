"""The pipeline on tiny random models: seeds, batches, inputs and outputs, tasks, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.config import (
    PRESETS,
)
from cogvideox_diff.planning import CallSettings, check_request
from shared.errors import SettingError
from shared.protocol import GenerationRequest
from shared.runtime import generator
from shared.video import Video
from tests.cogvideox_diff.tiny_pipeline import (
    FRAMES,
    HEIGHT,
    PROMPT,
    WIDTH,
    clip,
    make,
    picture,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipe(spiece: Path) -> CogVideoXPipeline:
    return make("5b", spiece)


@pytest.fixture(scope="module")
def i2v(spiece: Path) -> CogVideoXPipeline:
    return make("1.5-5b-i2v", spiece)


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
        pipe.config, pipe.parts, pipe.engine.tokenizer_path, device="cpu", offload="model", tiled=True
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
    seen: list[float] = []
    pipe.generate(GenerationRequest(prompt=""), callback=lambda step: seen.append(step.done / step.total))
    assert seen == [0.25, 0.5, 0.75, 1.0]
    seen = []
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
