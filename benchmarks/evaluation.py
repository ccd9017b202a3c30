"""From a run's lossless frames to numbers with intervals. Generates nothing, so it can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.fairness import notes, paired
from benchmarks.metrics import METRICS, VIDEO_METRICS, RefusedError, cost, reconstruction
from benchmarks.runner import clip_hash, clip_names, item_hash
from benchmarks.statistics import LEVEL, RESAMPLES, by_prompt, mean_interval
from benchmarks.storage import RunFolder, load_frames, sidecars
from benchmarks.suites import Suite, items, suite_from
from shared.video import Video

TRUTH = "ground truth"


@dataclass(kw_only=True)
class Measured:
    """One row of the comparison: a value of each metric for each item, and why a metric has none.

    `values` maps metric -> item id -> value; `items` says of each item which prompt it shows, and in "pair"
    what must be equal for another row's item to be its pair.
    """

    name: str
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

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
        return {
            name: {
                **asdict(mean_interval([*self.by_prompt(name).values()], proportion=metric.proportion)),
                "recipe": metric.recipe_line,
            }
            for name, metric in METRICS.items()
            if self.values.get(name)
        }


def evaluate(folder: RunFolder) -> dict[str, Any]:
    """Measure a run: the content of results.json, with per-item values under "items".

    Raises SettingError when the folder is no run or frames are not those of their sidecar.
    """
    index = folder.read_index()
    suite = suite_from({**index["suite"]})
    rows = {name: measure_model(folder, suite, name, index["models"][name]) for name in suite.models}
    films = {name: finished_videos(folder, suite, name, index["models"][name]) for name in suite.models}
    truth = measure_truth(folder, suite)
    return {
        "recipe": recipe(suite, index),
        "models": {name: model_result(rows[name], films[name], index["models"][name]) for name in rows},
        "references": {TRUTH: {"metrics": truth.summary()}} if truth.values else {},
        "differences": paired(rows, films),
        "notes": notes(suite, rows, films, index["failed"]),
        "items": {name: per_item(row) for name, row in rows.items()},
    }


def measure_model(folder: RunFolder, suite: Suite, model: str, described: dict[str, Any]) -> Measured:
    """All metrics of one model: its videos, its cost, its codec."""
    row = Measured(name=model)
    for sidecar in finished_videos(folder, suite, model, described):
        measure_video(row, sidecar, load_frames(folder.videos(model), sidecar))
        row.add(sidecar, "cost", lambda sidecar=sidecar: cost.measure(sidecar))
    if described["codec"] is None:
        row.refused[reconstruction.NAME] = "the model shows the benchmark no codec"
    measure_codec(row, folder, suite, model, described)
    return row


def measure_video(row: Measured, sidecar: dict[str, Any], video: Video) -> None:
    for family, measure in VIDEO_METRICS.items():
        row.add(sidecar, family, lambda measure=measure: measure(video, sidecar["prompt"]))


def measure_codec(
    row: Measured, folder: RunFolder, suite: Suite, model: str, described: dict[str, Any]
) -> None:
    """Clip ids are not item ids, so they get a prefix."""
    target = folder.reconstructions(model)
    clips = {clip["id"]: clip for clip in sidecars(folder.clips, clip_names(suite)[: suite.num_clips])}
    for made in sidecars(target, list(clips)):
        clip = clips[made["id"]]
        if made["settings_hash"] == clip_hash(described["settings_hash"], clip):
            video, truth = load_frames(target, made), load_frames(folder.clips, clip)
            named = {**made, "id": f"clip {made['id']}", "pair": clip["frames_sha256"]}
            row.add(named, reconstruction.NAME, _reconstruction(video, truth, clip["prompt"]))


def _reconstruction(video: Video, truth: Video, prompt: str) -> Callable[[], dict[str, float]]:
    return lambda: reconstruction.measure(video, truth, prompt)


def measure_truth(folder: RunFolder, suite: Suite) -> Measured:
    """The row to read the others by: clips of the same captions, made by the shapes world itself."""
    row = Measured(name=TRUTH)
    if isinstance(suite.prompts, str):
        for clip in sidecars(folder.clips, clip_names(suite)[: suite.num_prompts]):
            measure_video(row, {**clip, "pair": clip["frames_sha256"]}, load_frames(folder.clips, clip))
    return row


def finished_videos(
    folder: RunFolder, suite: Suite, model: str, described: dict[str, Any]
) -> list[dict[str, Any]]:
    """Sidecars of the suite's items that were made with the settings that run.json states."""
    hashes = {item.id: item_hash(described["settings_hash"], item) for item in items(suite)}
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


def recipe(suite: Suite, index: dict[str, Any]) -> dict[str, Any]:
    """Everything that is needed to make the numbers again."""
    return {
        "suite": index["suite"],
        "command": index["command"],
        "seed": suite.seed,
        "interval": {"level": LEVEL, "method": "bootstrap percentile over prompts; Wilson at 0 or 1",
                     "resamples": RESAMPLES, "seed": 0},
        "metrics": {name: {"id": metric.recipe_id, **asdict(metric)} for name, metric in METRICS.items()},
        "environment": index["environment"],
    }  # fmt: skip


def per_item(row: Measured) -> dict[str, dict[str, Any]]:
    """Item id -> its prompt, what pairs it, and its value of each metric."""
    return {
        item: {**said, "values": {name: v[item] for name, v in row.values.items() if item in v}}
        for item, said in row.items.items()
    }
