"""Every weight file below a path, container by container: the part of a diagnosis that knows no model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.doctor.containers import check_file, leaves, read_index
from shared.doctor.report import Finding, bad, note
from shared.doctor.sums import refetch
from shared.errors import SHOWN, WeightsError, shown

WEIGHTS = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}
PARTIAL = {".part", ".incomplete", ".crdownload", ".aria2", ".tmp"}
TEXT_POINTERS = {".model", ".json", ".npy"}  # no weights, but kept by Git LFS too
MAX_FILES = 10_000
LFS = b"version https://git-lfs"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.safetensors|\.bin)")

Fetch = Callable[[Path], str]  # the command that gets a file anew; "" where nobody knows


def unknown_source(file: Path) -> str:
    """The `Fetch` of who knows no source."""
    return ""


def check_files(path: Path, fetch: Fetch = unknown_source) -> list[Finding]:
    """Findings on the file `path`, or on all files below the folder `path`; nothing is executed or followed
    out of it."""
    if not path.exists():
        return [bad(f"there is no {path}")]
    if not path.is_dir():
        text = path.suffix in TEXT_POINTERS and path.is_file()
        return list(_check_text(path, fetch) if text else _check_weights(path, fetch))
    found: list[Finding] = []
    for count, file in enumerate(sorted(path.rglob("*"))):
        if count >= MAX_FILES:
            return [*found, bad(f"{path} has more than {MAX_FILES} files; name the model's folder")]
        found += _check(file, path, fetch)
    inside = (sub for sub in path.rglob("*") if sub.is_dir() and not leaves(sub, path))
    for folder in (path, *sorted(inside)):
        found += _check_series(folder, fetch)
    return found


def _check(file: Path, folder: Path, fetch: Fetch) -> Iterator[Finding]:
    if leaves(file, folder):
        yield bad(f"{file} is a link that leaves the folder; put the file itself there")
    elif file.suffix in PARTIAL:
        yield bad(f"{file} is a download that did not end; resume it", f"rm {shlex.quote(str(file))}")
    elif file.is_dir():
        return
    elif file.name.endswith(".index.json"):
        yield from _check_index(file, fetch)
    elif file.suffix in WEIGHTS:
        yield from _check_weights(file, fetch)
    elif file.suffix in TEXT_POINTERS and file.is_file():
        yield from _check_text(file, fetch)


def _check_text(file: Path, fetch: Fetch) -> Iterator[Finding]:
    with file.open("rb") as opened:
        if opened.read(len(LFS)) == LFS:
            yield bad(f"{file} is a Git LFS pointer, not the file", _pull(file, fetch))


def _check_weights(file: Path, fetch: Fetch) -> Iterator[Finding]:
    try:
        check_file(file)
    except WeightsError as error:
        lost = "refused" not in str(error) and "not a regular" not in str(error)
        step = _pull(file, fetch) if "LFS" in str(error) else fetch(file) or refetch(file) if lost else ""
        yield bad(error, step)


def _check_index(index: Path, fetch: Fetch) -> Iterator[Finding]:
    try:
        shards = sorted(set(read_index(index).values()))
    except WeightsError as error:
        yield bad(error, "" if "refused" in str(error) else fetch(index) or refetch(index))
        return
    absent = [shard for shard in shards if not shard.is_file()]
    if absent:
        names = shown([shard.name for shard in absent])
        step = _each(absent, fetch)
        yield bad(f"{index}: {len(absent)} of {len(shards)} shards are absent ({names}); fetch them", step)
    series = [file for file in index.parent.iterdir() if _SHARD.fullmatch(file.name)]
    stem = index.name.removesuffix(".index.json").rpartition(".")[0]
    if extra := sorted(f.name for f in series if f.name.startswith(f"{stem}-") and f not in shards):
        yield note(f"{index} does not name {shown(extra)}: not part of the model, and not read")


def _check_series(folder: Path, fetch: Fetch) -> Iterator[Finding]:
    """Shards without the index that says what is in them."""
    groups: dict[tuple[str, str, int], set[int]] = {}
    for match in (_SHARD.fullmatch(file.name) for file in folder.iterdir()):
        if match is not None:
            key = match["stem"], match["end"], int(match["count"])
            groups.setdefault(key, set()).add(int(match["number"]))
    for (stem, end, count), numbers in sorted(groups.items()):
        index = folder / f"{stem}{end}.index.json"
        if index.is_file() or count > MAX_FILES:
            continue
        left = sorted(set(range(1, count + 1)) - numbers)
        absent = [index, *(folder / f"{stem}-{number:05d}-of-{count:05d}{end}" for number in left)]
        names = shown([file.name for file in absent])
        yield bad(
            f"{folder} has shards, but not all of them and their index: {names} absent", _each(absent, fetch)
        )


def _each(files: list[Path], fetch: Fetch) -> str:
    steps = [step for step in map(fetch, files[:SHOWN]) if step]
    return " && ".join(steps)


def _pull(file: Path, fetch: Fetch) -> str:
    inside = any((folder / ".git").exists() for folder in file.resolve().parents)
    pull = f"git -C {shlex.quote(str(file.parent))} lfs pull --include={shlex.quote(file.name)}"
    return pull if inside else fetch(file) or pull
