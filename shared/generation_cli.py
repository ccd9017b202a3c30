"""The verb `generate`, as far as it is the same for all models: prompts, files, sidecars, exit codes.

Everything that can be refused is refused before weights are read, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shared.errors import BatchError, OutputCheckError, OutputPathError, SettingError, UserError
from shared.files import atomic_path, remove_leftovers, write_json
from shared.interruptions import raise_if_interrupted
from shared.json_files import read_json
from shared.protocol import GenerationRequest, GenerationResult, VideoGenerator
from shared.verbs import add_output_flags, say
from shared.video import Video

FORMAT = 1  # of sidecars; part of every settings hash
FILE_SUFFIXES = (".mp4", ".gif", ".mkv")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of an image to begin with
INDEX = "run.json"
MAX_VIDEOS = 100_000
Write = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One video to make. `seed` is its own: the same prompt and seed make it again alone."""

    id: str
    prompt: str
    sample: int
    seed: int
    path: Path

    @property
    def sidecar(self) -> Path:
        return self.path.with_suffix(".json")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a family hands over: its effective settings, and how to load the model that has them.

    `inputs` describes `image` and `video` in JSON values; with `settings` it tells whether a finished item is
    the one that is asked for.
    """

    command: tuple[str, ...]
    settings: dict[str, Any]
    load: Callable[[], VideoGenerator]
    image: Tensor | None = None
    video: Video | None = None
    inputs: dict[str, Any] = field(default_factory=dict)

    def hash_of(self, item: Item) -> str:
        content = [FORMAT, self.settings, self.inputs, item.prompt, item.seed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# ---- flags


# fmt: off
def add_generation_flags(parser: argparse.ArgumentParser, *, output: str) -> None:
    """The flags that every family has; `output` is the default folder."""
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="what the video is to show")
    given.add_argument("--prompt_file", type=Path, help="a prompt a line; finished videos are kept")
    parser.add_argument("--model_path", default="demo", help="demo (the default) or a model folder")
    parser.add_argument("--output_path", type=Path, default=Path(output),
                        help=f"a .mp4, .gif or .mkv file for one video, else a folder (default: {output})")
    parser.add_argument("--seed", type=int, default=0, help="of the first video of a prompt (default: 0)")
    parser.add_argument("--num_videos_per_prompt", type=int, default=1, help="with the seeds that follow")
    parser.add_argument("--num_frames", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--fps", type=float, help="how fast the file shows the frames")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the model's own)")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:N, mps")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                        help="other sampling settings, by the names in the model's config.json")
    parser.add_argument("--overwrite", action="store_true", help="make again what is there")
    parser.add_argument("--dry_run", action="store_true", help="say what would be made, and stop")
    add_output_flags(parser)


# fmt: on


# ---- what is to be made


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompt, or those of the file."""
    if options.prompt_file is None:
        if not options.prompt.strip():
            raise SettingError("the prompt is empty")
        return [options.prompt.strip()]
    return read_prompt_file(options.prompt_file)


def read_prompt_file(path: Path) -> list[str]:
    """One prompt a line; empty lines and lines that start with # are left out."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"cannot read prompts from {path}: {error}") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise SettingError(f"{path} has no prompts")
    return prompts


def plan_items(options: argparse.Namespace) -> list[Item]:
    """Every video that is asked for, in order. One video for a path with a film's suffix is written there;
    else the path is a folder with files named <number>-<words>-<sample>."""
    prompts, count, path = read_prompts(options), options.num_videos_per_prompt, options.output_path
    if count < 1:
        raise SettingError(f"num_videos_per_prompt must be at least 1, got {count}")
    total, suffix = count * len(prompts), path.suffix.lower()
    if total > MAX_VIDEOS:
        raise SettingError(f"{total} videos are asked for; legal: at most {MAX_VIDEOS} in one call")
    if suffix and not re.fullmatch(r"\.\d*", suffix) and suffix not in FILE_SUFFIXES:
        raise SettingError(f"unknown video format {suffix!r}; legal: {', '.join(FILE_SUFFIXES)}, or a folder")
    if suffix in FILE_SUFFIXES and total > 1:
        raise SettingError(f"{path} holds one video, {total} are asked for; name a folder")
    named = [(f"{number:03d}-{slug(prompt)}", prompt) for number, prompt in enumerate(prompts)]
    return [
        Item(
            id=name,
            prompt=prompt,
            sample=sample,
            seed=options.seed + sample,
            path=path if suffix in FILE_SUFFIXES else path / f"{name}-{sample}.mp4",
        )
        for name, prompt in named
        for sample in range(count)
    ]


def slug(text: str, length: int = 40) -> str:
    """A file name's worth of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-") or "prompt"


def pending_items(
    items: Sequence[Item], order: Order, *, overwrite: bool, resume: bool
) -> tuple[list[Item], list[Item]]:
    """Items to make, and those that are finished with equal settings (with `resume`). OutputPathError where
    something else is in the way or the place cannot be written."""
    kept: list[Item] = []
    pending: list[Item] = []
    for item in items:
        (kept if resume and not overwrite and _finished(item, order) else pending).append(item)
    for item in pending:
        for path in (item.path, item.sidecar):
            if path == item.sidecar and not item.path.exists() and _sidecar_of(item):
                continue  # what is left of a video that was removed
            if path.is_dir() or (path.exists() and not overwrite):
                what = "is a folder" if path.is_dir() else "already exists"
                other = " with other settings" if resume and path == item.path and not path.is_dir() else ""
                raise OutputPathError(f"{path} {what}{other}; choose another name or pass --overwrite")
    if pending:
        check_writable(pending[0].path.parent)
    return pending, kept


def _finished(item: Item, order: Order) -> bool:
    return item.path.is_file() and _sidecar_of(item).get("settings_hash") == order.hash_of(item)


def _sidecar_of(item: Item) -> dict[str, Any]:
    """The sidecar's content, {} where there is none or it is not ours."""
    try:
        content = read_json(item.sidecar, SettingError)
    except SettingError:
        return {}
    ours = isinstance(content, dict) and content.get("file") == item.path.name
    return content if ours else {}


def _check_of(item: Item) -> dict[str, Any]:
    """The verdict on a finished video, by its sidecar."""
    check = _sidecar_of(item).get("check")
    return check if isinstance(check, dict) else {}


def check_writable(folder: Path) -> None:
    """OutputPathError unless files can be made in `folder`, which need not exist; leaves nothing there."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputPathError(f"cannot write into {folder}: {error.strerror or error}") from error


# ---- the work


@dataclass(kw_only=True)
class _Made:
    """What became of the items."""

    records: list[dict[str, Any]] = field(default_factory=list)
    errors: list[UserError] = field(default_factory=list)


def run_generation(order: Order, options: argparse.Namespace) -> None:
    """Make the videos and their sidecars; says what it did on standard output.

    Raises OutputCheckError (5) when a video, written now or kept, shows nothing, BatchError (7) when some of
    several items could not be made, and the item's own error when it was the only one.
    """
    items = plan_items(options)
    in_folder = options.output_path.suffix.lower() not in FILE_SUFFIXES
    pending, kept = pending_items(items, order, overwrite=options.overwrite, resume=in_folder)
    if options.dry_run:
        content = {"ok": True, "dry_run": True, "settings": order.settings, "items": _listed(pending)}
        say(options, content, [f"would write {item.path}" for item in pending])
        return
    made = _Made(records=[_listed([item])[0] | {"status": "kept", "check": _check_of(item)} for item in kept])
    remove_leftovers(items[0].path.parent)
    if pending:
        generator = order.load()
        if hasattr(generator, "prepare"):
            generator.prepare([item.prompt for item in pending])  # type: ignore[attr-defined]
        if not (options.quiet or options.json):
            sys.stderr.write(f"settings: {json.dumps(order.settings, ensure_ascii=False)}\n")
        try:
            _make_all(pending, order, generator, made, hidden=options.quiet or options.json)
        finally:
            if in_folder and made.records:
                _write_index(options.output_path, order, made)
    elif in_folder and not _index_names(options.output_path, made):  # killed after the last video
        _write_index(options.output_path, order, made)
    _raise_for(made, len(items))
    content = {"ok": True, "exit_code": 0, "settings": order.settings, "items": made.records}
    say(options, content, [record["path"] for record in made.records])


def _make_all(
    pending: Sequence[Item], order: Order, generator: VideoGenerator, made: _Made, *, hidden: bool
) -> None:
    for item, progress in _with_progress(pending, generator, hidden):
        entry = _listed([item])[0]
        try:
            verdict = make_item(item, order, generator)
        except OutputPathError:
            raise
        except UserError as error:  # of this item; the others are worth making
            raise_if_interrupted(error)
            made.errors.append(error)
            made.records.append(entry | {"status": "failed", "reason": str(error)})
            continue
        finally:
            progress()
        made.records.append(entry | {"status": "made", "check": verdict})


def make_item(item: Item, order: Order, generator: VideoGenerator) -> dict[str, Any]:
    """Write one video and, behind it, its sidecar; returns the self-check's verdict."""
    from shared.self_check import check_video
    from shared.video_io import write_video

    request = GenerationRequest(prompt=item.prompt, seed=item.seed, image=order.image, video=order.video)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = generator.generate(request)
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    notes = list(dict.fromkeys([*said, *getattr(result, "warnings", ())]))
    verdict = check_video(result.video)
    check = {"status": verdict.status, "failures": list(verdict.failures), "warnings": list(verdict.warnings)}
    content = sidecar(item, order, result, check, notes)
    if item.path.exists():
        with suppress(FileNotFoundError):
            item.sidecar.unlink()  # a sidecar vouches for the video beside it
        write_video(result.video, item.path, overwrite=True)
        write_json(item.sidecar, content)
        return check
    with atomic_path(item.path) as temporary:  # a kill leaves no video without its sidecar
        write_video(result.video, temporary)
        write_json(item.sidecar, content)
    return check


def sidecar(
    item: Item, order: Order, result: GenerationResult, check: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """All that is known of a finished video."""
    video = result.video
    return {
        "format": FORMAT,
        "file": item.path.name,
        "id": item.id,
        "prompt": item.prompt,
        "sample": item.sample,
        "seed": item.seed,
        "frames": video.num_frames,
        "fps": video.fps,
        "height": video.height,
        "width": video.width,
        "dtype": order.settings.get("dtype"),
        "device": order.settings.get("device"),
        "seconds": sum(result.seconds.values()),
        "stages": {name: asdict(stats) for name, stats in result.stages.items()},
        "check": check,
        "warnings": notes,
        **({"measured": result.measured} if result.measured else {}),
        "command": shlex.join(order.command),
        "version": version(),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "inputs": order.inputs,
        "settings": order.settings,
        "settings_hash": order.hash_of(item),
    }


def version() -> str:
    """Of this project, where it is installed."""
    try:
        return importlib.metadata.version("cogvideo-lab")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _with_progress(
    pending: Sequence[Item], generator: VideoGenerator, hidden: bool
) -> Iterator[tuple[Item, Callable[[], None]]]:
    """Items, each with a function to call when it is done; the bar also moves inside an item where the model
    tells its progress."""
    with tqdm(total=100 * len(pending), unit="%", disable=hidden or None, desc="videos") as bar:
        for number, item in enumerate(pending):

            def moved(share: float, number: int = number) -> None:
                bar.update(int(100 * (number + share)) - bar.n)

            if hasattr(generator, "on_progress"):
                generator.on_progress = moved  # type: ignore[attr-defined]
            yield item, lambda moved=moved: moved(1.0)


def _write_index(folder: Path, order: Order, made: _Made) -> None:
    content = {"command": shlex.join(order.command), "version": version(), "settings": order.settings}
    write_json(folder / INDEX, content | {"items": made.records})


def _index_names(folder: Path, made: _Made) -> bool:
    """Does the run's index name all that is there?"""
    try:
        items = json.loads((folder / INDEX).read_text(encoding="utf-8"))["items"]
        return {item["path"] for item in items} >= {record["path"] for record in made.records}
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _raise_for(made: _Made, total: int) -> None:
    if made.errors and total == 1:
        raise made.errors[0]
    if made.errors:
        raise BatchError(f"{len(made.errors)} of {total} videos failed; first: {made.errors[0]}")
    bad = [record for record in made.records if record.get("check", {}).get("status") == "failed"]
    if bad:
        reason = ", ".join(map(str, bad[0]["check"].get("failures", ())))
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise OutputCheckError(f"{bad[0]['path']} is written but failed its self-check: {reason}{more}")


def _listed(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [{**asdict(item), "path": str(item.path), "sidecar": str(item.sidecar)} for item in items]
