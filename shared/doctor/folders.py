"""Every weight file below a path, container by container: the part of a diagnosis that knows no model."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from shared.doctor.containers import check_file, leaves, read_index
from shared.doctor.report import Finding, bad
from shared.errors import WeightsError

WEIGHTS = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}
PARTIAL = {".part", ".incomplete", ".crdownload", ".aria2", ".tmp"}
TEXT_POINTERS = {".model", ".json", ".npy"}  # no weights, but kept by Git LFS too
MAX_FILES = 10_000
LFS = b"version https://git-lfs"


def check_files(path: Path) -> list[Finding]:
    """Findings on the file `path`, or on all files below the folder `path`; nothing is executed or followed
    out of it."""
    if not path.exists():
        return [bad(f"there is no {path}")]
    if not path.is_dir():
        return list(_check_weights(path))
    found: list[Finding] = []
    for count, file in enumerate(sorted(path.rglob("*"))):
        if count >= MAX_FILES:
            return [*found, bad(f"{path} has more than {MAX_FILES} files; name the model's folder")]
        found += _check(file, path)
    return found


def _check(file: Path, folder: Path) -> Iterator[Finding]:
    if leaves(file, folder):
        yield bad(f"{file} is a link that leaves the folder; put the file itself there")
    elif file.suffix in PARTIAL:
        yield bad(f"{file} is a download that did not end; resume it", f"rm {shlex.quote(str(file))}")
    elif file.is_dir():
        return
    elif file.name.endswith(".index.json"):
        yield from _check_index(file)
    elif file.suffix in WEIGHTS:
        yield from _check_weights(file)
    elif file.suffix in TEXT_POINTERS and file.is_file():
        with file.open("rb") as opened:
            if opened.read(len(LFS)) == LFS:
                yield bad(f"{file} is a Git LFS pointer, not the file", _pull(file))


def _check_weights(file: Path) -> Iterator[Finding]:
    try:
        check_file(file)
    except WeightsError as error:
        quoted = shlex.quote(str(file))
        lost = "refused" not in str(error) and "not a regular" not in str(error)
        step = _pull(file) if "LFS" in str(error) else f"rm {quoted}  # and fetch it again" if lost else ""
        yield bad(error, step)


def _check_index(index: Path) -> Iterator[Finding]:
    try:
        shards = sorted(set(read_index(index).values()))
    except WeightsError as error:
        yield bad(error)
        return
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        yield bad(f"{index}: {len(absent)} of {len(shards)} shards are absent ({shown}); fetch them")


def _pull(file: Path) -> str:
    return f"git -C {shlex.quote(str(file.parent))} lfs pull --include={shlex.quote(file.name)}"
