"""Videos written and read back, broken files, and pictures of videos."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from PIL import Image

from shared.errors import OutputPathError, SettingError, UserError
from shared.video import Video
from shared.video_io import read_image, read_video, write_video

RED, BLUE = (220, 40, 40), (40, 75, 230)


def moving(num_frames: int = 9, height: int = 32, width: int = 48, fps: float = 8) -> Video:
    """A blue square of 16 pixels that steps by 2 over red."""
    frames = torch.empty(num_frames, height, width, 3, dtype=torch.uint8)
    frames[:] = torch.tensor(RED, dtype=torch.uint8)
    for i in range(num_frames):
        frames[i, 4:20, 2 * i % 30 : 2 * i % 30 + 16] = torch.tensor(BLUE, dtype=torch.uint8)
    return Video(frames=frames, fps=fps)


def noise(num_frames: int, height: int, width: int, fps: float = 8) -> Video:
    shape, rng = (num_frames, height, width, 3), torch.Generator().manual_seed(0)
    return Video(frames=torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng), fps=fps)


RATES = [8, 10, 16, 30, 2.5, 24000 / 1001, 30000 / 1001]


@pytest.mark.parametrize("name", ["a.mkv", "folder"])
@pytest.mark.parametrize("fps", RATES)
def test_lossless_formats_give_back_every_value_also_of_odd_sizes(tmp_path, name, fps):
    video = noise(5, 33, 47, fps)
    back = read_video(write_video(video, tmp_path / name))
    assert back.frames.equal(video.frames) and back.fps == pytest.approx(fps, rel=1e-6)


CLIPS = [(1, 8), (2, 16), (33, 10), (49, 8), (17, 2.5), (9, 30000 / 1001)]


@pytest.mark.parametrize(("num_frames", "fps"), CLIPS)
def test_mp4_keeps_count_rate_and_colours(tmp_path, num_frames, fps):
    video = moving(num_frames, fps=fps)
    back = read_video(write_video(video, tmp_path / "a.mp4"))
    assert back.num_frames == num_frames and back.fps == pytest.approx(fps, rel=1e-6)
    for i in (0, num_frames - 1):
        left = 2 * i % 30
        assert (back.frames[i, 28, 44].int() - torch.tensor(RED)).abs().max() <= 4
        assert (back.frames[i, 12, left + 8].int() - torch.tensor(BLUE)).abs().max() <= 4


def test_mp4_is_plain_h264_with_its_index_in_front(tmp_path):
    path = write_video(moving(), tmp_path / "a.mp4")
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.profile in ("High", "Main", "Constrained Baseline")
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_quality_orders_error_and_size(tmp_path):
    video = moving(17)
    video.frames[:] = (video.frames.float() * 0.8 + noise(17, 32, 48).frames * 0.2).to(torch.uint8)
    paths = [write_video(video, tmp_path / f"{q}.mp4", quality=q) for q in (0, 5, 10)]
    errors = [(read_video(path).frames.float() - video.frames.float()).abs().mean() for path in paths]
    assert errors[0] > errors[1] > errors[2]
    assert paths[0].stat().st_size < paths[1].stat().st_size < paths[2].stat().st_size


@pytest.mark.parametrize("num_frames", [1, 2, 33])
@pytest.mark.parametrize("fps", [8, 10, 16, 24, 2.5, 50])
def test_gif_keeps_count_rate_and_few_colours_exactly(tmp_path, num_frames, fps):
    video = moving(num_frames, fps=fps)
    back = read_video(write_video(video, tmp_path / "a.gif"))
    assert back.frames.equal(video.frames)
    assert back.fps == pytest.approx(fps, rel=1e-6 if num_frames > 2 else 0.2)


def test_gif_delays_alternate_so_that_the_mean_is_right(tmp_path):
    path = write_video(moving(33, fps=8), tmp_path / "a.gif")
    with Image.open(path) as image:
        delays = []
        for i in range(image.n_frames):
            image.seek(i)
            delays.append(image.info["duration"])
    assert set(delays) == {120, 130} and abs(sum(delays) - 33 * 125) <= 5


def test_gif_keeps_frames_that_repeat(tmp_path):
    video = moving(9)
    video.frames[:] = video.frames[:1].clone()
    assert read_video(write_video(video, tmp_path / "a.gif")).num_frames == 9


def test_gif_refuses_rates_that_viewers_slow_down(tmp_path):
    with pytest.raises(SettingError, match="at most 50 frames per second, got 60"):
        write_video(moving(fps=60), tmp_path / "a.gif")


def test_odd_sizes_are_never_changed_silently(tmp_path):
    video = moving(3, 33, 47)
    with pytest.raises(SettingError, match="got 33x47; nearest: 32x46 or 34x48; odd='pad'"):
        write_video(video, tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())
    back = read_video(write_video(video, tmp_path / "a.mp4", odd="pad"))
    assert (back.height, back.width) == (34, 48)
    assert (back.frames[:, 33].int() - back.frames[:, 32].int()).abs().max() <= 12


def test_illegal_choices_are_named(tmp_path):
    with pytest.raises(SettingError, match=r"unknown video format '.avi'; legal: .mp4, .mkv, .gif"):
        write_video(moving(), tmp_path / "a.avi")
    with pytest.raises(SettingError, match="odd must be 'error' or 'pad', got 'crop'"):
        write_video(moving(), tmp_path / "a.mp4", odd="crop")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="quality must be a whole number"):
        write_video(moving(), tmp_path / "a.mp4", quality=11)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.gif", "folder"])
def test_nothing_is_overwritten_unasked_and_nothing_temporary_stays(tmp_path, name):
    path = write_video(moving(5), tmp_path / "new" / name)
    with pytest.raises(OutputPathError, match="already exists"):
        write_video(moving(9), path)
    assert read_video(path).num_frames == 5
    assert read_video(write_video(moving(9), path, overwrite=True)).num_frames == 9
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_a_folder_of_other_files_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputPathError, match="files that are not frames"):
        write_video(moving(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputPathError, match="cannot write") as caught:
        write_video(moving(), tmp_path / "file" / "a.mp4")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputPathError, match="Permission denied"):
        write_video(moving(), tmp_path / "a.mp4")


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_video(moving(5), tmp_path / "a.mkv")

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VideoFrame, "from_ndarray", broken)
    with pytest.raises(OutputPathError, match="No space left on device"):
        write_video(moving(9), path, overwrite=True)
    assert read_video(path).num_frames == 5 and len(list(tmp_path.iterdir())) == 1


# ---- reading


def write_with(path: Path, codec: str, pixel_format: str, frames: list[VideoFrame]) -> Path:
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pixel_format
        for i, frame in enumerate(frames):
            frame.pts, frame.time_base = i, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_a_window_of_frames(tmp_path):
    video = noise(9, 16, 16)
    for name in ("a.mkv", "folder"):
        path = write_video(video, tmp_path / name)
        assert read_video(path, start=2, max_frames=3).frames.equal(video.frames[2:5])
        assert read_video(path, start=7).frames.equal(video.frames[7:])
        with pytest.raises(UserError, match="no frames from 9 on"):
            read_video(path, start=9)
        with pytest.raises(SettingError, match="start must be"):
            read_video(path, start=-1)


def test_alpha_is_laid_over_black(tmp_path):
    rgba = np.full((16, 16, 4), (200, 100, 50, 255), np.uint8)
    rgba[:8, :, 3], rgba[8:12, :, 3] = 0, 128
    path = write_with(tmp_path / "a.mkv", "ffv1", "bgra", [VideoFrame.from_ndarray(rgba, format="rgba")] * 1)
    frame = read_video(path).frames[0]
    assert frame[0, 0].tolist() == [0, 0, 0] and frame[15, 0].tolist() == [200, 100, 50]
    assert frame[9, 0].tolist() == [100, 50, 25]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png").int() - frame.int()).abs().max() <= 1


def test_ten_bits_become_eight(tmp_path):
    pixels = [VideoFrame.from_ndarray(frame.numpy(), format="rgb24") for frame in moving(3).frames]
    frames = [frame.reformat(format="yuv420p10le") for frame in pixels]
    video = read_video(write_with(tmp_path / "a.mkv", "ffv1", "yuv420p10le", frames))
    assert (video.frames[0, 28, 44].int() - torch.tensor(RED)).abs().max() <= 3


def test_a_rotation_flag_is_applied(tmp_path):
    upright = write_video(moving(3), tmp_path / "a.mp4")
    words = [0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000]
    turned = [0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000]  # a phone held upright: show turned clockwise
    old, new = (
        b"".join(word.to_bytes(4, "big", signed=True) for word in matrix) for matrix in (words, turned)
    )
    data, place = upright.read_bytes(), upright.read_bytes().index(b"tkhd")
    (tmp_path / "b.mp4").write_bytes(data[:place] + data[place:].replace(old, new, 1))
    expected = read_video(upright).frames.rot90(-1, (1, 2))
    assert read_video(tmp_path / "b.mp4").frames.equal(expected)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.gif"])
def test_broken_files_are_named(tmp_path, name):
    data = write_video(noise(9, 32, 32), tmp_path / name).read_bytes()
    for what, content in {"empty": b"", "text": b"no video at all", "head": data[:40]}.items():
        path = tmp_path / f"{what}-{name}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=path.name) as caught:
            read_video(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"absent\.mp4: No such file"):
        read_video(tmp_path / "absent.mp4")


def test_a_truncated_mp4_is_an_error_not_a_shorter_video(tmp_path):
    data = write_video(noise(9, 32, 32), tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError, match=r"cannot read the video .*cut\.mp4"):
        read_video(tmp_path / "cut.mp4")


def test_folders_need_a_rate_equal_sizes_and_frames(tmp_path):
    path = write_video(noise(3, 8, 8), tmp_path / "f")
    (path / "video.json").write_text("{}")
    with pytest.raises(UserError, match="does not tell the frame rate"):
        read_video(path)
    (path / "video.json").unlink()
    with pytest.raises(UserError, match=r"has no video.json"):
        read_video(path)
    assert read_video(path, fps=12).fps == 12
    Image.new("RGB", (9, 8)).save(path / "frame_000003.png")
    with pytest.raises(UserError, match=r"differ in size: \[\(8, 8\), \(8, 9\)\]"):
        read_video(path, fps=12)
    (path / "frame_000003.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read the image .*frame_000003.png"):
        read_video(path, fps=12)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no frames"):
        read_video(tmp_path / "empty", fps=8)


def test_images_in_other_modes(tmp_path):
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "grey16.png")
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "grey16.png").unique().tolist() == [128]
    assert read_image(tmp_path / "grey.png").unique().tolist() == [77]
    assert read_image(tmp_path / "palette.png").shape == (4, 4, 3)


def test_an_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(noise(1, 8, 12).frames[0].numpy())
    exif = image.getexif()
    exif[0x0112] = 6  # show turned clockwise
    image.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").equal(noise(1, 8, 12).frames[0].rot90(-1, (0, 1)))
