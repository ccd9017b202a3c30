"""The human-study page in a real browser: a whole study is clicked through, saved, and scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.human_study import FORMS, make_study, score_study
from benchmarks.storage import RunFolder, read_json
from tests.benchmarks.browser import Page, browser, wait_for

WIDE = (
    "[...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() &&"
    " e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.tagName + '.' + e.className)"
)


@pytest.fixture(scope="module")
def page(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(chromium, tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture(params=list(FORMS))
def study(request: pytest.FixtureRequest, reported: RunFolder, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path / "study"
    return folder, make_study(reported, folder, form=request.param, raters=1)


def choose(page: Page, name: str, value: object) -> None:
    """Click the answer as a person does: on its words."""
    page.run(f"""(() => {{
      const input = [...document.querySelectorAll('input[type=radio]')].find((one) =>
        one.name === {name!r} && one.value === {str(value)!r});
      input.closest('label').id = 'now';
      input.closest('label').scrollIntoView({{ block: 'center', behavior: 'instant' }});
    }})()""")
    page.click("#now")
    page.run("document.getElementById('now').removeAttribute('id')")


def state(page: Page) -> str:
    return page.run("document.getElementById('state').textContent")


def test_a_whole_study_is_clicked_through_saved_and_scored(
    page: Page, study: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The rater finds every video on the left worst and prefers the right one."""
    folder, key = study
    page.events.clear()
    page.open(folder / "form-1.html")
    page.until("[...document.querySelectorAll('video')].every((film) => film.readyState > 0)")
    page.click("section button.play")
    moving = "[...document.querySelectorAll('section:first-of-type video')].map((film) => film.currentTime)"
    page.until(f"{moving}.every((time) => time > 0.1)")
    assert abs(float.__sub__(*page.run(moving))) < 0.15  # side by side at the same moment
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    page.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    questions = FORMS[key["form"]].questions
    sheet = key["sheets"][0]
    assert state(page).startswith(f"0 of {len(sheet)}")
    page.click("button[type=submit]")  # without a name nothing is saved
    assert page.run("document.querySelector('[name=rater]').matches(':invalid')")
    page.run("document.querySelector('[name=rater]').focus()")
    page.ask("Input.insertText", text="rater one")
    for done, place in enumerate(sheet, start=1):
        for question in questions:
            choose(page, f"{place['pair']}/left/{question.name}", question.options[0][1])
            choose(page, f"{place['pair']}/right/{question.name}", question.options[-1][1])
        assert state(page).startswith(f"{done - 1} of {len(sheet)}")
        choose(page, f"{place['pair']}/preference", "right")
        assert state(page).startswith(f"{done} of {len(sheet)}")
    page.click("button[type=submit]")
    wait_for(lambda: [*downloads.glob("*.json")], "the answers are saved")
    (saved,) = downloads.glob("*.json")
    scored = score_study(key, [read_json(saved)])
    assert scored["raters"] == 1 and scored["answers"] == len(sheet)
    models = {pair["id"]: pair["models"] for pair in key["pairs"]}
    right = [models[place["pair"]][int(place["first_left"])] for place in sheet]
    preferred = scored["preferences"][0]
    assert preferred["value"] == pytest.approx(right.count(preferred["a"]) / len(right))
    assert page.requests == [(folder / "form-1.html").resolve().as_uri()] and page.complaints == []


def test_a_half_answered_study_shows_what_is_missing_and_survives_a_reload(
    page: Page, reported: RunFolder, tmp_path: Path
) -> None:
    key = make_study(reported, tmp_path, form="cogvideox", raters=1, seed=7)
    page.open(tmp_path / "form-1.html")
    first = key["sheets"][0][0]["pair"]
    page.run("document.querySelector('[name=rater]').focus()")
    page.ask("Input.insertText", text="ann")
    choose(page, f"{first}/left/sensory_quality", 0.5)
    page.ask("Browser.setDownloadBehavior", behavior="deny")
    page.click("button[type=submit]")
    pairs = len(key["sheets"][0])
    assert page.run("document.querySelectorAll('section.missing').length") == pairs
    assert page.run("document.querySelector('section.missing').getBoundingClientRect().top") < 100
    assert "not answered" in state(page)
    page.open(tmp_path / "form-1.html")
    kept = "document.querySelector('[name=rater]').value"
    page.until(f"{kept} === 'ann'")
    assert (
        page.run(f"new FormData(document.getElementById('study')).get('{first}/left/sensory_quality')")
        == "0.5"
    )

    page.click("#afresh")
    assert page.run(kept) == "" and state(page) == f"0 of {pairs} answered in full"
    page.open(tmp_path / "form-1.html")
    assert page.run(kept) == "" and page.run("document.getElementById('again').hidden")


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "light"), (360, "dark")])
def test_the_page_fits(page: Page, reported: RunFolder, tmp_path: Path, width: int, scheme: str) -> None:
    make_study(reported, tmp_path, form="cogvideo", raters=1)
    page.open(tmp_path / "form-1.html", width=width, height=740, scheme=scheme)
    page.until("document.querySelector('video').readyState > 0")
    assert page.run(WIDE) == []
    assert page.run("document.documentElement.scrollWidth") <= width
    small = (
        "[...document.querySelectorAll('label, button')].filter((e) => e.getBoundingClientRect().height < 24)"
    )
    assert page.run(f"{small}.length") == 0
