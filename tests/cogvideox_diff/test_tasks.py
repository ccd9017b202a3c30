"""What the tasks take: frame counts made legal, padding of pairs, known first frames, guidance told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideox_diff import CogVideoXPipeline, conditioning
from cogvideox_diff.config import PRESETS, SamplingConfig, ScheduleConfig
from cogvideox_diff.generation import Given
from cogvideox_diff.geometry import VideoGeometry, fit_frames, frames_to_pad
from cogvideox_diff.planning import CallSettings, check_request
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import KnownFrames, make_scheduler
from shared.errors import SettingError
from shared.protocol import GenerationRequest
from tests.cogvideox_diff.tiny_pipeline import PROMPT, clip, make, picture, tiny_config, write_tokenizer


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipe(spiece: Path) -> CogVideoXPipeline:
    return make("5b", spiece)


# ---- frame counts


@pytest.mark.parametrize(
    ("how", "counts"),
    [
        ("nearest", {1: 1, 4: 1, 5: 9, 9: 9, 12: 9, 13: 17, 60: 49}),
        ("pad", {1: 1, 2: 9, 9: 9, 10: 17, 49: 49}),
        ("trim", {1: 1, 8: 1, 9: 9, 16: 9, 49: 49, 300: 49}),
    ],
)
def test_fit_frames(how: Any, counts: dict[int, int]) -> None:
    assert {given: fit_frames(given, 8, 49, how) for given in counts} == counts


def test_fit_frames_refuses() -> None:
    with pytest.raises(SettingError, match="cannot pad 50 frames: the most is 49; legal: fit_frames trim"):
        fit_frames(50, 8, 49, "pad")
    with pytest.raises(SettingError, match="one of nearest, pad, trim, got 'cut'"):
        fit_frames(9, 8, 49, "cut")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="at least 1, got 0; nearest: 1"):
        fit_frames(0, 8, 49, "nearest")


def test_fitting_is_asked_for() -> None:
    """By default the error names the nearest count; a given video is padded with its last frame or cut."""
    config = tiny_config("5b")
    with pytest.raises(SettingError, match="got 11; nearest: 9"):
        check_request(config, video=clip(11))
    with pytest.raises(SettingError, match="17 exceeds the given video's 9 frames; nearest: 9"):
        check_request(config, CallSettings(num_frames=17), video=clip())
    wanted = [
        ("pad", 11, None, 17),
        ("trim", 11, None, 9),
        ("nearest", 11, None, 9),
        ("nearest", 14, None, 17),
    ]
    wanted += [("trim", 9, 17, 9), ("pad", 9, 17, 17), ("trim", 17, 12, 9)]
    for how, frames, asked, got in wanted:
        settings = CallSettings(fit_frames=how, num_frames=asked)  # type: ignore[arg-type]
        assert check_request(config, settings, video=clip(frames)).geometry.num_frames == got
    assert check_request(config, CallSettings(num_frames=12, fit_frames="pad")).geometry.num_frames == 17


def test_a_short_video_goes_on_with_its_last_frame(pipe: CogVideoXPipeline) -> None:
    geometry = VideoGeometry.of(pipe.config, num_frames=17)
    pixels = conditioning.video_pixels(clip(11), geometry)
    assert pixels.shape[1] == 17
    assert torch.equal(pixels[:, 11:], pixels[:, 10:11].expand(-1, 6, -1, -1))
    assert pipe(PROMPT, video=clip(11), fit_frames="pad", num_inference_steps=2).num_frames == 17


# ---- pairs of latent frames


def test_quirk_back_padding_when_aligned() -> None:
    assert [frames_to_pad(count, 2, "back") for count in (11, 12, 13)] == [1, 2, 1]
    assert frames_to_pad(12, 1, "back") == 0


@pytest.mark.parametrize("padding", ["front", "back"])
def test_padding_of_both_conventions(padding: Any, spiece: Path) -> None:
    """The clip's own latents are where they are dropped from; what completes the pair is a copy."""
    pipe = make("1.5-5b", spiece)
    call = CallSettings(frame_padding=padding, strength=0.25)
    plan = check_request(pipe.config, call, video=clip())
    assert plan.settings()["frame_padding"] == padding
    assert (plan.geometry.padding, plan.geometry.padded_latent_frames) == (padding, 4)
    z = torch.randn(1, 3, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    padded = conditioning.clean_latents(z, pipe.config, padding)
    own = conditioning.drop_padding(padded, plan.geometry)
    torch.testing.assert_close(own, z * pipe.config.vae.scaling_factor)
    extra, copied = (padded[:, 0], own[:, 0]) if padding == "front" else (padded[:, 3], own[:, 2])
    assert torch.equal(extra, copied)
    video = pipe.generate(GenerationRequest(prompt=PROMPT, video=clip()), call).video
    assert video.num_frames == 9


def test_paddings_differ_in_the_video_only_as_said(spiece: Path) -> None:
    """The same noise read with the padding in front or behind: the video's own latents differ in place."""
    noise = torch.randn(4, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    pipe = make("1.5-5b", spiece, sampling=SamplingConfig(num_inference_steps=2, guidance_scale=1.0))
    results = {}
    for padding in ("front", "back"):
        plan = check_request(pipe.config, CallSettings(frame_padding=padding))  # type: ignore[arg-type]
        results[padding] = pipe.engine.run([_item()], plan, Given(noise=noise[None]), decoded=False).latents[
            0
        ]
    torch.testing.assert_close(results["front"][:-1], results["back"][1:])


def test_padding_is_a_setting() -> None:
    with pytest.raises(SettingError, match="frame_padding must be one of front, back, got 'first'"):
        check_request(tiny_config("1.5-5b"), CallSettings(frame_padding="first"))  # type: ignore[arg-type]
    assert check_request(tiny_config("1.5-5b")).settings()["frame_padding"] == "front"
    assert "frame_padding" not in check_request(tiny_config("5b")).settings()


# ---- known first frames


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_known_frames_end_as_given(pipe: CogVideoXPipeline, scheduler: Any) -> None:
    prefix = torch.randn(1, 2, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    call, request = CallSettings(scheduler=scheduler), GenerationRequest(prompt=PROMPT)
    plan = check_request(pipe.config, call)
    steps: list[float] = []
    given = Given(prefix=prefix)
    from cogvideox_diff.generation import Item

    items = [Item(prompt=PROMPT), Item(prompt="noise", seed=4)]
    batch = pipe.engine.run(items, plan, given, callback=lambda s: steps.append(s.done), decoded=False)
    for latents in batch.latents:
        torch.testing.assert_close(latents[:2], prefix[0], atol=1e-5, rtol=0)
    free = pipe.engine.run(items, plan, Given(), decoded=False)
    assert float((free.latents[0, 2] - batch.latents[0, 2]).abs().max()) > 1e-3, "the rest is led by them"
    assert pipe.generate(request, call, given=given).video.num_frames == 9 and steps == [1, 2, 3, 4]


def test_known_frames_stand_behind_the_padding(spiece: Path) -> None:
    pipe = make("1.5-5b", spiece)
    geometry = check_request(pipe.config).geometry
    prefix = torch.randn(1, 1, 4, 4, 6)
    known = conditioning.known_frames(prefix, geometry)
    assert torch.equal(known, prefix.expand(-1, 2, -1, -1, -1)), "a copy at the padding frame"
    latents = pipe.engine.run(
        [_item()], check_request(pipe.config), Given(prefix=prefix), decoded=False
    ).latents
    torch.testing.assert_close(latents[:, :1], prefix, atol=1e-5, rtol=0)


def test_known_frames_have_the_right_noise_at_every_level() -> None:
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    solver = make_scheduler(schedule, SamplingConfig(num_inference_steps=5))
    noise, known = torch.randn(1, 3, 1, 2, 2), torch.randn(1, 2, 1, 2, 2)
    scheduler = KnownFrames(solver, known, noise)
    x, state = scheduler.restored(noise, solver.levels.abar[0]), scheduler.init_state()
    torch.testing.assert_close(x, noise)  # pure noise at the start
    for i, after in enumerate(solver.levels.abar_next):
        x0 = scheduler.to_x0(x, torch.zeros_like(x), i)
        assert torch.equal(x0[:, :2], known)
        x, state = scheduler.step(x, x0, i, state, torch.randn_like)
        torch.testing.assert_close(x[:, :2], after**0.5 * known + (1 - after) ** 0.5 * noise[:, :2])


# ---- what is told


def _item() -> Any:
    from cogvideox_diff.generation import Item

    return Item(prompt=PROMPT)


def test_changing_guidance_is_told(pipe: CogVideoXPipeline) -> None:
    """50 steps of the wave at scale 6, as diffusers and SAT compute them; a constant scale says nothing."""
    config = PRESETS["cogvideox-5b"]()
    wave = check_request(config, CallSettings(dynamic_cfg=True)).settings()["guidance_weights"]
    assert len(wave) == 50 and [round(w, 2) for w in wave[:5]] == [2.29, 2.54, 6.97, 6.42, 2.79]
    rise = check_request(config, CallSettings(dynamic_cfg="rise")).settings()["guidance_weights"]
    assert rise == sorted(rise) and rise[-1] == 7.0
    assert "guidance_weights" not in check_request(config).settings()
    plan = check_request(pipe.config, CallSettings(dynamic_cfg="fall", strength=0.5), video=clip())
    assert len(plan.guidance_weights) == plan.num_steps == 2, "of the steps that are run"


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "cogvideox-demo"])
def test_illegal_geometry_names_the_nearest_of_every_model(preset: str) -> None:
    """Without weights: only the configuration is read."""
    config = PRESETS[preset]()
    given = {"image": picture()} if preset.endswith("i2v") else {}
    step, most = config.geometry.frame_step, config.geometry.max_frames
    with pytest.raises(
        SettingError,
        match=rf"{step}N\+1 up to {most}, got 50; nearest: {step * (3 if step == 16 else 6) + 1}",
    ):
        check_request(config, CallSettings(num_frames=50), **given)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"nearest|only"):
        check_request(config, CallSettings(height=500, width=720), **given)  # type: ignore[arg-type]
