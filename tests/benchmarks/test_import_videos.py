"""Videos that were made elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.imports import ImportedVideos, read_folder, read_whole
from benchmarks.metrics.base import RefusedError
from benchmarks.storage import read_json
from benchmarks.suites import Suite, items, suite_from
from benchmarks.windows import Window
from shared.config_io import to_plain
from shared.errors import SettingError, UserError
from shared.protocol import GenerationRequest
from shared.video import Video
from shared.video_io import write_video
from tests.benchmarks.fakes import FakeGenerator

RED, BLUE = "a red circle moving left slowly on a white background", "a blue square"


def video(prompt: str, seed: int = 0) -> Video:
    return FakeGenerator("m").generate(GenerationRequest(prompt=prompt, seed=seed)).video


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two samples of one prompt and one of another, without loss."""
    folder = tmp_path / "made"
    folder.mkdir()
    for name, prompt, seed in (("b10", RED, 1), ("b9", RED, 0), ("a", BLUE, 2)):
        write_video(video(prompt, seed), folder / f"{name}.mkv")
    return folder


def prompts_of(folder: Path, prompt_file: Path | None = None) -> dict[str, str]:
    return {made.path.name: made.prompt for made in read_folder(folder, prompt_file)}


WANTED = {"a.mkv": BLUE, "b9.mkv": RED, "b10.mkv": RED}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.csv", f'file,prompt\na.mkv,{BLUE}\nb9.mkv,"{RED}"\nb10.mkv,{RED}\n'),
        ("prompts.json", json.dumps(WANTED)),
        ("prompts.jsonl", "\n".join(json.dumps({"video": f, "prompt": p}) for f, p in WANTED.items())),
        ("prompts.txt", f"{BLUE}\n{RED}\n{RED}\n"),
    ],
)
def test_prompts_beside_the_videos(videos: Path, name: str, text: str) -> None:
    (videos / name).write_text(text, encoding="utf-8")
    assert prompts_of(videos) == WANTED
    (videos / name).rename(other := videos.parent / name)
    assert prompts_of(videos, other) == WANTED


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "txt"])
def test_prompts_may_have_the_line_separators_of_unicode(videos: Path, suffix: str) -> None:
    said = dict(zip(WANTED, ("a\u2028b", "c\x85d", "e\x0cf"), strict=True))
    text = {
        "csv": "file,prompt\r\n" + "".join(f"{name},{prompt}\r\n" for name, prompt in said.items()),
        "jsonl": "\n".join(json.dumps({"file": f, "prompt": p}, ensure_ascii=False) for f, p in said.items()),
        "txt": "\n".join(said.values()),
    }
    (videos / f"prompts.{suffix}").write_text(text[suffix], encoding="utf-8")
    assert prompts_of(videos) == said


def test_prompts_from_names_and_sidecars(tmp_path: Path) -> None:
    for name in ("a red car-0", "a red car-1"):
        write_video(video(BLUE), tmp_path / f"{name}.mkv")
    write_video(video(BLUE), tmp_path / "x.mkv")
    (tmp_path / "x.json").write_text(json.dumps({"prompt": BLUE}), encoding="utf-8")
    assert list(prompts_of(tmp_path).values()) == ["a red car", "a red car", BLUE]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("prompts.txt", "one\n", "1 prompts for 3 videos"),
        ("prompts.csv", "file,prompt\nz.mkv,x\n", "names 'z.mkv', which is not in"),
        ("prompts.csv", "name,text\nz.mkv,x\n", "every row needs file and prompt"),
        ("prompts.json", "{", "cannot read prompts"),
    ],
)
def test_prompts_that_do_not_fit(videos: Path, name: str, text: str, reason: str) -> None:
    (videos / name).write_text(text, encoding="utf-8")
    with pytest.raises(SettingError, match=reason):
        read_folder(videos)


def test_samples_are_in_the_order_of_their_numbers(videos: Path) -> None:
    (videos / "prompts.json").write_text(json.dumps(WANTED), encoding="utf-8")
    made = ImportedVideos.open(videos)
    for sample in (0, 1):
        got = made.generate(GenerationRequest(prompt=RED, seed=77, sample=sample)).video
        assert got.frames.equal(video(RED, sample).frames)
    with pytest.raises(UserError, match="no video 2"):
        made.generate(GenerationRequest(prompt=RED, sample=2))


def test_another_file_is_another_model(videos: Path) -> None:
    before = ImportedVideos.open(videos).settings()
    assert before["container"] == [".mkv"] == ImportedVideos.open(videos).settings()["container"]
    write_video(video(BLUE, 9), videos / "a.mkv", overwrite=True)
    assert ImportedVideos.open(videos).settings() != before


def test_a_video_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_video(video(RED), tmp_path / "red.mp4")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 5] + bytes(len(whole) - len(whole) * 3 // 5))
    with pytest.raises(UserError):
        ImportedVideos.open(tmp_path).generate(GenerationRequest(prompt="red"))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_a_lossless_video_that_is_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    """Matroska counts no frames, and what is left of such a file can be decoded."""
    path = write_video(video(RED), tmp_path / "red.mkv")
    assert read_whole(path).num_frames == video(RED).num_frames
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"cut short|no frames|cannot read"):
        read_whole(path)


def test_the_verb_makes_a_run_and_a_suite(videos: Path, tmp_path: Path) -> None:
    (videos / "prompts.json").write_text(json.dumps(WANTED), encoding="utf-8")
    run = tmp_path / "run"
    assert main(["import_videos", str(videos), "--output_path", str(run), "--quiet"]) == 0
    results = read_json(run / "results.json")
    row = results["models"][f"external:{videos}"]
    assert row["num_videos"] == 2 and row["metrics"]["prompt_accuracy"]["value"] == 1.0
    suite = suite_from(read_json(run / "suite.json"))
    assert suite.prompts == (BLUE, RED) and suite.num_videos_per_prompt == 1
    assert main(["import_videos", str(videos.parent / "none"), "--output_path", str(run)]) == 2


# ---- windows and languages of suites


def test_a_window_takes_time_rate_and_size() -> None:
    whole = video(RED)  # 17 frames at 8 fps, 64x64
    window = Window.parse("1,4,32,24")
    seen = window.look(whole)
    assert (seen.num_frames, seen.fps, seen.height, seen.width) == (4, 4.0, 32, 24)
    only_time = Window(seconds=1, fps=4, height=64, width=64).look(whole)
    assert only_time.frames.equal(whole.frames[:8:2])
    flat = Video(frames=whole.frames * 0 + 77, fps=8.0)
    assert (window.look(flat).frames == 77).all()


@pytest.mark.parametrize("text", ["3,8,64,64", "1,16,64,64", "1,8,65,64"])
def test_a_window_never_invents(text: str) -> None:
    with pytest.raises(RefusedError, match="the window is"):
        Window.parse(text).look(video(RED))


def test_illegal_windows() -> None:
    with pytest.raises(SettingError, match="SECONDS,FPS"):
        Window.parse("1,2")
    with pytest.raises(SettingError, match="must be positive"):
        Window.parse("0,8,64,64")


def test_each_model_reads_its_language(tmp_path: Path) -> None:
    plain = {
        "name": "two", "models": ["a", "b"], "prompts": [RED], "num_prompts": 1,
        "translations": {"zh": ["红色圆形"]}, "languages": {"a": "zh"},
    }  # fmt: skip
    suite = suite_from(plain)
    assert [items(suite, model)[0].text for model in "ab"] == ["红色圆形", RED]
    assert {items(suite, model)[0].prompt for model in "ab"} == {RED}
    assert suite_from(json.loads(json.dumps(to_plain(suite)))) == suite
    with pytest.raises(SettingError, match="language 'fr'"):
        suite_from({**plain, "languages": {"a": "fr"}})
    with pytest.raises(SettingError, match="0 in language 'zh'"):
        suite_from({**plain, "translations": {"zh": []}})


def test_a_suite_with_a_window_comes_back_from_json() -> None:
    suite = Suite(name="s", models=("a",), window=Window.parse("1,8,64,64"))
    assert suite_from(json.loads(json.dumps(to_plain(suite)))) == suite
    assert "--window 1,8,64,64" in suite.command
