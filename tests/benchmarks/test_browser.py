"""The report in a real browser: it plays, obeys keys, fits a phone, and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.storage import RunFolder
from tests.benchmarks.browser import Page, browser

TIMES = "[...document.querySelectorAll('video')].slice(0, 3).map((film) => film.currentTime)"
READY = "[...document.querySelectorAll('video')].slice(0, 3).every((film) => film.readyState > 1)"
PLAYS = "document.getElementById('play').textContent === 'Pause'"
SHOW_FILMS = """new Promise((done) => {
  document.querySelectorAll("details").forEach((drawer) => { drawer.open = false; });
  document.activeElement.blur();
  document.getElementById("videos").scrollIntoView({ behavior: "instant" });
  setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 50);
})"""  # two frames: the page learns between them which films are in view


@pytest.fixture(scope="module")
def page(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(chromium, tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture(scope="module")
def opened(page: Page, reported: RunFolder) -> Page:
    """The page of a finished run, whose films began by themselves."""
    page.open(reported.path / "report.html")
    page.until(READY)
    page.run(SHOW_FILMS)
    page.until(f"{PLAYS} && {TIMES}.some((time) => time > 0)")
    return page


@pytest.fixture
def report(opened: Page) -> Page:
    """The same with its films in view, stopped at the start."""
    opened.run(SHOW_FILMS)
    opened.press("Home")
    opened.until(f"!({PLAYS}) && {TIMES}.every((time) => time === 0)")
    return opened


def test_films_play_together(report: Page) -> None:
    assert report.run(TIMES) == [0, 0, 0]
    report.click("#play")
    report.until(f"{TIMES}.every((time) => time > 0.3)")
    report.click("#play")
    report.until("[...document.querySelectorAll('video')].every((film) => film.paused)")
    moments = report.run(TIMES)
    assert max(moments) - min(moments) < 0.13
    assert report.complaints == []


def test_it_asks_for_its_own_file_only(report: Page, reported: RunFolder) -> None:
    report.run("document.querySelectorAll('details').forEach((drawer) => { drawer.open = true; })")
    report.run("window.scrollTo(0, document.body.scrollHeight)")
    assert report.requests == [(reported.path / "report.html").resolve().as_uri()]
    assert report.complaints == []


@pytest.mark.slow
def test_the_demo_from_the_command_line_plays(
    chromium: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run demo`, again, `report`: real weights of both families, and the page as a reader opens it."""
    run = tmp_path / "run"
    words = ["run", "demo", "--num_prompts", "2", "--num_clips", "1", "--output_path", str(run), "--quiet"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(words) == 0 and "nothing to do" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    with browser(chromium, tmp_path / "chromium") as page:
        page.open(run / "report.html")
        page.until(READY)
        page.run(SHOW_FILMS)
        page.until(f"{PLAYS} && {TIMES}.some((time) => time > 0)")
        assert page.requests == [(run / "report.html").resolve().as_uri()] and page.complaints == []


def test_keys_play_and_step(report: Page) -> None:
    for _ in range(3):
        report.press("ArrowRight")
    report.until(f"{TIMES}.every((time) => Math.abs(time - 3 / 8) < 0.01)")
    report.press("ArrowLeft")
    report.until(f"{TIMES}.every((time) => Math.abs(time - 2 / 8) < 0.01)")
    report.press(" ")
    report.until(PLAYS)
    report.press(" ")
    assert not report.run(PLAYS)
    assert report.run("window.scrollY") > 0  # Home went to the films' start, not to the page's


def test_keys_leave_focused_controls_alone(report: Page) -> None:
    report.run("document.querySelector('details.recipe summary').focus({preventScroll: true})")
    report.press(" ")
    assert not report.run(PLAYS)
    assert report.run("document.querySelector('details.recipe').open")


def test_the_slider_seeks_all_films(report: Page) -> None:
    report.run(
        "(() => { const time = document.getElementById('time'); time.value = 500;"
        " time.dispatchEvent(new Event('input')); })()"
    )
    report.until(f"{TIMES}.every((time) => Math.abs(time - 17 / 16) < 0.08)")
    assert report.run("document.getElementById('time').getAttribute('aria-valuetext')") == "1.1 s"


def test_everything_that_can_be_pressed_has_a_name(report: Page) -> None:
    nameless = (
        "[...document.querySelectorAll('button, input, summary, a, video, [tabindex]')].filter((e) =>"
        " !(e.getAttribute('aria-label') || e.textContent).trim()).map((e) => e.outerHTML)"
    )
    assert report.run(nameless) == []


def test_it_prints_pictures_instead_of_films(report: Page) -> None:
    report.ask("Emulation.setEmulatedMedia", media="print")
    assert report.run(
        "[...document.querySelectorAll('video, .transport')].every((e) => !e.checkVisibility())"
    )
    assert report.run("[...document.querySelectorAll('.prompt .strip')].every((e) => e.checkVisibility())")
    paper = report.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"]
    report.ask("Emulation.setEmulatedMedia", media="screen")
    assert len(paper) > 10_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(page: Page, reported: RunFolder, scheme: str) -> None:
    page.open(reported.path / "report.html", width=360, height=700, scheme=scheme)
    page.run("document.querySelectorAll('details').forEach((drawer) => { drawer.open = true; })")
    wide = (
        "[...document.querySelectorAll('main *:not(.scroll *, pre *, svg *)')].filter((e) =>"
        " e.checkVisibility() && e.getBoundingClientRect().right > 361 && e.scrollWidth > 0)"
        ".map((e) => e.tagName + '.' + e.className)"
    )
    assert page.run(wide) == []
    assert page.run("document.documentElement.scrollWidth") <= 360
    assert page.run(CONTRAST) >= 4.5


CONTRAST = """(() => {
  const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number)
    .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratios = [...document.querySelectorAll('p, small, h3, dt, li, .wrong')]
    .map((e) => light(getComputedStyle(e).color))
    .map((ink) => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05));
  return Math.min(...ratios);
})()"""


def test_a_page_without_videos_does_not_complain(page: Page, tmp_path: Path, reported: RunFolder) -> None:
    text = (reported.path / "report.html").read_text(encoding="utf-8")
    start, end = text.index('<div class="transport"'), text.index('<section aria-labelledby="plots"')
    (tmp_path / "empty.html").write_text(text[:start] + "</section>" + text[end:], encoding="utf-8")
    page.events.clear()
    page.open(tmp_path / "empty.html")
    page.press(" ")
    assert page.complaints == []
