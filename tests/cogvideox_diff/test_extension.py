"""Chained clips: what is kept of the one before, what is drawn anew, and how drift is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.codec import encode_video
from cogvideox_diff.config import PRESETS
from cogvideox_diff.extension import Chain, drift, extend, plan_chain
from cogvideox_diff.planning import CallSettings
from shared.errors import SettingError
from shared.video import Video
from tests.cogvideox_diff.tiny_pipeline import PROMPT, clip, make, picture, tiny_config, write_tokenizer

QUICK = CallSettings(num_inference_steps=2, guidance_scale=1.0)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipe(spiece: Path) -> CogVideoXPipeline:
    return make("5b", spiece)


# ---- chaining


def test_clips_continue_the_end_of_the_one_before(pipe: CogVideoXPipeline) -> None:
    """The second clip's first latents are those of the first clip's last five frames; the first clip is what
    a plain call makes, and the steps of all clips are told."""
    seen: list[tuple[int, int]] = []
    made = extend(
        pipe, PROMPT, Chain(num_clips=3), QUICK, seed=4, callback=lambda s: seen.append((s.done, s.total))
    )
    assert [part.num_frames for part in made.clips] == [9, 4, 4] and made.video.num_frames == 17
    assert seen == [(i, 6) for i in range(1, 7)]
    plain = pipe(PROMPT, seed=4, num_inference_steps=2, guidance_scale=1.0)
    assert torch.equal(made.video.frames[:9], plain.frames)
    assert torch.equal(torch.cat([part.frames for part in made.clips]), made.video.frames)
    assert made.stages["model"].units == 6 and [d.clip for d in made.drift] == [0, 1, 2]


def test_the_known_frames_are_those_of_the_video(pipe: CogVideoXPipeline) -> None:
    """Decoding a clip whose beginning is known shows what the VAE makes of the known frames."""
    given = clip(9)
    known = encode_video(pipe.parts.vae, Video(frames=given.frames[-5:], fps=8))
    from cogvideox_diff.extension import _begun
    from cogvideox_diff.generation import Item

    plan = plan_chain(pipe.config, QUICK, start=given)
    told, item = _begun(pipe.engine, plan, Item(prompt=PROMPT), Chain(overlap=5), given)
    assert told.prefix is not None and torch.equal(told.prefix[0], known)
    latents = pipe.engine.run([item], plan, told, decoded=False).latents
    torch.testing.assert_close(latents[0, :2], known, atol=1e-5, rtol=0)


def test_a_given_video_is_continued(pipe: CogVideoXPipeline) -> None:
    made = extend(pipe, [PROMPT, "noise"], Chain(num_clips=2, overlap=1), QUICK, start=clip(12, 50, 70))
    assert made.video.num_frames == 12 + 8 + 8 and len(made.drift) == 3
    assert (made.video.height, made.video.width) == (32, 48)
    other = extend(pipe, [PROMPT, PROMPT], Chain(num_clips=2, overlap=1), QUICK, start=clip(12, 50, 70))
    assert torch.equal(made.video.frames[:20], other.video.frames[:20]), "the first prompt is the same"
    assert not torch.equal(made.video.frames[20:], other.video.frames[20:])


def test_pairs_of_latent_frames(spiece: Path) -> None:
    pipe = make("1.5-5b", spiece)
    assert extend(pipe, PROMPT, Chain(num_clips=2), QUICK).video.num_frames == 13


def test_images_are_continued_from_the_last_frame(spiece: Path) -> None:
    pipe = make("5b-i2v", spiece)
    made = extend(pipe, PROMPT, Chain(num_clips=2), QUICK, image=picture(), seed=1)
    assert [part.num_frames for part in made.clips] == [9, 8]
    first = pipe(PROMPT, image=picture(), seed=1, num_inference_steps=2, guidance_scale=1.0)
    assert torch.equal(made.clips[0].frames, first.frames)
    behind = extend(pipe, PROMPT, Chain(num_clips=1), QUICK, start=clip(3))
    assert behind.video.num_frames == 3 + 8


# ---- drift


def test_drift_of_equal_clips_is_none() -> None:
    same = drift([clip(), clip(), clip()])
    assert [(d.colour, d.contrast, d.sharpness) for d in same] == [(0.0, 1.0, 1.0)] * 3


def test_drift_says_what_changed() -> None:
    """A brighter clip has another colour, a paler one less contrast, a blurred one less sharpness."""
    plain = clip(3, 32, 32)
    brighter = Video(frames=(plain.frames.int() + 30).clamp(max=255).byte(), fps=8)
    paler = Video(frames=(plain.frames.float() / 2 + 64).round().byte(), fps=8)
    rows = plain.frames.float()
    blurred = Video(frames=((rows + rows.roll(1, 1) + rows.roll(1, 2)) / 3).round().byte(), fps=8)
    _, bright, pale, blur = drift([plain, brighter, paler, blurred])
    assert bright.colour > 20 and abs(pale.contrast - 0.5) < 0.02 and blur.sharpness < 0.8
    assert abs(pale.sharpness - 0.5) < 0.02 and blur.colour < 1
    with pytest.raises(ValueError, match="no clips"):
        drift([])


# ---- refusals, before any weights


def test_refusals() -> None:
    text, image = tiny_config("5b"), tiny_config("5b-i2v")

    def checked(chain: Chain, start: Video | None = None) -> Chain:
        return chain.checked(text, plan_chain(text, QUICK, start=start).geometry, start)

    assert checked(Chain()).overlap == 5 and checked(Chain(), clip(3)).overlap == 1
    cases = [
        (Chain(num_clips=0), "at least 1, got 0"),
        (Chain(overlap=4), r"4k\+1 up to 5, got 4; nearest: 5"),
        (Chain(overlap=9), "up to 5, got 9; nearest: 5"),
        (Chain(overlap=0), "got 0; nearest: 1"),
    ]
    for chain, message in cases:
        with pytest.raises(SettingError, match=message):
            checked(chain)
    with pytest.raises(SettingError, match="continues 1 frame, got overlap 5"):
        Chain(overlap=5).checked(image, plan_chain(image, QUICK, image=picture()).geometry, None)
    with pytest.raises(SettingError, match="cannot start from an image"):
        plan_chain(text, QUICK, image=picture())
    with pytest.raises(SettingError, match="needs an image, got no image"):
        plan_chain(image, QUICK)
    with pytest.raises(SettingError, match="nothing to continue"):
        geometry = plan_chain(text, CallSettings(num_frames=1)).geometry
        Chain().checked(text, geometry, None)


def test_prompts_are_one_or_one_each(pipe: CogVideoXPipeline) -> None:
    with pytest.raises(SettingError, match="got 2 prompts for 3 clips"):
        extend(pipe, [PROMPT, PROMPT], Chain(num_clips=3), QUICK)


def test_released_models_overlap_by_five_frames() -> None:
    for name in ("cogvideox-2b", "cogvideox-5b", "cogvideox-1.5-5b"):
        config = PRESETS[name]()
        chain = Chain(num_clips=4).checked(config, plan_chain(config, CallSettings()).geometry, None)
        assert chain.overlap == 5
