"""Makes what a suite asks for, and keeps it: finished items with the same settings are never made again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.metrics import diagnostics, digest
from benchmarks.storage import RunFolder, describe, finished, load_frames, read_json, save_item, sidecars
from benchmarks.suites import Item, Suite, items, world_captions
from shared.clips import shapes
from shared.config_io import to_plain
from shared.errors import SettingError, UserError
from shared.files import write_json
from shared.protocol import GenerationRequest, GenerationResult, VideoCodec, VideoGenerator
from shared.video import Video

Build = Callable[[str], VideoGenerator]
FORMAT = 1  # of a run on disk; part of every settings hash
CLIP_STREAM = 2022  # sets the ground truth's random numbers apart from the models' seeds


@dataclass(kw_only=True)
class Outcome:
    """What a run did.

    `remade` items were there with other settings; `failed` maps MODEL/ID to the reason; `models` holds of
    each model its settings, their hash, its tasks and codec.
    """

    made: int = 0
    kept: int = 0
    remade: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        if not self.made and not self.failed:
            return f"nothing to do: all {self.kept} items are finished with these settings"
        words = [f"{self.made} items made", f"{self.kept} kept"]
        words += [f"{self.remade} of them again, because their settings changed"] if self.remade else []
        words += [f"{len(self.failed)} failed"] if self.failed else []
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Which share of the items this process makes: every `count`-th, from `index` on."""

    index: int = 0
    count: int = 1

    def share(self, work: list[Any]) -> list[Any]:
        return work[self.index :: self.count]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A loaded model at work on one run."""

    model: str
    generator: VideoGenerator
    settings: dict[str, Any]
    folder: RunFolder
    outcome: Outcome
    quiet: bool

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
        }

    def progress(self, work: list[Any], what: str) -> tqdm:
        return tqdm(work, desc=f"{self.model}: {what}", unit=what[:-1], disable=self.quiet or not work)


def run_suite(suite: Suite, folder: RunFolder, *, build: Build, quiet: bool = False) -> Outcome:
    """Make all that the suite asks for in this process, and write run.json."""
    outcome = make_share(suite, folder, build=build, worker=Worker(), quiet=quiet)
    write_index(suite, folder, outcome)
    return outcome


def make_share(
    suite: Suite, folder: RunFolder, *, build: Build, worker: Worker, quiet: bool = False
) -> Outcome:
    """Make the videos and reconstructions of this worker's share that are not finished yet.

    One model is in memory at a time. An item whose model raises is noted in the outcome and left out; errors
    while a model is built are the caller's. Raises SettingError when the folder holds another kind of run.
    """
    outcome = Outcome()
    check_format(folder)
    write_clips(suite, folder)
    for name in suite.models:
        generator = build(name)
        settings = plain_settings(generator.settings())
        bench = Bench(
            model=name, generator=generator, settings=settings, folder=folder, outcome=outcome, quiet=quiet
        )
        outcome.models[name] = bench.describe()
        generate_all(bench, worker.share(items(suite)), warm_up=suite.warm_up)
        clips = sidecars(folder.clips, clip_names(suite)[: suite.num_clips])
        reconstruct_all(bench, worker.share(clips))
        diagnose_all(bench, worker.share(clips))
    return outcome


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
    old = read_json(folder.index) if folder.index.is_file() else {}
    if outcome.made or {name: old.get(name) for name in content} != content:
        write_json(folder.index, {**content, "environment": environment()})


def item_hash(settings_hash: str, item: Item) -> str:
    """Of everything that decides an item's frames."""
    return digest([FORMAT, settings_hash, item.prompt, item.seed])


def generate_all(bench: Bench, work: list[Item], *, warm_up: bool = False) -> None:
    """Make the items that are not finished, one at a time, so that each has its own time."""
    target = bench.folder.videos(bench.model)
    pending = [i for i in work if not finished(target, i.id, item_hash(bench.settings_hash, i))]
    bench.outcome.kept += len(work) - len(pending)
    if pending and warm_up:
        bench.generator.generate(GenerationRequest(prompt=pending[0].prompt, seed=pending[0].seed))
    for item in bench.progress(pending, "videos"):
        there = (target / f"{item.id}.json").is_file()
        try:
            result, seconds = timed_generation(bench.generator, item)
        except (UserError, ValueError, RuntimeError) as error:  # of this item; the others are worth making
            bench.outcome.failed[f"{bench.model}/{item.id}"] = f"{type(error).__name__}: {error}"
            continue
        sidecar = {
            **asdict(item),
            "model": bench.model,
            "settings_hash": item_hash(bench.settings_hash, item),
            "settings": bench.settings,
            "seconds": seconds,
            "stages": {name: to_plain(stats) for name, stats in result.stages.items()},
            "environment": environment(),
        }
        save_item(target, item.id, result.video, sidecar)
        bench.outcome.made += 1
        bench.outcome.remade += there


def timed_generation(generator: VideoGenerator, item: Item) -> tuple[GenerationResult, float]:
    start = time.perf_counter()
    result = generator.generate(GenerationRequest(prompt=item.prompt, seed=item.seed))
    return result, time.perf_counter() - start


def clip_names(suite: Suite) -> list[str]:
    """Names of the ground-truth clips: one for each prompt of the shapes world, and enough for the codecs."""
    own = isinstance(suite.prompts, str)
    return [f"{index:03d}" for index in range(max(suite.num_prompts if own else 0, suite.num_clips))]


def write_clips(suite: Suite, folder: RunFolder) -> None:
    """Ground truth: clip N shows prompt N, in a scene drawn from the suite's seed."""
    names = clip_names(suite)
    for index, (name, caption) in enumerate(zip(names, world_captions(suite, len(names)), strict=True)):
        settings_hash = digest([FORMAT, CLIP_STREAM, suite.seed, index, caption.text])
        if not finished(folder.clips, name, settings_hash):
            rng = np.random.default_rng([suite.seed, CLIP_STREAM, index])
            clip = shapes.render(shapes.draw_scene(rng, caption=caption))
            sidecar = {
                "id": name,
                "prompt": caption.text,
                "prompt_index": index,
                "settings_hash": settings_hash,
            }
            save_item(folder.clips, name, clip, sidecar, film=False)


def clip_hash(settings_hash: str, clip: dict[str, Any]) -> str:
    return digest([FORMAT, settings_hash, clip["frames_sha256"]])


def reconstruct_all(bench: Bench, clips: list[dict[str, Any]]) -> None:
    """Send the clips through the model's codec, where it has one."""
    codec: VideoCodec | None = getattr(bench.generator, "codec", None)
    if codec is None:
        return
    target = bench.folder.reconstructions(bench.model)
    pending = [c for c in clips if not finished(target, c["id"], clip_hash(bench.settings_hash, c))]
    bench.outcome.kept += len(clips) - len(pending)
    for clip in bench.progress(pending, "clips"):
        try:
            video, cost = reconstruct(codec, load_frames(bench.folder.clips, clip))
        except (UserError, ValueError, RuntimeError) as error:
            bench.outcome.failed[f"{bench.model}/codec/{clip['id']}"] = f"{type(error).__name__}: {error}"
            continue
        named = {name: clip[name] for name in ("id", "prompt", "prompt_index")}
        sidecar = {**named, "settings_hash": clip_hash(bench.settings_hash, clip), **cost}
        save_item(target, clip["id"], video, sidecar, film=False)
        bench.outcome.made += 1


def diagnose_all(bench: Bench, clips: list[dict[str, Any]]) -> None:
    """Ask the model what it says of the clips, where it can (`shared.protocol.DiagnosticModel`)."""
    ask = getattr(bench.generator, "diagnostics", None)
    if ask is None:
        return
    target = bench.folder.diagnostics(bench.model)
    pending = [c for c in clips if not said(target, c["id"], clip_hash(bench.settings_hash, c))]
    bench.outcome.kept += len(clips) - len(pending)
    for clip in bench.progress(pending, "clips"):
        values, reason = {}, ""
        try:
            values = {
                f"{diagnostics.NAME}/{name}": found[0]
                for name, found in ask([load_frames(bench.folder.clips, clip)], [clip["prompt"]]).items()
            }
        except (
            UserError,
            ValueError,
            RuntimeError,
        ) as error:  # clips that do not fit this model are no failure
            reason = str(error)
        named = {name: clip[name] for name in ("id", "prompt", "prompt_index")}
        marked = {"settings_hash": clip_hash(bench.settings_hash, clip), "values": values, "refused": reason}
        write_json(target / f"{clip['id']}.json", {**named, **marked})
        bench.outcome.made += 1


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
