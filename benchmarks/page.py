"""The report as one page: every picture, film and plot is inside it, and it asks the network for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from benchmarks import media, plots, wording
from benchmarks.elsewhere import imported_tables
from benchmarks.evaluation import TRUTH, finished_videos
from benchmarks.expected import CPU
from benchmarks.fairness import left_out, multiple_comparisons
from benchmarks.metrics import METRICS, RefusedError
from benchmarks.metrics.prompt_accuracy import wanted_attributes
from benchmarks.published import PUBLISHED
from benchmarks.runner import clip_names
from benchmarks.storage import RunFolder, readable, sidecars
from benchmarks.suites import Suite, suite_from
from shared.clips import shapes
from shared.video import Video

TEMPLATES = Path(__file__).parent / "templates"
MAX_PROMPTS = 12  # shown as films; further ones as strips, and the numbers are over all
MAX_STRIPS = 120  # prompts
MAX_BYTES = 5_000_000  # of films and pictures, about: no further prompt is shown then
MAX_CLIPS = 3
Results = Mapping[str, Any]


def render_page(
    folder: RunFolder,
    results: Results,
    descriptions: Mapping[str, str] | None = None,
    *,
    room: int | None = None,
) -> str:
    """The HTML text of a run's report; `descriptions` adds a line on each model, `room` is for films and
    pictures, in bytes (MAX_BYTES)."""
    suite = suite_from(dict(results["recipe"]["suite"]))
    models = results["models"]
    films, strips = prompt_rows(folder, suite, models, room)
    template = environment().get_template("report.html.j2")
    return template.render(
        suite=suite,
        seeds=wording.seeds(suite),
        results=results,
        models=models,
        colours={name: f"var(--series-{index % len(plots.SERIES)})" for index, name in enumerate(models)},
        descriptions=descriptions or {},
        headline=wording.headline(results),
        prompts=films,
        strips=strips,
        num_prompts=suite.num_prompts,
        table=table_rows(results),
        recipes=results["recipe"]["metrics"],
        together=multiple_comparisons(results["differences"]),
        skipped=wording.skipped(results),
        imported=imported_tables(results),
        left_out=left_out(results["failed"]) if results["failed"] else "",
        published=PUBLISHED,
        cpu=CPU,
        columns=[*models, *results["references"]],
        clips=clip_rows(folder, suite, list(models)),
        plots=plot_columns(models),
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
    )


def environment() -> jinja2.Environment:
    """Escapes everything; unknown names are errors, not empty places."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["seconds"] = wording.seconds
    made.filters["size"] = wording.size
    made.filters["operations"] = wording.operations
    made.filters["parameters"] = wording.parameters
    made.filters["titled"] = wording.titled
    made.globals["peak"] = wording.peak
    made.globals["rate"] = wording.rate
    made.globals["counted"] = wording.counted
    made.globals["number"] = lambda name, value, sign=False: wording.number(METRICS[name], value, sign=sign)
    made.globals["span"] = lambda name, value, sign=False: wording.span(METRICS[name], value, sign=sign)
    made.globals["film_words"] = film_words
    made.globals["called"] = wording.called
    return made


def plot_columns(models: Mapping[str, Any]) -> list[list[tuple[str, Markup]]]:
    """Titles and drawings in two columns of about equal height; those without figures are left out."""
    costs = plots.quality_and_cost(models)
    titles = ("Quality against time", "The same by another measure")
    measures = list(zip(titles, costs, strict=False))
    attributes = ("What the prompt asked for", plots.attribute_bars(models))
    time = ("Where the time goes", plots.stage_timeline(models))
    memory = ("Memory along the way", plots.memory_curves(models))
    roofs = ("Work against the machine's limits", plots.roofline(models))
    left, right = [attributes, time, roofs], [*measures, memory]
    if len(measures) > 1:
        left, right = [attributes, memory, roofs], [*measures, time]
    columns = [[(words, Markup(svg)) for words, svg in column if svg] for column in (left, right)]
    return [column for column in columns if column]


def prompt_rows(
    folder: RunFolder, suite: Suite, models: Mapping[str, Any], room: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(prompts with films, further prompts with strips only), as many as the page has room for; each has its
    text and a cell of film, strip and reading for each model and the truth."""
    films: list[dict[str, Any]] = []
    strips: list[dict[str, Any]] = []
    room = MAX_BYTES if room is None else room
    for prompt, found in sidecars_by_prompt(folder, suite, models).items():
        full = len(films) < MAX_PROMPTS and not strips and (room > 0 or not films)
        if not full and (room <= 0 or len(strips) >= MAX_STRIPS):
            break
        cells = {
            name: cell(video, sidecar, full)
            for name, (place, sidecar) in found.items()
            if (video := readable(place, sidecar)) is not None  # the notes list what is damaged
        }
        (films if full else strips).append({"prompt": prompt, "cells": cells})
        room -= sum(
            len(shown.get(part) or "") for shown in cells.values() for part in ("film", "poster", "strip")
        )
    return films, strips


def sidecars_by_prompt(
    folder: RunFolder, suite: Suite, models: Mapping[str, Any]
) -> dict[str, dict[str, tuple[Path, dict[str, Any]]]]:
    """prompt -> column -> where its first video lies, and that video's sidecar."""
    found: dict[str, dict[str, tuple[Path, dict[str, Any]]]] = {}
    for model, described in models.items():
        for sidecar in finished_videos(folder, suite, model, dict(described)):
            if sidecar["sample"] == 0:
                found.setdefault(sidecar["prompt"], {})[model] = (folder.videos(model), sidecar)
    if isinstance(suite.prompts, str):
        for clip in sidecars(folder.clips, clip_names(suite)[: suite.num_prompts]):
            if clip["prompt"] in found:
                found[clip["prompt"]].setdefault(TRUTH, (folder.clips, clip))
    return found


def cell(video: Video, sidecar: Mapping[str, Any], full: bool) -> dict[str, Any]:
    shown = {
        "strip": media.picture(media.strip(video)),
        "words": film_words(sidecar["video"]),
        "seed": sidecar.get("seed"),
        "seconds": sidecar.get("seconds"),
        "marks": marks(video, sidecar["prompt"]),
    }
    if not full:
        return shown
    films = {"film": media.film(video), "poster": media.picture(media.poster(video))}
    return {**shown, **films, "width": video.width, "height": video.height, "fps": video.fps}


def film_words(video: Mapping[str, float]) -> str:
    return f"{video['frames']:g} frames, {video['width']:g} × {video['height']:g}, {video['fps']:g} fps"


def marks(video: Video, prompt: str) -> list[dict[str, Any]]:
    """What the prompt names, and whether the oracle sees it; empty for a prompt of another world."""
    try:
        wanted = wanted_attributes(prompt)
    except RefusedError:
        return []
    reading = shapes.read(video)
    seen = {name: getattr(reading, name) or "no speed" for name in wanted}
    found = [
        {"name": name, "wanted": value, "seen": seen[name], "right": seen[name] == value}
        for name, value in wanted.items()
    ]
    if not reading.valid:
        found.append({"name": "object", "wanted": "valid", "seen": "no clear shape", "right": False})
    return found


def table_rows(results: Results) -> list[dict[str, Any]]:
    """One row for each metric that anyone has: a value or a reason per column, and the differences."""
    columns = {**results["models"], **results["references"]}
    rows = []
    for name, metric in METRICS.items():
        values = {column: row["metrics"].get(name) for column, row in columns.items()}
        differences = [entry for entry in results["differences"] if entry["metric"] == name]
        if any(values.values()):
            row = {"name": name, "metric": metric, "values": values, "differences": differences}
            rows.append({**row, "sub": "/" in name and name.split("/")[0] in METRICS})
    return rows


def clip_rows(folder: RunFolder, suite: Suite, models: list[str]) -> list[dict[str, Any]]:
    """Contact sheets of ground truth above each codec's reconstruction."""
    rows = []
    for clip in sidecars(folder.clips, clip_names(suite)[: min(MAX_CLIPS, suite.num_clips)]):
        truth = readable(folder.clips, clip)
        if truth is None:
            continue
        strips = [{"name": TRUTH, "picture": media.picture(media.strip(truth))}]
        for model in models:
            for made in sidecars(folder.reconstructions(model), [clip["id"]]):
                video = readable(folder.reconstructions(model), made)
                if video is not None:
                    strips.append({"name": model, "picture": media.picture(media.strip(video))})
        if len(strips) > 1:
            rows.append({"prompt": clip["prompt"], "strips": strips})
    return rows
