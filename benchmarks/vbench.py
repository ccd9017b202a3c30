"""To VBench and back: a run's videos under the names that it reads, and its results beside our own numbers.

VBench reads `PROMPT-INDEX.mp4`, five samples of a prompt (25 for temporal flickering). Videos of five seconds
and more belong to its Long branch, whose scores do not compare with those of the short one. Only some of its
dimensions take prompts that are not its own. Its code is not part of this project: run it where it is
installed, then import the JSON that it writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.evaluation import finished_videos
from benchmarks.storage import RunFolder, folder_name, load_frames, read_json
from benchmarks.suites import one_of, suite_from
from shared.errors import SettingError
from shared.files import write_json
from shared.video_io import write_video

LONG_FROM = 5.0  # seconds
SAMPLES, FLICKER_SAMPLES = 5, 25
LONGEST_NAME = 255  # bytes of a file name on most systems
QUALITY = 10  # of the mp4: VBench reads no lossless video, so lose as little as can be
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)
# those that judge videos of any prompt, by branch
ANY_PROMPT = {
    "short": (
        "subject_consistency",
        "background_consistency",
        "motion_smoothness",
        "dynamic_degree",
        "aesthetic_quality",
        "imaging_quality",
        "human_action",
        "temporal_style",
        "overall_consistency",
        "temporal_flickering",
    ),
    "long": (
        "subject_consistency",
        "background_consistency",
        "motion_smoothness",
        "dynamic_degree",
        "aesthetic_quality",
        "imaging_quality",
    ),
}


def branch_of(seconds: float) -> str:
    """Which of VBench's branches takes videos of this duration: "short" or "long"."""
    return "long" if seconds >= LONG_FROM else "short"


def export_run(folder: RunFolder, model: str, target: Path) -> dict[str, Any]:
    """Write one model's videos for VBench into TARGET/videos, and vbench.json with what it has to know.

    Frames come from the lossless files. Raises SettingError for a model that the run has not, for videos on
    both sides of the branch's limit, and prompts that cannot be file names; UserError for damaged ones.
    """
    index = folder.read_index()
    one_of("model", model, list(index["models"]))
    suite = suite_from({**index["suite"]})
    films = finished_videos(folder, suite, model, index["models"][model])
    if not films:
        raise SettingError(f"{folder.path} has no finished videos of {model}")
    branches = {branch_of(film["video"]["frames"] / film["video"]["fps"]) for film in films}
    if len(branches) > 1:
        raise SettingError(f"videos of {model} lie on both sides of {LONG_FROM:g} s: two branches of VBench")
    names = [video_name(film["prompt"], film["sample"]) for film in films]
    for film, name in zip(films, names, strict=True):
        frames = load_frames(folder.videos(model), film)
        write_video(frames, target / "videos" / name, overwrite=True, odd="pad", quality=QUALITY)
    return _write_manifest(target, model, films, names, branches.pop(), index)


def video_name(prompt: str, sample: int) -> str:
    """PROMPT-INDEX.mp4. SettingError where a prompt cannot be part of a file's name."""
    name = f"{prompt}-{sample}.mp4"
    if "/" in prompt or "\0" in prompt or len(name.encode()) > LONGEST_NAME:
        why = "a slash" if "/" in prompt else f"{len(name.encode())} bytes, more than {LONGEST_NAME}"
        raise SettingError(f"VBench reads prompts from file names; this one has {why}: {prompt[:60]!r}")
    return name


def _write_manifest(
    target: Path,
    model: str,
    films: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    branch: str,
    index: Mapping[str, Any],
) -> dict[str, Any]:
    texts = list(dict.fromkeys(film["prompt"] for film in films))
    samples = min(sum(film["prompt"] == text for film in films) for text in texts)
    prompts = {f"videos/{name}": film["prompt"] for film, name in zip(films, names, strict=True)}
    manifest = {
        "model": model,
        "branch": branch,
        "mode": "custom_input" if branch == "short" else "long_custom_input",
        "dimensions": list(ANY_PROMPT[branch]),
        "videos": len(films),
        "samples_per_prompt": samples,
        "prompts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "settings_hash": index["models"][model]["settings_hash"],
        "frames_sha256": {name: film["frames_sha256"] for film, name in zip(films, names, strict=True)},
        "video": films[0]["video"],
        "container": f"H.264 mp4, quality {QUALITY} of 10: not the lossless frames",
        "environment": environment(),
        "notes": _export_notes(branch, samples),
    }
    write_json(target / "prompts.json", prompts)
    write_json(target / "vbench.json", manifest)
    return manifest


def _export_notes(branch: str, samples: int) -> list[str]:
    found = [f"videos of this duration belong to VBench's {branch} branch; scores of the two do not compare"]
    if samples < SAMPLES:
        found.append(f"VBench's protocol has {SAMPLES} samples of each prompt, here are {samples}")
    if samples < FLICKER_SAMPLES:
        found.append(
            f"temporal_flickering has {FLICKER_SAMPLES} samples of each prompt, and static videos only"
        )
    return found


def import_results(
    folder: RunFolder, model: str, results: Path, *, manifest: Path | None = None, made_with: str = ""
) -> dict[str, Any]:
    """Keep a VBench result file with the run, as RUN/imported/vbench-MODEL.json; returns what is kept.

    `results` is VBench's `*_eval_results.json`: {dimension: [score, [{video_path, video_results}, ...]]}.
    `manifest` is the export's vbench.json, if it was exported from here; `made_with` says which VBench.
    SettingError for another kind of file, an unknown dimension, or videos that are not those of the run now.
    """
    one_of("model", model, list(folder.read_index()["models"]))
    said = read_json(results)
    if not isinstance(said, dict) or not said:
        raise SettingError(f"{results} holds no results of VBench")
    scores = {
        one_of("dimension", name, DIMENSIONS): _score(results, name, value) for name, value in said.items()
    }
    exported = read_json(manifest) if manifest is not None else {}
    if exported:
        _check_manifest(folder, model, exported)
    kept = {
        "kind": "vbench",
        "model": model,
        "branch": exported.get("branch", "unknown: no manifest was given"),
        "scores": scores,
        "samples_per_prompt": exported.get("samples_per_prompt"),
        "prompts_sha256": exported.get("prompts_sha256"),
        "made_with": made_with or "not told",
        "results_sha256": hashlib.sha256(results.read_bytes()).hexdigest(),
        "note": "imported: measured elsewhere, on mp4 files, by another protocol than the numbers beside it",
    }
    write_json(folder.imported / f"vbench-{folder_name(model)}.json", kept)
    return kept


def _score(results: Path, name: str, value: Any) -> dict[str, Any]:
    """VBench writes [score, per video] for a dimension."""
    score, videos = value if isinstance(value, list) and len(value) == 2 else (value, [])
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise SettingError(f"{results}: {name} has no score, got {score!r}")
    rows = [row for row in videos if isinstance(row, dict) and "video_results" in row]
    return {"value": float(score), "n": len(rows) or None}


def _check_manifest(folder: RunFolder, model: str, exported: Mapping[str, Any]) -> None:
    if exported.get("model") != model:
        raise SettingError(f"the manifest is of {exported.get('model')!r}, not of {model!r}")
    index = folder.read_index()
    films = finished_videos(folder, suite_from({**index["suite"]}), model, index["models"][model])
    now = {video_name(film["prompt"], film["sample"]): film["frames_sha256"] for film in films}
    if exported.get("frames_sha256") != now:
        raise SettingError(
            f"the videos of {model} are not those that were exported: export and measure again"
        )
