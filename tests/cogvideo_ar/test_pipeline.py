"""The whole pipeline with random weights: seeds, batches, lengths, folders, settings, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvideo_ar.config import cogvideo, cogvideo_demo
from cogvideo_ar.options import Options, known_durations, resolve
from cogvideo_ar.parts import Parts
from cogvideo_ar.pipeline import CogVideoPipeline, check_prompts
from shared.errors import OutputCheckError, SettingError, WeightsError
from shared.protocol import GenerationRequest
from shared.runtime import generator
from shared.video import Video
from tests.cogvideo_ar.tiny_pipeline import tiny_parts

PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return tiny_parts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def pipeline(parts: Parts) -> CogVideoPipeline:
    return CogVideoPipeline(parts)


@pytest.fixture(scope="module")
def folder(pipeline: CogVideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.save_pretrained(tmp_path_factory.mktemp("model") / "tiny")


def test_two_rounds_make_17_frames(pipeline: CogVideoPipeline):
    video = pipeline(PROMPT, seed=3)
    assert tuple(video.frames.shape) == (17, 16, 32, 3) and video.fps == 8.0
    assert torch.equal(pipeline(PROMPT, seed=3).frames, video.frames)
    assert not torch.equal(pipeline(PROMPT, seed=4).frames, video.frames)
    assert not torch.equal(pipeline("a blue square standing still", seed=3).frames, video.frames)


def test_a_shorter_video_is_made_of_the_longer_one_s_frames(pipeline: CogVideoPipeline):
    """Every stage draws from a stream of its own, so leaving out a round changes nothing before it."""
    whole, middle, keys = (pipeline(PROMPT, seed=3, num_frames=n) for n in (17, 9, 5))
    assert same_pictures(whole.frames[::2], middle.frames) and middle.fps == 4.0
    assert same_pictures(middle.frames[::2], keys.frames) and keys.fps == 2.0


def same_pictures(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to one level: the codec decodes batches of another size, so last bits round otherwise."""
    return a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= 1


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_a_batch_gives_what_single_calls_give(pipeline: CogVideoPipeline, alpha: float):
    configured = pipeline.configured(Options(guidance_alpha=alpha, num_frames=9))
    requests = [
        GenerationRequest(prompt=PROMPT, seed=1),
        GenerationRequest(prompt="a blue square standing still", seed=2),
        GenerationRequest(prompt=PROMPT, seed=2),
    ]
    for single, together in zip(
        map(configured.generate, requests), configured.generate_batch(requests), strict=True
    ):
        assert torch.equal(single.video.frames, together.video.frames)
        assert {n: s.units for n, s in single.stages.items()} == {
            n: s.units for n, s in together.stages.items()
        }


def test_stages_are_measured(pipeline: CogVideoPipeline):
    stages = pipeline.generate(GenerationRequest(prompt=PROMPT)).stages
    units = {name: (stats.units, stats.unit) for name, stats in stages.items()}
    assert units.pop("text")[0] > 3
    assert units == {
        "model/first_frame": (8, "tokens"),
        "model/keyframes": (4 * 8, "tokens"),
        "model/interpolation": (12 * 8, "tokens"),
        "decode": (17, "frames"),
    }
    assert all(stats.seconds > 0 for stats in stages.values())


def test_progress_ends_at_one_and_counts_every_token(pipeline: CogVideoPipeline):
    seen: list[float] = []
    configured = pipeline.configured(Options(num_frames=9))
    configured.on_progress = seen.append
    configured.generate(GenerationRequest(prompt=PROMPT))
    assert seen == sorted(seen) and seen[-1] == 1.0 and seen[0] < 0.2


# ---- folders


def test_saved_and_loaded_is_the_same(pipeline: CogVideoPipeline, folder: Path, tmp_path: Path):
    loaded = CogVideoPipeline.from_pretrained(folder, device="cpu")
    assert torch.equal(loaded(PROMPT, seed=5).frames, pipeline(PROMPT, seed=5).frames)
    again = loaded.save_pretrained(tmp_path / "again")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    known = loaded.settings()
    assert known["weights"] == CogVideoPipeline.from_pretrained(again, device="cpu").settings()["weights"]
    assert known | {"weights": "unsaved"} == pipeline.settings()


def test_the_second_stage_stores_only_its_own(pipeline: CogVideoPipeline, folder: Path):
    own = {name for name, _ in pipeline.parts.interpolation.temporal_parameters()}
    from shared.checkpoints import load_tensors

    assert load_tensors(folder / "interpolation.safetensors").keys() == own
    loaded = CogVideoPipeline.from_pretrained(folder, device="cpu").parts
    shared = loaded.keyframes.word_embeddings.weight.data_ptr()
    assert loaded.interpolation.word_embeddings.weight.data_ptr() == shared


def test_half_precision_on_disk(pipeline: CogVideoPipeline, tmp_path: Path):
    path = pipeline.save_pretrained(tmp_path / "half", dtype=torch.float16)
    loaded = CogVideoPipeline.from_pretrained(path, device="cpu")
    assert loaded.settings()["dtype"] == "float32"
    weight = pipeline.parts.keyframes.word_embeddings.weight
    assert torch.equal(loaded.parts.keyframes.word_embeddings.weight, weight.half().float())
    assert (path / "keyframes.safetensors").stat().st_size < 12_000
    bf16 = CogVideoPipeline.from_pretrained(path, dtype="bfloat16", device="cpu")
    assert bf16.settings()["dtype"] == "bfloat16"
    assert bf16(PROMPT, num_frames=5).num_frames == 5


def damaged(folder: Path, target: Path, name: str, content: bytes | None) -> Path:
    shutil.copytree(folder, target)
    (target / name).unlink() if content is None else (target / name).write_bytes(content)
    return target


DAMAGES = [
    ("config.json", None, "no config.json"),
    ("config.json", b"{", "cannot read"),
    (
        "config.json",
        b'{"config": {}, "family": "cogvideox_diff"}',
        "family 'cogvideox_diff', not 'cogvideo_ar'",
    ),
    ("config.json", b'{"config": {}, "family": "cogvideo_ar", "format": 9}', "has format 9"),
    ("keyframes.safetensors", None, "lacks keyframes.safetensors"),
    ("keyframes.safetensors", b"\0" * 99, "truncated or not a safetensors"),
    ("interpolation.safetensors", b"", "is empty"),
    ("ice_text.model", b"nonsense", "not a sentencepiece model"),
]


@pytest.mark.parametrize(("name", "content", "reason"), DAMAGES)
def test_damaged_folders_are_named(
    folder: Path, tmp_path: Path, name: str, content: bytes | None, reason: str
):
    bad = damaged(folder, tmp_path / "bad", name, content)
    with pytest.raises(WeightsError, match=reason):
        CogVideoPipeline.from_pretrained(bad, device="cpu")


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(WeightsError, match="no such model folder"):
        CogVideoPipeline.from_pretrained(tmp_path / "nowhere")


def test_a_vocabulary_of_another_model_is_refused(parts: Parts):
    other = replace(parts.config.keyframes, start_of_image=parts.config.keyframes.start_of_image + 1)
    with pytest.raises(WeightsError, match="<start_of_image>"):
        replace(parts, config=replace(parts.config, keyframes=other))


# ---- wishes


def test_durations_of_the_demo_and_the_release():
    demo, release = cogvideo_demo(), cogvideo()
    assert known_durations(demo.sampling) == (2.0, 1.0, 0.5)
    plans = [resolve(demo, Options(duration=d)) for d in (2.0, 1.0, 0.5)]
    assert [(p.num_frames, p.fps, p.sampling.interpolation_durations) for p in plans] == [
        (17, 8.0, (1.0, 0.5)),
        (9, 8.0, (0.5,)),
        (5, 8.0, ()),
    ]
    whole = resolve(release, Options())
    assert (whole.num_frames, whole.fps, whole.height, whole.width) == (33, 8.0, 160, 160)
    assert resolve(release, Options(rounds=1)).sampling.interpolation_durations == (2.0,)


WISHES = [
    (Options(num_frames=10), r"num_frames 10 .* legal: 5, 9, 17, 33, .*nearest: 9"),
    (Options(num_frames=17, rounds=1), "1 rounds make 9 frames, not 17"),
    (Options(rounds=99), "rounds 99 .* nearest: 8"),
    (Options(num_keyframes=6), r"num_keyframes 6 .* legal: 2, 3, 4, 5 .*nearest: 5"),
    (Options(num_keyframes=4, rounds=1), "4 key frames cannot be interpolated; legal: 3, 5 key frames"),
    (Options(super_resolution="dircet"), "super_resolution dircet .* legal: none .*nearest: none"),
    (Options(duration=4.0), r"duration 4.0 .* legal: 2.0, 1.0, 0.5; nearest: 2.0"),
    (Options(height=480), "height 480 .* legal: 64"),
    (Options(width=0), "width 0 .* legal: 64"),
    (Options(fps=0.0), "fps must be positive"),
    (Options(temperature=0.0), "temperature must be > 0, got 0"),
    (Options(temperature=float("nan")), "temperature must be a finite number"),
    (Options(coglm_temperature2=-1.0), "^coglm_temperature2 must be > 0"),
    (Options(top_k=0), "top_k must be >= 1"),
    (Options(guidance_alpha=-1.0), "guidance_alpha must be >= 0"),
]


@pytest.mark.parametrize(("wish", "reason"), WISHES)
def test_illegal_wishes_need_no_weights(wish: Options, reason: str):
    with pytest.raises(SettingError, match=reason):
        resolve(cogvideo_demo(), wish)


def test_rounds_beyond_the_known_ones_repeat_the_finest():
    """Durations are halved as far as the model knows them; the plan says what is new to it."""
    demo = cogvideo_demo()
    for wish, durations in (
        (Options(rounds=3), (1.0, 0.5, 0.5)),
        (Options(num_frames=33), (1.0, 0.5, 0.5)),
        (Options(num_frames=17, duration=1.0), (0.5, 0.5)),
        (Options(rounds=2, duration=0.5), (0.5, 0.5)),
    ):
        plan = resolve(demo, wish)
        assert plan.sampling.interpolation_durations == durations
        assert len(plan.notes) == 1 and "repeats the frame-rate token of 0.5 s" in plan.notes[0]
    assert (resolve(demo, Options(rounds=3)).num_frames, resolve(demo, Options(rounds=3)).fps) == (33, 16.0)
    assert resolve(demo, Options(rounds=2)).notes == () == resolve(demo, Options()).notes
    assert resolve(cogvideo(), Options(rounds=4)).sampling.interpolation_durations == (2.0, 1.0, 0.5, 0.5)


def test_other_counts_of_key_frames_keep_their_rate():
    demo = cogvideo_demo()
    plans = [resolve(demo, Options(num_keyframes=count)) for count in (2, 3, 4, 5)]
    assert [(p.num_frames, p.num_rounds, p.fps) for p in plans] == [
        (2, 0, 2.0),
        (9, 2, 8.0),
        (4, 0, 2.0),
        (17, 2, 8.0),
    ]
    longer = resolve(cogvideo(), Options(num_keyframes=6, rounds=0))
    assert longer.num_frames == 6 and "trained with 5" in longer.notes[0]


def test_three_rounds_and_three_key_frames(pipeline: CogVideoPipeline):
    with pytest.warns(UserWarning, match="each further one of the 3 repeats"):
        long = pipeline(PROMPT, seed=3, rounds=3)
    assert (long.num_frames, long.fps) == (33, 16.0)
    assert same_pictures(long.frames[::2], pipeline(PROMPT, seed=3).frames)
    short = pipeline(PROMPT, seed=3, num_keyframes=3)
    assert (short.num_frames, short.fps) == (9, 8.0)
    assert same_pictures(short.frames[:1], long.frames[:1])


def test_guidance_is_one_forward_per_token(pipeline: CogVideoPipeline, monkeypatch: pytest.MonkeyPatch):
    """Conditional and guider rows pass every step together: twice the rows, as many steps."""
    rows: list[int] = []
    model = pipeline.parts.keyframes
    step = model.step
    monkeypatch.setattr(model, "step", lambda x, *rest: (rows.append(len(x)), step(x, *rest))[1])
    for alpha, factor in ((1.0, 1), (2.0, 2)):
        rows.clear()
        requests = [GenerationRequest(prompt=PROMPT, seed=seed) for seed in range(3)]
        pipeline.configured(Options(guidance_alpha=alpha, rounds=0)).generate_batch(requests)
        assert rows == [3] * 8 + [3 * factor] * 4 * 8


def test_settings_are_the_effective_ones(pipeline: CogVideoPipeline):
    wish = Options(temperature=0.6, top_k=4, coglm_temperature2=0.5, guidance_alpha=3.0, duration=1.0, fps=12)
    settings = pipeline.configured(wish).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["sampling"]["default"] == {"temperature": 0.6, "top_k": 4, "temperature2": 0.5}
    expected = {"guidance_alpha": 3.0, "keyframe_duration": 1.0, "interpolation_durations": [0.5]}
    assert expected.items() <= settings["sampling"].items()
    assert (settings["num_frames"], settings["fps"]) == (9, 12.0)
    assert pipeline.settings() != settings
    call = pipeline(
        PROMPT, temperature=0.6, top_k=4, coglm_temperature2=0.5, guidance_alpha=3.0, duration=1.0
    )
    made = pipeline.configured(wish).generate(GenerationRequest(prompt=PROMPT)).video
    assert torch.equal(call.frames, made.frames) and made.fps == 12.0 and call.fps == 8.0


def test_a_call_s_wishes_come_before_the_pipeline_s(pipeline: CogVideoPipeline):
    short = pipeline.configured(Options(num_frames=5, temperature=0.5))
    assert short(PROMPT, num_frames=9).num_frames == 9
    assert not torch.equal(short(PROMPT, num_frames=9).frames, pipeline(PROMPT, num_frames=9).frames)


# ---- prompts and pictures


def test_prompts_that_cannot_be_used(pipeline: CogVideoPipeline):
    with pytest.raises(SettingError, match="the prompt is empty"):
        pipeline("  ")
    with pytest.raises(SettingError, match=r"the prompt has \d+ tokens with its template, at most 40 fit"):
        pipeline("a red circle moving left " * 20)


def test_prompts_that_the_model_was_not_trained_for(parts: Parts):
    check = (parts.tokenizer, parts.config.keyframes, parts.config.sampling)
    with pytest.warns(UserWarning, match="trained on 28"):
        check_prompts(["a red circle moving left a red circle"], *check)
    with pytest.warns(UserWarning, match="does not know"):
        check_prompts(["a red Ж"], *check)
    sampling = parts.config.sampling
    chinese = replace(sampling, prompts=replace(sampling.prompts, language="zh"))
    with pytest.warns(UserWarning, match="is not Chinese"):
        check_prompts(["a red circle"], parts.tokenizer, parts.config.keyframes, chinese)
    assert cogvideo().sampling.prompts.language == "zh"


def test_numbers_that_are_not_finite_name_their_module(tmp_path: Path):
    broken = CogVideoPipeline(tiny_parts(tmp_path))
    weights = broken.parts.keyframes.blocks[1].mlp.up.weight
    weights.data[0, 0] = float("nan")
    with pytest.raises(OutputCheckError, match=r"^keyframes\.blocks\.1\.mlp\.up: .*NaN"):
        broken(PROMPT)


def test_the_codec_reads_and_writes_videos(pipeline: CogVideoPipeline):
    frames = torch.randint(256, (17, 16, 32, 3), dtype=torch.uint8, generator=generator(0, 0, "frames"))
    codes = pipeline.codec.encode(Video(frames=frames, fps=8.0))
    assert tuple(codes.shape) == (17, 2, 4) and codes.dtype == torch.int64
    video = pipeline.codec.decode(codes, 5.0)
    assert tuple(video.frames.shape) == (17, 16, 32, 3) and video.fps == 5.0
    alone = pipeline.codec.decode(codes[16:], 5.0)
    assert torch.equal(alone.frames[0], video.frames[16])
