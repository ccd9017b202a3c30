"""Makes what a suite asks for, and keeps it: finished items with the same settings are never made again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claims import Claims
from benchmarks.energy import energy_meter
from benchmarks.environment import environment
from benchmarks.metrics import diagnostics, digest
from benchmarks.storage import (
    RunFolder,
    describe,
    finished,
    intact,
    load_frames,
    read_json,
    remove_leftovers,
    save_item,
    sidecars,
)
from benchmarks.suites import Item, Suite, items, world_captions
from benchmarks.work import POLL, Desk, Outcome, Task, note_failure, outcome_of
from shared.clips import shapes
from shared.config_io import to_plain
from shared.errors import SettingError
from shared.files import write_json
from shared.interruptions import raise_if_interrupted
from shared.protocol import GenerationRequest, GenerationResult, VideoCodec, VideoGenerator
from shared.video import Video

Build = Callable[[str], VideoGenerator]
FORMAT = 1  # of a run on disk; part of every settings hash
CLIP_STREAM = 2022  # sets the ground truth's random numbers apart from the models' seeds


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A loaded model at work on one run."""

    model: str
    generator: VideoGenerator
    settings: dict[str, Any]
    folder: RunFolder
    desk: Desk

    @property
    def settings_hash(self) -> str:
        return digest(self.settings)

    def describe(self) -> dict[str, Any]:
        codec = getattr(self.generator, "codec", None)
        return {
            "settings": self.settings,
            "settings_hash": self.settings_hash,
            "tasks": sorted(self.generator.tasks),
            "codec": None if codec is None else codec.name,
            "diagnostics": getattr(self.generator, "diagnostics", None) is not None,
        }


def run_suite(suite: Suite, folder: RunFolder, *, build: Build, quiet: bool = False) -> Outcome:
    """Make all that the suite asks for in this process, and write run.json."""
    with Claims(folder.path) as claims:
        make_share(suite, folder, build=build, claims=claims, quiet=quiet)
        return conclude(suite, folder, claims)


def make_share(suite: Suite, folder: RunFolder, *, build: Build, claims: Claims, quiet: bool = False) -> None:
    """Make the videos and reconstructions that nobody has finished or is at work on; return when all are
    there or have failed.

    One model is in memory at a time, unless the suite interleaves them. An item whose model raises is noted
    and left out; errors while a model is built are the caller's. Raises SettingError when the folder holds
    another kind of run.
    """
    check_format(folder)
    desk = Desk(claims=claims, failures=folder.failures, quiet=quiet)
    desk.work_off(clip_tasks(suite, folder, desk))
    claims.tell(made=0)  # clips are no items of a model
    for group in [suite.models] if suite.interleave else [(name,) for name in suite.models]:
        work_group(suite, [open_bench(name, folder, build, desk) for name in group])


def open_bench(name: str, folder: RunFolder, build: Build, desk: Desk) -> Bench:
    generator = build(name)
    settings = plain_settings(generator.settings())
    bench = Bench(model=name, generator=generator, settings=settings, folder=folder, desk=desk)
    desk.claims.tell(models=desk.claims.tally.get("models", {}) | {name: bench.describe()})
    return bench


def work_group(suite: Suite, group: list[Bench]) -> None:
    """Videos, then reconstructions, then diagnostics of models that are in memory together, by turns."""
    clips = sidecars(group[0].folder.clips, clip_names(suite)[: suite.num_clips])
    names = " and ".join(bench.model for bench in group)
    videos = [generation_tasks(bench, suite) for bench in group]
    for tasks, bench in zip(videos, group, strict=True):
        pending = [i for i, task in enumerate(tasks) if not bench.desk.settled(task)]
        if pending and suite.warm_up:
            bench.generator.generate(request(items(suite, bench.model)[pending[0]]))
    desk = group[0].desk
    desk.work_off(by_turns(videos), f"{names}: videos")
    desk.work_off(by_turns([codec_tasks(bench, clips) for bench in group]), f"{names}: clips")
    desk.work_off(by_turns([diagnostic_tasks(bench, clips) for bench in group]), f"{names}: diagnostics")


def by_turns(columns: list[list[Task]]) -> list[Task]:
    """The first of every column, then the second, starting with another column each time: what is measured
    while the machine warms up or slows down is spread over all."""
    longest = max(map(len, columns), default=0)
    turns = [[column[i] for column in columns if i < len(column)] for i in range(longest)]
    return [task for i, turn in enumerate(turns) for task in turn[i % len(turn) :] + turn[: i % len(turn)]]


def conclude(suite: Suite, folder: RunFolder, claims: Claims) -> Outcome:
    """Write run.json for all workers of a run, once the work is done."""
    while claims.others():
        time.sleep(POLL)
    described = {name: row for tally in claims.tallies() for name, row in tally.get("models", {}).items()}
    outcome = outcome_of(claims, work_names(suite, folder, described), folder.failures)
    outcome.models = {name: described[name] for name in suite.models}  # whoever told first: the suite's order
    write_index(suite, folder, outcome)
    if claims.sweep():
        remove_leftovers(folder)
    return outcome


def work_names(suite: Suite, folder: RunFolder, described: dict[str, Any]) -> list[str]:
    """Of everything that the models were to make."""
    clips = clip_names(suite)[: suite.num_clips]
    found = []
    for model, row in described.items():
        found += [f"{model}/{item.id}" for item in items(suite)]
        found += [f"{model}/codec/{clip}" for clip in clips if row["codec"] is not None]
        found += [f"{model}/diagnostics/{clip}" for clip in clips if row["diagnostics"]]
    return found


def check_format(folder: RunFolder) -> None:
    if folder.index.is_file() and read_json(folder.index).get("format") != FORMAT:
        raise SettingError(
            f"{folder.path} was written by another version of the benchmark; choose another folder"
        )


def plain_settings(value: Any) -> Any:
    """Settings as JSON values; TypeError for anything else, since its text may differ from run to run."""
    plain = to_plain(value)
    if isinstance(plain, dict):
        return {str(key): plain_settings(inner) for key, inner in plain.items()}
    if isinstance(plain, list):
        return [plain_settings(inner) for inner in plain]
    if plain is None or isinstance(plain, str | int | float | bool):
        return plain
    raise TypeError(f"settings() must hold JSON values, got {type(value).__name__}: {value!r}")


def write_index(suite: Suite, folder: RunFolder, outcome: Outcome) -> None:
    """run.json, written only when something in it is new: a run with nothing to do changes no file."""
    content = {
        "format": FORMAT,
        "suite": to_plain(suite),
        "command": suite.command,
        "models": outcome.models,
        "failed": outcome.failed,
    }
    content = json.loads(json.dumps(content))  # as it will be read back
    old = read_json(folder.index) if folder.index.is_file() else {}
    if outcome.made or {name: old.get(name) for name in content} != content:
        write_json(folder.index, {**content, "environment": environment()})


def note_damaged(folder: RunFolder, failed: dict[str, str]) -> None:
    """Add to run.json what only measuring could find, so that the next run makes these items again."""
    index = folder.read_index()
    if found := {name: reason for name, reason in failed.items() if name not in index["failed"]}:
        for name, reason in found.items():
            note_failure(folder.failures, name, reason)
        write_json(folder.index, {**index, "failed": index["failed"] | found})


def item_hash(settings_hash: str, item: Item) -> str:
    """Of everything that decides an item's frames."""
    return digest([FORMAT, settings_hash, item.text, item.seed])


def request(item: Item) -> GenerationRequest:
    return GenerationRequest(prompt=item.text, seed=item.seed, sample=item.sample)


def generation_tasks(bench: Bench, suite: Suite) -> list[Task]:
    """The videos of one model, one at a time, so that each has its own time."""
    target = bench.folder.videos(bench.model)
    return [
        frames_task(
            bench.desk,
            target,
            f"{bench.model}/{item.id}",
            (item.id, item_hash(bench.settings_hash, item)),
            lambda item=item: generate(bench, item),
        )
        for item in items(suite, bench.model)
    ]


def frames_task(desk: Desk, target: Path, name: str, item: tuple[str, str], make: Callable[[], None]) -> Task:
    """A task that writes frames and sidecar `item` = (id, settings hash). What failed before is looked at
    more closely: frames that were damaged after they were written are made again."""
    if desk.suspect(name) and not intact(target, item[0]):
        (target / f"{item[0]}.json").unlink(missing_ok=True)
    return Task(
        name=name,
        done=lambda: finished(target, *item),
        make=make,
        again=(target / f"{item[0]}.json").is_file() and not finished(target, *item),
    )


def generate(bench: Bench, item: Item) -> None:
    (result, seconds), joules = energy_meter().measured(lambda: timed_generation(bench.generator, item))
    sidecar = {
        **asdict(item),
        "model": bench.model,
        "settings_hash": item_hash(bench.settings_hash, item),
        "settings": bench.settings,
        "seconds": seconds,
        "joules": joules,
        "stages": {name: to_plain(stats) for name, stats in result.stages.items()},
        "environment": environment(),
    }
    save_item(bench.folder.videos(bench.model), item.id, result.video, sidecar)


def timed_generation(generator: VideoGenerator, item: Item) -> tuple[GenerationResult, float]:
    start = time.perf_counter()
    result = generator.generate(request(item))
    return result, time.perf_counter() - start


def clip_names(suite: Suite) -> list[str]:
    """Names of the ground-truth clips: one for each prompt of the shapes world, and enough for the codecs."""
    own = isinstance(suite.prompts, str)
    return [f"{index:03d}" for index in range(max(suite.num_prompts if own else 0, suite.num_clips))]


def clip_tasks(suite: Suite, folder: RunFolder, desk: Desk) -> list[Task]:
    """Ground truth: clip N shows prompt N, in a scene drawn from the suite's seed."""
    names = clip_names(suite)
    captions = world_captions(suite, len(names)) if names else []
    return [
        frames_task(
            desk,
            folder.clips,
            f"clip {name}",
            (name, clip_digest(suite, index, caption)),
            lambda index=index, name=name, caption=caption: make_clip(suite, folder, index, name, caption),
        )
        for index, (name, caption) in enumerate(zip(names, captions, strict=True))
    ]


def clip_digest(suite: Suite, index: int, caption: shapes.Caption) -> str:
    return digest([FORMAT, CLIP_STREAM, suite.seed, index, caption.text])


def make_clip(suite: Suite, folder: RunFolder, index: int, name: str, caption: shapes.Caption) -> None:
    rng = np.random.default_rng([suite.seed, CLIP_STREAM, index])
    clip = shapes.render(shapes.draw_scene(rng, caption=caption))
    sidecar = {
        "id": name,
        "prompt": caption.text,
        "prompt_index": index,
        "settings_hash": clip_digest(suite, index, caption),
    }
    save_item(folder.clips, name, clip, sidecar, film=False)


def clip_hash(settings_hash: str, clip: dict[str, Any]) -> str:
    return digest([FORMAT, settings_hash, clip["frames_sha256"]])


def codec_tasks(bench: Bench, clips: list[dict[str, Any]]) -> list[Task]:
    """The clips through the model's codec, where it has one."""
    codec: VideoCodec | None = getattr(bench.generator, "codec", None)
    if codec is None:
        return []
    target = bench.folder.reconstructions(bench.model)
    return [
        frames_task(
            bench.desk,
            target,
            f"{bench.model}/codec/{clip['id']}",
            (clip["id"], clip_hash(bench.settings_hash, clip)),
            lambda clip=clip, codec=codec: code(bench, codec, clip),
        )
        for clip in clips
    ]


def code(bench: Bench, codec: VideoCodec, clip: dict[str, Any]) -> None:
    video, cost = reconstruct(codec, load_frames(bench.folder.clips, clip))
    sidecar = {**named(clip), "settings_hash": clip_hash(bench.settings_hash, clip), **cost}
    save_item(bench.folder.reconstructions(bench.model), clip["id"], video, sidecar, film=False)


def named(clip: dict[str, Any]) -> dict[str, Any]:
    return {name: clip[name] for name in ("id", "prompt", "prompt_index")}


def diagnostic_tasks(bench: Bench, clips: list[dict[str, Any]]) -> list[Task]:
    """What the model says of the clips, where it can (`shared.protocol.DiagnosticModel`)."""
    if getattr(bench.generator, "diagnostics", None) is None:
        return []
    target = bench.folder.diagnostics(bench.model)
    return [
        Task(
            name=f"{bench.model}/diagnostics/{clip['id']}",
            done=lambda clip=clip: said(target, clip["id"], clip_hash(bench.settings_hash, clip)),
            make=lambda clip=clip: diagnose(bench, clip),
        )
        for clip in clips
    ]


def diagnose(bench: Bench, clip: dict[str, Any]) -> None:
    ask: Any = getattr(bench.generator, "diagnostics", None)
    values, reason = {}, ""
    try:
        found = ask([load_frames(bench.folder.clips, clip)], [clip["prompt"]])
        values = {f"{diagnostics.NAME}/{name}": value[0] for name, value in found.items()}
    except (ValueError, RuntimeError) as error:  # clips that do not fit this model are no failure
        raise_if_interrupted(error)
        reason = str(error)
    marked = {"settings_hash": clip_hash(bench.settings_hash, clip), "values": values, "refused": reason}
    write_json(bench.folder.diagnostics(bench.model) / f"{clip['id']}.json", {**named(clip), **marked})


def said(folder: Path, name: str, settings_hash: str) -> bool:
    """Is the diagnostic there, of this model and clip?"""
    path = folder / f"{name}.json"
    return path.is_file() and read_json(path).get("settings_hash") == settings_hash


def reconstruct(codec: VideoCodec, clip: Video) -> tuple[Video, dict[str, Any]]:
    """decode(encode(clip)), with the seconds of both and the shape of the codes between them."""
    start = time.perf_counter()
    codes = codec.encode(clip)
    middle = time.perf_counter()
    video = codec.decode(codes, clip.fps)
    seconds = {"encode": middle - start, "decode": time.perf_counter() - middle}
    shape = {"dtype": str(codes.dtype).removeprefix("torch."), "shape": list(codes.shape)}
    return video, {"codec": codec.name, "seconds": seconds, "codes": shape, "source": describe(clip)}
