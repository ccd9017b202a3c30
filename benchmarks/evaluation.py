"""From a run's lossless frames to numbers with intervals. Generates nothing, so it can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.fairness import multiple_comparisons, notes, paired, set_difference, through_window
from benchmarks.features.files import FeatureFiles
from benchmarks.features.instruments import Instruments, load_instruments
from benchmarks.metrics import METRICS, Metric, RefusedError, cost, diagnostics, reconstruction
from benchmarks.metrics.distances import MIN_VIDEOS, SET_METRICS
from benchmarks.runner import clip_hash, clip_names, item_hash
from benchmarks.sets import SetScore, VideoSet, score_sets
from benchmarks.statistics import GROUPS, LEVEL, RESAMPLES, by_prompt, mean_interval
from benchmarks.storage import RunFolder, load_frames, sidecars
from benchmarks.suites import Suite, items, suite_from
from shared.errors import UserError
from shared.video import Video

TRUTH = "ground truth"
CODED = "clips through the codec"


@dataclass(kw_only=True)
class Measured:
    """One row of the comparison: a value of each metric for each item, and why a metric has none.

    `values` maps metric -> item id -> value; `items` says of each item which prompt it shows, and in "pair"
    what must be equal for another row's item to be its pair; `sets` holds metrics of all videos together;
    `damaged` items have frames that cannot be read, or are not those that were written.
    """

    name: str
    metrics: dict[str, Metric] = field(default_factory=lambda: METRICS)
    sets: dict[str, SetScore] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    def frames(self, folder: Path, sidecar: dict[str, Any], name: str) -> Video | None:
        """The frames of an item; None where they are damaged, which is noted."""
        try:
            return load_frames(folder, sidecar)
        except UserError as error:
            self.damaged[name] = f"{type(error).__name__}: {error}"
            return None

    def add(self, item: dict[str, Any], family: str, measure: Callable[[], dict[str, float]]) -> None:
        """Take the values of one item, or the reason there are none."""
        self.items[item["id"]] = {name: item[name] for name in ("prompt", "prompt_index", "pair")}
        try:
            for name, value in measure().items():
                self.values.setdefault(name, {})[item["id"]] = value
        except RefusedError as reason:
            self.refused[family] = str(reason)

    def by_prompt(self, metric: str) -> dict[int, float]:
        """Mean over the videos of each prompt."""
        found = [
            (self.items[item]["prompt_index"], value) for item, value in self.values.get(metric, {}).items()
        ]
        return dict(zip(sorted({index for index, _ in found}), by_prompt(found), strict=True))

    def summary(self) -> dict[str, dict[str, Any]]:
        """Each metric with its interval over prompts and its recipe, in the metrics' own order."""
        found: dict[str, dict[str, Any]] = {}
        for name, metric in self.metrics.items():
            if self.values.get(name):
                values = [*self.by_prompt(name).values()]
                found[name] = asdict(mean_interval(values, proportion=metric.proportion))
            elif name in self.sets:
                found[name] = asdict(self.sets[name].interval())
            else:
                continue
            found[name]["recipe"] = metric.recipe_line
        return found


def evaluate(folder: RunFolder, files: FeatureFiles | None = None) -> dict[str, Any]:
    """Measure a run: the content of results.json, with per-item values under "items" and what distances of
    sets rest on under "sets". `files` are used
    instead of those that the suite names.

    Items whose frames are damaged are left out and listed under "failed". SettingError: the folder is no run.
    """
    index = folder.read_index()
    suite = suite_from({**index["suite"]})
    files = FeatureFiles.parse(suite.feature_files) if files is None else files
    tools = load_instruments(files, sets=suite.num_prompts >= MIN_VIDEOS)
    truth, true_set = measure_truth(folder, suite, tools)
    rows = {
        name: measure_model(folder, suite, name, index["models"][name], tools, true_set)
        for name in suite.models
    }
    films = {
        name: [
            sidecar
            for sidecar in finished_videos(folder, suite, name, index["models"][name])
            if f"{name}/{sidecar['id']}" not in rows[name].damaged
        ]
        for name in suite.models
    }
    seen = {name: through_window(suite, sidecars) for name, sidecars in films.items()}
    differences = paired(rows, seen, tools.metrics) + set_differences(rows, seen, tools.metrics)
    failed = index["failed"] | truth.damaged | {k: v for row in rows.values() for k, v in row.damaged.items()}
    told = [*notes(suite, rows, films, failed), *multiple_comparisons(differences)]
    return {
        "recipe": recipe(suite, index, tools.metrics),
        "models": {name: model_result(rows[name], seen[name], index["models"][name]) for name in rows},
        "references": {TRUTH: {"metrics": truth.summary()}} if truth.values else {},
        "differences": differences,
        "notes": told,
        "failed": failed,
        "skipped": tools.skipped,
        "items": {name: per_item(row) for name, row in rows.items()},
        "sets": {name: per_set(row) for name, row in rows.items()},
    }


def measure_model(
    folder: RunFolder,
    suite: Suite,
    model: str,
    described: dict[str, Any],
    tools: Instruments,
    truth: VideoSet,
) -> Measured:
    """All metrics of one model: its videos, its cost, its codec, its distances from true clips."""
    row, made = Measured(name=model, metrics=tools.metrics), VideoSet(name=model)
    for sidecar in finished_videos(folder, suite, model, described):
        video = row.frames(folder.videos(model), sidecar, f"{model}/{sidecar['id']}")
        if video is None:
            continue
        measure_look(row, made, suite, sidecar, video, tools)
        row.add(sidecar, "cost", lambda sidecar=sidecar: cost.measure(sidecar))
    if described["codec"] is None:
        row.refused[reconstruction.NAME] = "the model shows the benchmark no codec"
    coded = measure_codec(row, folder, suite, model, described, tools)
    measure_diagnostics(row, folder, suite, model, described)
    measure_sets(row, suite, (made, truth, coded), tools)
    return row


def measure_look(
    row: Measured,
    seen: VideoSet,
    suite: Suite,
    sidecar: dict[str, Any],
    video: Video,
    tools: Instruments,
) -> None:
    """What is measured of a video's frames, as seen through the suite's window."""
    try:
        look = video if suite.window is None else suite.window.look(video)
    except RefusedError as reason:
        row.refused["window"] = str(reason)
        return
    measure_video(row, sidecar, look, tools)
    seen.add(tools.nets, sidecar["prompt_index"], look)


def measure_sets(
    row: Measured, suite: Suite, sets: tuple[VideoSet, VideoSet, VideoSet], tools: Instruments
) -> None:
    """Distances of the (made, true, coded) videos; reasons are told once for each kind of metric."""
    if suite.num_prompts < MIN_VIDEOS:
        row.refused["distances between sets"] = f"needs {MIN_VIDEOS} prompts or more, got {suite.num_prompts}"
        return
    row.sets, refused = score_sets(*sets, tools.nets)
    for name, reason in refused.items():
        metric = SET_METRICS[name]
        limit = ", extrapolated" if metric.limit else ""
        against = ", against the codec's clips" if metric.reference == "codec" else ""
        row.refused.setdefault(f"{name.split('/')[0]}{limit}{against}", reason)


def set_differences(
    rows: dict[str, Measured], films: dict[str, Any], metrics: dict[str, Metric]
) -> list[dict[str, Any]]:
    """Of every two models' distances, on the same prompts."""
    return [
        set_difference(metrics[name], (a, b), rows[a].sets[name], rows[b].sets[name], (films[a], films[b]))
        for a, b in combinations(rows, 2)
        for name in SET_METRICS
        if name in rows[a].sets and name in rows[b].sets
    ]


def measure_video(row: Measured, sidecar: dict[str, Any], video: Video, tools: Instruments) -> None:
    for family, measure in tools.videos.items():
        row.add(sidecar, family, lambda measure=measure: measure(video, sidecar["prompt"]))


def measure_codec(
    row: Measured,
    folder: RunFolder,
    suite: Suite,
    model: str,
    described: dict[str, Any],
    tools: Instruments,
) -> VideoSet:
    """Values of the codec, and what it makes of the clips. Clip ids are no item ids: they get a prefix."""
    coded = VideoSet(name=CODED)
    target = folder.reconstructions(model)
    clips = {clip["id"]: clip for clip in sidecars(folder.clips, clip_names(suite)[: suite.num_clips])}
    for made in sidecars(target, list(clips)):
        clip = clips[made["id"]]
        if made["settings_hash"] == clip_hash(described["settings_hash"], clip):
            video = row.frames(target, made, f"{model}/codec/{made['id']}")
            truth = row.frames(folder.clips, clip, f"clip {clip['id']}")
            if video is None or truth is None:
                continue
            named = {**made, "id": f"clip {made['id']}", "pair": clip["frames_sha256"]}
            row.add(named, reconstruction.NAME, _reconstruction(video, truth, clip["prompt"], tools))
            if has_truth(suite):
                coded.add(tools.nets, clip["prompt_index"], video)
    return coded


def _reconstruction(
    video: Video, truth: Video, prompt: str, tools: Instruments
) -> Callable[[], dict[str, float]]:
    return lambda: reconstruction.measure(video, truth, prompt, tools.lpips)


def measure_diagnostics(
    row: Measured, folder: RunFolder, suite: Suite, model: str, described: dict[str, Any]
) -> None:
    """What the model said of the true clips while it was loaded."""
    clips = {clip["id"]: clip for clip in sidecars(folder.clips, clip_names(suite)[: suite.num_clips])}
    for said in sidecars(folder.diagnostics(model), list(clips)):
        clip = clips[said["id"]]
        if said["settings_hash"] == clip_hash(described["settings_hash"], clip):
            if said["refused"]:
                row.refused[diagnostics.NAME] = said["refused"]
            named = {**said, "id": f"diagnostic {said['id']}", "pair": clip["frames_sha256"]}
            row.add(named, diagnostics.NAME, lambda said=said: said["values"])


def has_truth(suite: Suite) -> bool:
    """Are the clips of the suite's own prompts?"""
    return isinstance(suite.prompts, str)


def measure_truth(folder: RunFolder, suite: Suite, tools: Instruments) -> tuple[Measured, VideoSet]:
    """The row to read the others by: clips of the same captions, made by the shapes world itself."""
    row, clips = Measured(name=TRUTH, metrics=tools.metrics), VideoSet(name=TRUTH)
    if has_truth(suite):
        for clip in sidecars(folder.clips, clip_names(suite)[: suite.num_prompts]):
            video = row.frames(folder.clips, clip, f"clip {clip['id']}")
            if video is not None:
                named = {**clip, "pair": clip["frames_sha256"]}
                measure_look(row, clips, suite, named, video, tools)
    return row, clips


def finished_videos(
    folder: RunFolder, suite: Suite, model: str, described: dict[str, Any]
) -> list[dict[str, Any]]:
    """Sidecars of the suite's items that were made with the settings that run.json states."""
    hashes = {item.id: item_hash(described["settings_hash"], item) for item in items(suite, model)}
    found = sidecars(folder.videos(model), list(hashes))
    return [
        {**sidecar, "pair": f"seed {sidecar['seed']}"}
        for sidecar in found
        if sidecar["settings_hash"] == hashes[sidecar["id"]]
    ]


def model_result(row: Measured, films: list[dict[str, Any]], described: dict[str, Any]) -> dict[str, Any]:
    shapes = {tuple(sorted(sidecar["video"].items())) for sidecar in films}
    return {
        "metrics": row.summary(),
        "stages": cost.stages(films),
        "refused": row.refused,
        "video": dict(shapes.pop()) if len(shapes) == 1 else None,
        "num_videos": len(films),
        **described,
    }


def recipe(suite: Suite, index: dict[str, Any], metrics: dict[str, Metric]) -> dict[str, Any]:
    """Everything that is needed to make the numbers again."""
    return {
        "suite": index["suite"],
        "command": index["command"],
        "seed": suite.seed,
        "interval": {"level": LEVEL, "method": "bootstrap percentile over prompts; Wilson at 0 or 1; "
                     "jackknife over groups of prompts for distances between sets",
                     "resamples": RESAMPLES, "groups": GROUPS, "seed": 0},
        "metrics": {name: {"id": metric.recipe_id, **asdict(metric)} for name, metric in metrics.items()},
        "environment": index["environment"],
    }  # fmt: skip


def per_set(row: Measured) -> dict[str, dict[str, Any]]:
    """Metric of a set -> what its difference from another run's value needs."""
    texts = {item["prompt_index"]: item["prompt"] for item in row.items.values()}
    return {name: score.saved(texts) for name, score in row.sets.items()}


def per_item(row: Measured) -> dict[str, dict[str, Any]]:
    """Item id -> its prompt, what pairs it, and its value of each metric."""
    return {
        item: {**said, "values": {name: v[item] for name, v in row.values.items() if item in v}}
        for item, said in row.items.items()
    }
