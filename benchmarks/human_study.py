"""Studies with people: blinded pairs on one page, the questions of both papers, and what the answers show.

The page holds everything and sends nothing: raters save their answers as a file. Who made which video is in
key.json alone, which stays with whoever runs the study. Models are shown side by side, on the same prompt and
seed; sides and order are drawn from the study's seed, for each rater's sheet anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape

from benchmarks.agreement import fleiss_kappa, krippendorff_alpha
from benchmarks.evaluation import finished_videos
from benchmarks.fairness import unlike
from benchmarks.media import film
from benchmarks.statistics import by_prompt, mean_interval
from benchmarks.storage import RunFolder, folder_name, load_frames, read_json
from benchmarks.suites import one_of, suite_from
from shared.errors import SettingError
from shared.files import atomic_path, write_json

FORMAT = 1  # of key.json and of the answers
MOST_RATERS = 1000
SIDES = ("left", "right")
PREFERENCES = {"left": 1.0, "none": 0.5, "right": 0.0}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one video; `options` maps the words on the button to the score."""

    name: str
    text: str
    options: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Form:
    """A paper's form. `total` says in words how the total is made of the scores."""

    name: str
    title: str
    questions: tuple[Question, ...]
    total: str


def _stars(name: str, text: str, most: int = 5) -> Question:
    return Question(name=name, text=text, options=tuple((str(n), float(n)) for n in range(1, most + 1)))


def _thirds(name: str, text: str) -> Question:
    return Question(name=name, text=text, options=(("0 no", 0.0), ("0.5 partly", 0.5), ("1 yes", 1.0)))


FORMS = {
    "cogvideo": Form(
        name="cogvideo",
        title="CogVideo (2022): three ratings from 1 to 5, an overall one to 10, and which is preferred",
        questions=(
            _stars("frame_texture", "Frame texture: how clear and natural is a single frame?"),
            _stars("motion_realism", "Motion realism: how natural is the movement?"),
            _stars("semantic_relevance", "Semantic relevance: how well does it show the text?"),
            _stars("overall", "Overall", 10),
        ),
        total="the overall rating, 1 to 10, as given",
    ),
    "cogvideox": Form(
        name="cogvideox",
        title="CogVideoX (2024): four parts scored 0, 0.5 or 1, and which is preferred",
        questions=(
            _thirds("sensory_quality", "Sensory quality: continuous, clear, stable, pleasant to look at?"),
            _thirds(
                "instruction_following", "Instruction following: does it show all that the text asks for?"
            ),
            _thirds("physics_simulation", "Physics simulation: do things move and touch as they would?"),
            _thirds("cover_quality", "Cover quality: would single frames make a good cover picture?"),
        ),
        # the paper's own totals do not follow from its parts, so ours is defined here
        total="5 x the mean of the four parts, at most 2 where instruction following is 0",
    ),
}


def total_of(form: str, scores: Mapping[str, float]) -> float:
    """The form's total of one rater's scores of one video."""
    if form == "cogvideo":
        return scores["overall"]
    total = 5 * float(np.mean([scores[question.name] for question in FORMS[form].questions]))
    return min(total, 2.0) if scores["instruction_following"] == 0 else total


# ---- making


def make_study(
    folder: RunFolder, target: Path, *, form: str = "cogvideo", seed: int = 0, raters: int = 1, pairs: int = 0
) -> dict[str, Any]:
    """Write TARGET/form-1.html, ... (one sheet per rater) and TARGET/key.json; returns the key.

    Every two models of the run are paired on each prompt and seed that both have; `pairs` > 0 draws so many
    of them. Raises SettingError where the run has no pairs, or where videos differ in duration, rate or size:
    that would tell raters who made them.
    """
    one_of("form", form, list(FORMS))
    if seed < 0:
        raise SettingError(f"seed must not be negative, got {seed}")
    if not 1 <= raters <= MOST_RATERS or pairs < 0:
        raise SettingError(f"raters must be 1 to {MOST_RATERS} and pairs 0 or more, got {raters} and {pairs}")
    found = find_pairs(folder)
    rng = np.random.default_rng([seed, 0])
    if pairs and pairs < len(found):
        found = [found[i] for i in sorted(rng.choice(len(found), size=pairs, replace=False))]
    for pair, number in zip(found, rng.permutation(len(found)), strict=True):
        pair["id"] = f"p{number + 1:03d}"
    key: dict[str, Any] = {"format": FORMAT, "form": form, "seed": seed, "total": FORMS[form].total}
    key["pairs"] = sorted(found, key=lambda pair: pair["id"])
    key["study"] = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    key["sheets"] = [sheet_order([p["id"] for p in key["pairs"]], seed, n) for n in range(raters)]
    films = {
        name: film(load_frames(folder.videos(model), sidecar))
        for name, model, sidecar in _films(folder, found)
    }
    for number, sheet in enumerate(key["sheets"], start=1):
        with atomic_path(target / f"form-{number}.html") as temporary:
            temporary.write_text(render_form(key, sheet, number, films), encoding="utf-8")
    write_json(target / "key.json", key)
    return key


def find_pairs(folder: RunFolder) -> list[dict[str, Any]]:
    """Every two models' videos of one item: {"prompt", "prompt_index", "item", "models"}."""
    index = folder.read_index()
    suite = suite_from({**index["suite"]})
    films = {m: finished_videos(folder, suite, m, index["models"][m]) for m in suite.models}
    found = []
    for a, b in combinations(suite.models, 2):
        if reason := unlike(films[a], films[b]):
            raise SettingError(f"{a} and {b} cannot be shown blindly: {reason}")
        there = {sidecar["id"] for sidecar in films[b]}
        found += [
            {"prompt": s["prompt"], "prompt_index": s["prompt_index"], "item": s["id"], "models": [a, b]}
            for s in films[a]
            if s["id"] in there
        ]
    if not found:
        raise SettingError(f"{folder.path} has no two models with a video of the same prompt and seed")
    return found


def sheet_order(ids: Sequence[str], seed: int, sheet: int) -> list[dict[str, Any]]:
    """The pairs as one rater sees them: order, and whether the first model is on the left."""
    rng = np.random.default_rng([seed, 1, sheet])
    return [
        {"pair": ids[i], "first_left": bool(flip)}
        for i, flip in zip(rng.permutation(len(ids)), rng.integers(0, 2, size=len(ids)), strict=True)
    ]


def _films(folder: RunFolder, pairs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    wanted = {(model, pair["item"]) for pair in pairs for model in pair["models"]}
    return [
        (f"{model}/{item}", model, read_json(folder.videos(model) / f"{item}.json"))
        for model, item in sorted(wanted)
    ]


def render_form(
    key: Mapping[str, Any], sheet: Sequence[Mapping[str, Any]], number: int, films: Mapping[str, str]
) -> str:
    """One sheet as a page that needs nothing else and names no model."""
    pairs = {pair["id"]: pair for pair in key["pairs"]}
    shown = []
    for place in sheet:
        pair = pairs[place["pair"]]
        models = pair["models"] if place["first_left"] else pair["models"][::-1]
        videos = {side: films[f"{m}/{pair['item']}"] for side, m in zip(SIDES, models, strict=True)}
        shown.append({"id": pair["id"], "prompt": pair["prompt"], "videos": videos})
    page = Environment(
        loader=PackageLoader("benchmarks"),
        autoescape=select_autoescape(default=True, default_for_string=True),
    )
    facts = {"format": FORMAT, "study": key["study"], "form": key["form"], "sheet": number}
    return page.get_template("study.html.j2").render(
        pairs=shown, form=FORMS[key["form"]], facts=facts, sides=SIDES
    )


# ---- scoring


def score_study(key: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the raters found: per model each question and the total with intervals over prompts, the share of
    prompts on which each model of a pair is preferred, and how far raters agree.

    Raises SettingError for answers of another study, a sheet answered twice by one rater, or illegal scores.
    """
    marks = [mark for answer in answers for mark in read_answers(key, answer)]
    if not marks:
        raise SettingError("nobody answered anything")
    if twice := _twice(marks):
        raise SettingError(f"rater {twice[0]!r} answered pair {twice[1]} more than once")
    form = FORMS[key["form"]]
    models = list(dict.fromkeys(model for pair in key["pairs"] for model in pair["models"]))
    return {
        "kind": "human study",
        "study": key["study"],
        "form": form.name,
        "total": form.total,
        "raters": len({mark["rater"] for mark in marks}),
        "answers": len(marks),
        "scores": {model: model_scores(form, model, marks) for model in models},
        "preferences": [preference(pair, marks) for pair in combinations(models, 2)],
        "agreement": agreement(form, marks),
    }


def read_answers(key: Mapping[str, Any], answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One file of answers, unblinded: {"rater", "pair", "prompt_index", "scores": {model: {question: score}},
    "preferred": {model: share}} for every pair that was answered in full."""
    for name in ("format", "study", "form"):
        if answer.get(name) != key[name]:
            raise SettingError(f"answers of another study: {name} is {answer.get(name)!r}, not {key[name]!r}")
    rater, number = str(answer.get("rater") or "").strip(), answer.get("sheet")
    if not rater or not isinstance(number, int) or not 1 <= number <= len(key["sheets"]):
        raise SettingError(
            f"answers need a rater and a sheet of 1..{len(key['sheets'])}, got {rater!r}, {number!r}"
        )
    left = {place["pair"]: place["first_left"] for place in key["sheets"][number - 1]}
    pairs = {pair["id"]: pair for pair in key["pairs"]}
    found = []
    for given in answer.get("answers", []):
        if given.get("pair") not in pairs:
            raise SettingError(
                f"rater {rater!r} answered pair {given.get('pair')!r}, which the study has not"
            )
        pair = pairs[given["pair"]]
        models = pair["models"] if left[pair["id"]] else pair["models"][::-1]
        found.append({"rater": rater, **pair, **_unblinded(key["form"], rater, given, models)})
    return found


def _unblinded(form: str, rater: str, given: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    scores: dict[str, dict[str, float]] = {}
    for side, model in zip(SIDES, models, strict=True):
        scores[model] = {}
        for question in FORMS[form].questions:
            score = given.get(side, {}).get(question.name)
            if score not in [value for _, value in question.options]:
                raise SettingError(
                    f"rater {rater!r}, pair {given['pair']}: {question.name} cannot be {score!r}"
                )
            scores[model][question.name] = float(score)
    said = one_of("preference", str(given.get("preference")), list(PREFERENCES))
    share = PREFERENCES[said]
    return {"scores": scores, "preferred": {models[0]: share, models[1]: 1 - share}}


def _twice(marks: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    seen: set[tuple[str, str]] = set()
    for mark in marks:
        place = (mark["rater"], mark["id"])
        if place in seen:
            return place
        seen.add(place)
    return None


def model_scores(form: Form, model: str, marks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean score of each question and of the total; raters and pairs of one prompt are averaged first."""
    own = [(mark["prompt_index"], mark["scores"][model]) for mark in marks if model in mark["scores"]]
    if not own:
        return {}
    columns = {q.name: [(i, s[q.name]) for i, s in own] for q in form.questions}
    columns["total"] = [(i, total_of(form.name, s)) for i, s in own]
    return {name: asdict(mean_interval(by_prompt(values))) for name, values in columns.items()}


def preference(models: tuple[str, str], marks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often the first is preferred to the second, no preference counting half; over prompts."""
    own = [m for m in marks if set(models) == m["scores"].keys()]
    if not own:
        return {"a": models[0], "b": models[1], "refused": "no pair of these two was answered"}
    values = by_prompt([(m["prompt_index"], m["preferred"][models[0]]) for m in own])
    return {
        "a": models[0],
        "b": models[1],
        **asdict(mean_interval(values, proportion=True)),
        "answers": len(own),
    }


def agreement(form: Form, marks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per question Krippendorff's alpha (interval scale), for preferences its nominal form and Fleiss' kappa;
    None where fewer than two raters judged the same."""
    found: dict[str, Any] = {}
    for question in form.questions:
        units: dict[tuple[str, str], list[float]] = {}
        for mark in marks:
            for model, scores in mark["scores"].items():
                units.setdefault((mark["id"], model), []).append(scores[question.name])
        found[question.name] = {"alpha": krippendorff_alpha(list(units.values()), scale="interval")}
    said: dict[str, list[float]] = {}
    for mark in marks:
        first = sorted(mark["scores"])[0]
        said.setdefault(mark["id"], []).append(mark["preferred"][first])
    nominal = krippendorff_alpha(list(said.values()), scale="nominal")
    found["preference"] = {"alpha": nominal, "kappa": fleiss_kappa(list(said.values()))}
    return found


def import_scores(
    folder: RunFolder, key: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Score a study and keep it with the run, as RUN/imported/study-ID.json."""
    scored = score_study(key, answers)
    write_json(folder.imported / f"study-{folder_name(str(key['study']))}.json", scored)
    return scored
