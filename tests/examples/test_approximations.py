"""examples/approximations.py and examples/scaling.py: what was made is kept, exact is exact, tables say what
was measured, and what is simulated obeys its own limits."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cogvideox_diff.config import PRESETS
from cogvideox_diff.costs import transformer_parts
from shared.clips import shapes
from shared.costs import DEVICES, total_flops
from shared.errors import SettingError
from shared.video import Video

FOLDER = Path(__file__).parents[2] / "examples"
NAMES = ("approximations", "scaling")


@pytest.fixture(scope="module")
def code() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


# ---- approximations


def test_a_table_of_videos_that_are_known(
    code: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact videos are the true clips; another way darkens them, and takes half the time."""
    example, made = code.approximations, []

    def make(family: str, way: object, chosen: list) -> list[Video]:
        made.append(len(chosen))
        clips = [clip_of(example, item) for item in chosen]
        if way is example.WAYS[family][example.EXACT]:
            return clips
        return [Video(frames=clip.frames // 2, fps=clip.fps) for clip in clips]

    seconds = iter([1.0, 0.5] * 3)  # by round: exact, int8
    ways = dict(list(example.WAYS["cogvideo"].items())[:2])
    monkeypatch.setitem(example.WAYS, "cogvideo", ways)
    monkeypatch.setattr(example, "make", make)
    monkeypatch.setattr(example, "run_net", lambda *_: None)
    monkeypatch.setattr(example, "_has_torchao", lambda say: True)
    monkeypatch.setattr(example, "seconds_of", lambda run: next(seconds))
    arguments = {"prompts": 16, "num_rounds": 2, "say": lambda line: None}
    text = example.measure("cogvideo", tmp_path, **arguments)
    assert made == [16, 16]
    assert example.measure("cogvideo", tmp_path, **arguments) == text and made == [16, 16]
    exact, darker = text.splitlines()[2:]
    assert "| 1.00 (1.00 .. 1.00) | 1.000 |" in exact and exact.endswith("| 0.000 |  |")
    assert "`--quantize int8`" in darker and "| 2.00 (2.00 .. 2.00) |" in darker
    assert "+" in darker.rsplit("|", 2)[1], "further from the true clips"


def clip_of(example: SimpleNamespace, item: object) -> Video:
    suite = example.Suite(name="approximations", models=("demo",), num_prompts=16, num_clips=0)
    index = item.prompt_index  # type: ignore[attr-defined]
    caption = example.world_captions(suite, 16)[index]
    rng = example.np.random.default_rng([suite.seed, example.CLIP_STREAM, index])
    return shapes.render(shapes.draw_scene(rng, caption=caption))


def test_every_way_but_exact_says_its_flags(code: SimpleNamespace) -> None:
    for family, ways in code.approximations.WAYS.items():
        assert not ways["exact"].flags and all(way.flags for name, way in ways.items() if name != "exact"), (
            family
        )


def test_speed_ratios(code: SimpleNamespace) -> None:
    found = code.approximations.speed_ratio([2.0, 4.0, 2.0], [1.0, 2.0, 1.0])
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    assert code.approximations.speed_ratio([1.0], []) is None


def test_pages_keep_what_stands_around(code: SimpleNamespace, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    first, last = (mark.format("x") for mark in code.approximations.MARKS)
    page.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    for text in ("new", "newer"):
        code.approximations.write_page(page, "x", text)
        assert page.read_text() == f"before\n{first}\n\n{text}\n\n{last}\nafter\n"
    with pytest.raises(SettingError, match="lacks the marks"):
        code.approximations.write_page(page, "y", "new")


@pytest.mark.parametrize(
    ("name", "tables"),
    [("approximations", ["cogvideox", "cogvideo"]), ("scaling", ["measured", "simulated"])],
)
def test_the_documents_have_the_marks(code: SimpleNamespace, name: str, tables: list[str]) -> None:
    text = (FOLDER.parent / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for table in tables:
        assert all(mark.format(table) in text for mark in code.approximations.MARKS)


# ---- scaling


def test_ranks_together_do_all_the_work(code: SimpleNamespace) -> None:
    config = PRESETS["cogvideox-5b"]().transformer
    grid = (13, 30, 45)
    parts = transformer_parts(config, grid, 1, 2)
    whole = total_flops(parts)
    assert total_flops(code.scaling.on_one_of(parts, config, grid, 1)) == whole
    for degree in (2, 4, 8, 16, 48):
        own = total_flops(code.scaling.on_one_of(parts, config, grid, degree))
        assert 0.999999 * whole / degree < own < 1.2 * whole / degree + 0.03 * whole
    uneven = code.scaling.on_one_of(
        parts, PRESETS["cogvideox-2b"]().transformer, grid, 4
    )  # 30 heads: 8, 8, 7, 7
    shares = [b.flops / a.flops for a, b in zip(parts, uneven, strict=True) if a.kind == "attention"]
    assert shares == pytest.approx([8 / 30] * len(shares), rel=1e-6)


def test_more_gpus_are_quicker_and_never_perfect(code: SimpleNamespace) -> None:
    device = DEVICES["h100"]
    one, eight, many = (code.scaling.simulated("cogvideox-5b", device, gpus) for gpus in (1, 8, 64))
    assert one.speedup == 1 and one.exchanging == 0
    assert 1 < eight.speedup < 8 and eight.speedup < many.speedup < 64
    assert eight.exchanging < many.exchanging < 1
    assert many.videos_per_hour == pytest.approx(64 * one.videos_per_hour)
    text = code.scaling.simulated_table([one, eight, many])
    assert text.startswith("**Simulated from the cost model, not measured.**")


def test_exchanges(code: SimpleNamespace) -> None:
    """By hand: two ranks send half of four times their own tokens' width in every layer."""
    config, grid = code.scaling.NET, (5, 8, 12)
    sent = config.num_layers * 512 * 2 * 4 * (480 + config.text_len) / 2 / 2
    assert code.scaling.exchange_seconds(config, grid, 1) == 0
    assert code.scaling.exchange_seconds(config, grid, 2) == pytest.approx(sent / code.scaling.NODE_LINK)
    inside, outside = (code.scaling.exchange_seconds(config, grid, n) for n in (8, 16))
    assert outside > inside / 2


def test_a_measured_row_and_its_plot(
    code: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = code.scaling
    monkeypatch.setattr(
        scaling, "sizes", lambda: [("frames", "1", (1, 2, 2), 1), ("frames", "5", (2, 2, 2), 1)]
    )
    torch.set_num_threads(1)
    device = DEVICES["l4"]
    rows = scaling.denoising(1, device)
    assert [row.size for row in rows] == ["1", "5"] and all(row.seconds > 0 < row.predicted for row in rows)
    text = scaling.measured_table(rows, device)
    assert "| step: frames | 1 |" in text and text.splitlines()[4].endswith("| 1.00 | 1.00 |")
    scaling.draw(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"
