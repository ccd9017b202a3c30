"""Blinded pairs: nothing on the page tells who made what, and answers come back to the right model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.agreement import fleiss_kappa, krippendorff_alpha
from benchmarks.human_study import FORMS, make_study, score_study, total_of
from benchmarks.runner import run_suite
from benchmarks.storage import RunFolder, read_json
from benchmarks.suites import Suite
from shared.errors import SettingError
from tests.benchmarks.conftest import Models


def answers(key: dict[str, Any], sheet: int, rater: str, best: str = "good") -> dict[str, Any]:
    """A rater who gives the model `best` all there is to give, and the other the least."""
    pairs, given = {pair["id"]: pair for pair in key["pairs"]}, []
    for place in key["sheets"][sheet - 1]:
        models = pairs[place["pair"]]["models"]
        models = models if place["first_left"] else models[::-1]
        sides = {
            side: {q.name: q.options[-1 if model == best else 0][1] for q in FORMS[key["form"]].questions}
            for side, model in zip(("left", "right"), models, strict=True)
        }
        given.append({"pair": place["pair"], "preference": "left" if models[0] == best else "right", **sides})
    facts = {name: key[name] for name in ("format", "study", "form")}
    return {**facts, "sheet": sheet, "rater": rater, "answers": given}


@pytest.mark.parametrize("form", list(FORMS))
def test_the_page_is_whole_and_blind(reported: RunFolder, tmp_path: Path, form: str) -> None:
    key = make_study(reported, tmp_path, form=form, raters=2)
    for number in (1, 2):
        page = (tmp_path / f"form-{number}.html").read_text(encoding="utf-8")
        plain = re.sub(r"data:video/mp4;base64,[\w+/=]+", "", page)
        assert page.count("data:video/mp4") == 2 * len(key["pairs"]) == 6
        assert not re.search(r"\b(good|poor)\b", plain.replace("good cover", "")) and "http" not in plain
        for question in FORMS[form].questions:
            assert plain.count(f'/{question.name}"') == 2 * len(key["pairs"]) * len(question.options)
    assert read_json(tmp_path / "key.json") == json.loads(json.dumps(key))


def test_order_and_sides_are_drawn_from_the_seed(reported: RunFolder, tmp_path: Path) -> None:
    keys = [make_study(reported, tmp_path, seed=seed, raters=8) for seed in (1, 1, 2)]
    assert keys[0] == keys[1] and keys[0]["sheets"] != keys[2]["sheets"]
    sides = [place["first_left"] for sheet in keys[0]["sheets"] for place in sheet]
    assert 0.2 < sum(sides) / len(sides) < 0.8
    assert len({json.dumps(sheet) for sheet in keys[0]["sheets"]}) > 1
    assert len(make_study(reported, tmp_path, pairs=2)["pairs"]) == 2


@pytest.mark.parametrize("form", list(FORMS))
def test_answers_come_back_to_the_right_model(reported: RunFolder, tmp_path: Path, form: str) -> None:
    key = make_study(reported, tmp_path, form=form, raters=3)
    found = score_study(key, [answers(key, n, f"rater {n}") for n in (1, 2, 3)])
    most = {q.name: q.options[-1][1] for q in FORMS[form].questions}
    assert {n: c["value"] for n, c in found["scores"]["good"].items() if n != "total"} == most
    least = {q.name: q.options[0][1] for q in FORMS[form].questions}
    assert {n: c["value"] for n, c in found["scores"]["poor"].items() if n != "total"} == least
    chosen = found["preferences"][0]
    assert (chosen["a"], chosen["value"], chosen["n"], chosen["answers"]) == ("good", 1.0, 3, 9)
    assert chosen["low"] < 1.0 and found["raters"] == 3
    assert all(found["agreement"][q]["alpha"] == 1.0 for q in most)


def test_totals_are_defined_exactly() -> None:
    parts = [question.name for question in FORMS["cogvideox"].questions]
    assert total_of("cogvideox", dict.fromkeys(parts, 1.0)) == 5.0
    assert total_of("cogvideox", dict.fromkeys(parts, 1.0) | {"instruction_following": 0.0}) == 2.0
    assert total_of("cogvideox", dict.fromkeys(parts, 0.5)) == 2.5
    assert total_of("cogvideo", {"overall": 7.0}) == 7.0


def test_answers_that_do_not_belong_are_refused(reported: RunFolder, tmp_path: Path) -> None:
    key = make_study(reported, tmp_path, raters=1)
    good = answers(key, 1, "a")
    for change, reason in (
        ({"study": "other"}, "another study"),
        ({"rater": " "}, "need a rater"),
        ({"sheet": 2}, "sheet of 1..1"),
        ({"answers": [{"pair": "p999"}]}, "which the study has not"),
        ({"answers": [good["answers"][0] | {"left": {"frame_texture": 6}}]}, "cannot be"),
        ({"answers": [good["answers"][0] | {"preference": "both"}]}, "preference"),
        ({"answers": []}, "nobody answered"),
    ):
        with pytest.raises(SettingError, match=reason):
            score_study(key, [{**good, **change}])
    with pytest.raises(SettingError, match="more than once"):
        score_study(key, [good, good])


def test_unlike_videos_cannot_be_shown_blindly(
    suite: Suite, folder: RunFolder, models: Models, tmp_path: Path
) -> None:
    models["poor"].fps = 4.0
    run_suite(suite, folder, build=models.__getitem__, quiet=True)
    with pytest.raises(SettingError, match="cannot be shown blindly"):
        make_study(folder, tmp_path)


def test_the_verb_makes_and_scores(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(finished_run.path), tmp_path / "study"
    assert main(["study", "make", run, "--output_path", str(out), "--raters", "2"]) == 0
    key = read_json(out / "key.json")
    files = [tmp_path / f"{n}.json" for n in (1, 2)]
    for n, file in enumerate(files, start=1):
        file.write_text(json.dumps(answers(key, n, f"r{n}")), encoding="utf-8")
    assert main(["study", "score", run, *map(str, files), "--key", str(out / "key.json")]) == 0
    said = capsys.readouterr().out
    assert "good preferred to poor: 100%" in said and "agreement on overall: alpha 1.00" in said
    assert read_json(finished_run.imported / f"study-{key['study']}.json")["answers"] == 6


def test_alpha_against_published_examples() -> None:
    """Krippendorff 2011, "Computing Krippendorff's alpha-reliability", example C: four observers."""
    rows = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[float(v) for v in column if v is not None] for column in zip(*rows, strict=True)]
    assert krippendorff_alpha(units, scale="nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, scale="interval") == pytest.approx(0.849, abs=5e-4)


def test_kappa_against_its_published_example() -> None:
    """Ten subjects, fourteen raters, five categories: the worked example that is told with Fleiss 1971."""
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    units = [[float(c) for c, n in enumerate(row) for _ in range(n)] for row in table]
    assert fleiss_kappa(units) == pytest.approx(0.210, abs=5e-4)


def test_agreement_that_cannot_be_known_is_none() -> None:
    assert krippendorff_alpha([[1.0], [2.0]]) is None and krippendorff_alpha([[1.0, 1.0]]) is None
    assert fleiss_kappa([[1.0, 2.0], [1.0]]) is None and fleiss_kappa([[1.0, 1.0]]) is None
    assert krippendorff_alpha([[0.0, 1.0], [1.0, 0.0]]) == pytest.approx(-0.5)
