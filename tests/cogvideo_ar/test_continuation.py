"""Videos that begin with given frames: their tokens stay, and the rest goes on from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo_ar.config import CogLMConfig, SamplingConfig, cogvideo_demo
from cogvideo_ar.continuation import Given, known_tokens, place, prefix_of
from cogvideo_ar.generation import GreedySampler, StageSamplers, build_samplers
from cogvideo_ar.interpolation import interpolate
from cogvideo_ar.keyframes import generate_keyframes
from cogvideo_ar.options import Options, resolve
from cogvideo_ar.parts import Parts
from cogvideo_ar.pipeline import CogVideoPipeline
from cogvideo_ar.vqvae import VQVAE
from shared.errors import SettingError
from shared.protocol import GenerationRequest
from shared.runtime import generator
from shared.video import Video
from tests.cogvideo_ar import tiny
from tests.cogvideo_ar.tiny_pipeline import NUM_IMAGE_TOKENS, tiny_parts

PROMPT = "a red circle moving left"
HEIGHT, WIDTH = 16, 32


class PlainCodec(VQVAE):
    """Codes that follow the picture: a random encoder gives the same ones for all."""

    def encode(self, pixels: Tensor, rate: int = 8) -> Tensor:
        return ((pixels[:, 0, ::rate, ::rate] + 1) / 2 * (NUM_IMAGE_TOKENS - 1)).round().long()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    made = tiny_parts(tmp_path_factory.mktemp("text"))
    codec = PlainCodec(made.config.vqvae).eval()
    codec.load_state_dict(made.vqvae.state_dict())
    return replace(made, vqvae=codec)


@pytest.fixture(scope="module")
def pipeline(parts: Parts) -> CogVideoPipeline:
    return CogVideoPipeline(parts)


def clip(num_frames: int, fps: float, seed: int = 0) -> Video:
    shape = (num_frames, HEIGHT, WIDTH, 3)
    frames = torch.randint(256, shape, generator=generator(seed, 0, "clip"), dtype=torch.uint8)
    return Video(frames=frames, fps=fps)


def codes_made(
    pipeline: CogVideoPipeline, request: GenerationRequest, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """What the codec is given to decode [M, h, w]."""
    seen: list[Tensor] = []
    decode = pipeline.codec.decode
    with monkeypatch.context() as patched:
        patched.setattr(
            pipeline.codec, "decode", lambda codes, fps: (seen.append(codes), decode(codes, fps))[1]
        )
        pipeline.generate(request)
    return seen[0].cpu()


# (given frames, their rate, places in the 17 frames at 8 per second that they take)
PREFIXES = [
    (1, 2.0, [0]),
    (1, 30.0, [0]),
    (3, 2.0, [0, 4, 8]),
    (5, 2.0, [0, 4, 8, 12, 16]),
    (3, 4.0, [0, 2, 4]),
    (5, 4.0, [0, 2, 4, 6, 8]),
    (9, 8.0, [*range(9)]),
    (13, 8.0, [*range(13)]),
]


@pytest.mark.parametrize(("count", "fps", "places"), PREFIXES)
def test_given_frames_keep_their_tokens(
    pipeline: CogVideoPipeline, count: int, fps: float, places: list[int], monkeypatch: pytest.MonkeyPatch
):
    video = clip(count, fps)
    going_on = pipeline.continuing(video)
    made = codes_made(going_on, GenerationRequest(prompt=PROMPT, seed=1), monkeypatch)
    assert len(made) == 17
    assert torch.equal(made[places], pipeline.codec.encode(video))
    free = sorted(set(range(17)) - set(places))
    other = codes_made(going_on, GenerationRequest(prompt=PROMPT, seed=2), monkeypatch)
    assert torch.equal(other[places], made[places])
    assert not torch.equal(other[free], made[free])


def test_an_image_is_the_first_frame(pipeline: CogVideoPipeline, monkeypatch: pytest.MonkeyPatch):
    image = clip(1, 1.0).frames[0]
    request = GenerationRequest(prompt=PROMPT, seed=1, image=image)
    made = codes_made(pipeline, request, monkeypatch)
    assert torch.equal(made[:1], pipeline.codec.encode(Video(frames=image[None], fps=1.0)))
    result = pipeline.generate(request)
    assert "model/first_frame" not in result.stages
    assert (result.stages["encode"].units, result.stages["encode"].unit) == (1, "frames")
    assert result.stages["model/keyframes"].units == 4 * 8
    assert torch.equal(pipeline(PROMPT, seed=1, image=image).frames, result.video.frames)
    alike = pipeline.continuing(Video(frames=image[None], fps=9.0)).generate(
        GenerationRequest(prompt=PROMPT, seed=1)
    )
    assert torch.equal(alike.video.frames, result.video.frames)
    assert pipeline.tasks == {"t2v", "i2v"}


SAMPLING = SamplingConfig(
    default=CogLMConfig(top_k=20), guidance_alpha=1.0, interpolation_durations=(2.0, 1.0), max_batch=16
)


class Characters:
    def encode(self, text: str) -> list[int]:
        return [26 + ord(character) % 14 for character in text[:4]]

    def id_of(self, piece: str) -> int:
        return 25


def settings(num_samples: int) -> tuple[Any, ...]:
    streams = [torch.Generator().manual_seed(seed) for seed in range(num_samples)]
    return (Characters(), ["ab"] * num_samples, SAMPLING, build_samplers(SAMPLING, None), streams)


def tokens(seed: int, *size: int) -> Tensor:
    return torch.randint(tiny.NUM_IMAGE_TOKENS, size, generator=torch.Generator().manual_seed(seed))


def test_key_frames_depend_on_every_given_one():
    """The same random numbers, another second given frame: the third and later frames are others."""
    model = tiny.wild_model(tiny.tiny_config(num_layers=2))
    given = tokens(0, 8, 2, 16)
    changed = torch.cat([given[:, :1], tokens(1, 8, 1, 16)], dim=1)
    a, b = (generate_keyframes(model, *settings(8), given_BGS=part) for part in (given, changed))
    assert torch.equal(a[:, :2], given) and torch.equal(b[:, :2], changed)
    assert a.shape == (8, 5, 16) and bool((a[:, 2:] != b[:, 2:]).any(2).any(0).all())


def test_frames_behind_a_given_one_of_a_gap_depend_on_it():
    """Frames that interpolation would have made stay, and are fed to what it makes behind them, in the same
    block and in later rounds; nothing else changes."""
    model = tiny.wild_model(tiny.tiny_config(num_layers=2, temporal="window", window=2), seed=1)
    keys = tokens(0, 8, 5, 16)
    known = torch.full((8, 17, 16), -1)
    known[:, ::4] = keys
    free = interpolate(model, *settings(8), frames_BMS=keys)
    assert torch.equal(interpolate(model, *settings(8), frames_BMS=keys, known_BMS=known), free)
    known[:, [2, 5]] = tokens(1, 8, 2, 16)
    made = interpolate(model, *settings(8), frames_BMS=keys, known_BMS=known)
    assert torch.equal(made[:, [2, 5]], known[:, [2, 5]]) and torch.equal(made[:, ::4], keys)
    changed = (made != free).any(2).any(0).nonzero()[:, 0].tolist()
    assert {1, 2, 3, 5, 6, 7} <= set(changed)
    assert torch.equal(made[:, 9:], free[:, 9:]), "other blocks"


def test_a_prefix_of_made_frames_makes_the_rest_of_them(parts: Parts):
    """Greedy key frames, cut off behind any frame and gone on from there, are the same key frames."""
    greedy = StageSamplers(first_frame=GreedySampler(), default=GreedySampler())
    first = torch.arange(8).view(1, 1, 8)

    def keys(given: Tensor) -> Tensor:
        settings = (parts.tokenizer, [PROMPT], parts.config.sampling, greedy, [torch.Generator()])
        return generate_keyframes(parts.keyframes.double(), *settings, given)

    whole = keys(first)
    for count in (2, 3, 4):
        assert torch.equal(keys(whole[:, :count]), whole)
    parts.keyframes.float()


def test_a_batch_with_and_without_images_gives_what_single_calls_give(pipeline: CogVideoPipeline):
    configured = pipeline.configured(Options(num_frames=9))
    image = clip(1, 1.0).frames[0]
    requests = [
        GenerationRequest(prompt=PROMPT, seed=1),
        GenerationRequest(prompt=PROMPT, seed=2, image=image),
        GenerationRequest(prompt="a blue square", seed=3),
        GenerationRequest(prompt="a blue square", seed=4, image=255 - image),
    ]
    for request, result in zip(requests, configured.generate_batch(requests), strict=True):
        alone = configured.generate(request)
        assert torch.equal(alone.video.frames, result.video.frames)
        assert alone.stages.keys() == result.stages.keys()
        assert alone.stages["text"].units == result.stages["text"].units


def test_progress_ends_at_one(pipeline: CogVideoPipeline):
    seen: list[float] = []
    going_on = pipeline.continuing(clip(5, 4.0))
    going_on.on_progress = seen.append
    going_on.generate(GenerationRequest(prompt=PROMPT))
    assert seen == sorted(seen) and seen[-1] == 1.0


# ---- what does not fit


REFUSED = [
    (Options(), clip(3, 3.0), r"3 a second; legal: 2, 4, 8 .* nearest: 2"),
    (Options(rounds=0), clip(3, 8.0), r"8 a second; legal: 2 \("),
    (Options(duration=1.0), clip(3, 2.0), r"legal: 4, 8 .* nearest: 4"),
    (Options(), clip(4, 8.0), r"4 given frames .* legal: 1, 5, 9, 13; nearest: 5"),
    (Options(), clip(17, 8.0), r"17 given frames .* nearest: 13"),
    (Options(), clip(6, 2.0), r"6 given frames .* legal: 1, 2, 3, 4, 5; nearest: 5"),
    (Options(rounds=0), clip(5, 2.0), r"legal: 1, 2, 3, 4; nearest: 4"),
    (Options(num_keyframes=3), clip(4, 2.0), r"legal: 1, 2, 3; nearest: 3"),
]


@pytest.mark.parametrize(("wish", "video", "reason"), REFUSED)
def test_wrong_rates_and_counts_are_refused(parts: Parts, wish: Options, video: Video, reason: str):
    with pytest.raises(SettingError, match=reason):
        place(parts.config, resolve(parts.config, wish), video)


def test_wrong_sizes_are_refused_or_fitted(parts: Parts):
    plan = resolve(parts.config, Options())
    wide = Video(frames=torch.zeros(1, 32, 80, 3, dtype=torch.uint8), fps=2.0)
    wide.frames[:, :, 40:] = 200
    with pytest.raises(SettingError, match=r"32 x 80 pixels .* legal: 16 x 32, or fit_size crop or resize"):
        place(parts.config, plan, wide)
    for fit in ("crop", "resize"):
        fitted = place(parts.config, plan, wide, fit).frames
        assert fitted is not None and tuple(fitted.shape) == (1, HEIGHT, WIDTH, 3)
        assert int(fitted[0, :, :8].max()) < 20 and int(fitted[0, :, -8:].min()) > 180
    with pytest.raises(SettingError, match="unknown fit_size 'stretch'; legal: refuse, crop, resize"):
        Given(fit_size="stretch")  # type: ignore[arg-type]


def test_video_to_video_and_bad_images_are_refused(pipeline: CogVideoPipeline):
    with pytest.raises(SettingError, match="v2v"):
        pipeline.generate(GenerationRequest(prompt=PROMPT, video=clip(3, 2.0)))
    with pytest.raises(SettingError, match="must be uint8"):
        pipeline.generate(GenerationRequest(prompt=PROMPT, image=torch.zeros(16, 32, 3)))


def test_where_known_tokens_stand():
    config = cogvideo_demo()
    plan = resolve(config, Options())
    prefix = place(config, plan, Video(frames=torch.zeros(3, 64, 64, 3, dtype=torch.uint8), fps=4.0))
    assert (prefix.stride, prefix.num_keys) == (2, 2)
    codes = torch.arange(3 * 64).view(3, 8, 8)
    none = prefix_of(config, plan, GenerationRequest(prompt=PROMPT), Given())
    known = known_tokens([prefix, none], [codes, codes[:0]], plan, 64)
    assert torch.equal(known[0, [0, 2, 4]], codes.flatten(1))
    assert bool((known[1] == -1).all()) and int((known[0] >= 0).any(1).sum()) == 3


# ---- the command line


def test_the_command_begins_with_an_image(parts: Parts, tmp_path: Path, capsys):
    import json

    import imageio.v3 as iio

    from cogvideo_ar.__main__ import main
    from cogvideo_ar.parts import save_parts

    save_parts(parts, tmp_path / "model")
    iio.imwrite(tmp_path / "a.png", clip(1, 1.0).frames[0].numpy())
    iio.imwrite(tmp_path / "large.png", torch.zeros(40, 40, 3, dtype=torch.uint8).numpy())
    clip(7, 2.0).save(tmp_path / "given.mkv")
    clip(40, 2.0).save(tmp_path / "long.mkv")
    common = [
        "generate",
        "--model_path",
        str(tmp_path / "model"),
        "--device",
        "cpu",
        "--quiet",
        "--prompt",
        PROMPT,
    ]
    common += ["--output_path", str(tmp_path / "out.mkv"), "--overwrite", "--image_or_video_path"]
    assert main([*common, str(tmp_path / "a.png")]) == 0
    known = json.loads((tmp_path / "out.json").read_text())
    assert known["inputs"]["fit_size"] == "refuse" and "encode" in known["stages"]
    assert main([*common, str(tmp_path / "given.mkv"), "--given_frames", "3"]) == 0
    other = json.loads((tmp_path / "out.json").read_text())
    assert other["inputs"]["given_frames"] == 3 and other["settings_hash"] != known["settings_hash"]
    capsys.readouterr()
    for words, reason in (
        ([str(tmp_path / "given.mkv")], "legal: 1, 2, 3, 4, 5; nearest: 5"),
        ([str(tmp_path / "given.mkv"), "--given_frames", "9"], "has 7 frames"),
        ([str(tmp_path / "long.mkv")], "18 given frames do not end"),  # no more are decoded
        ([str(tmp_path / "large.png")], "legal: 16 x 32"),
        ([str(tmp_path / "large.png"), "--fit_size", "no"], "unknown fit_size 'no'"),
        ([str(tmp_path / "a.png"), "--given_frames", "2"], "is one image"),
    ):
        assert main([*common, *words]) == 2
        assert reason in capsys.readouterr().err
    assert main([*common, str(tmp_path / "large.png"), "--fit_size", "crop"]) == 0
