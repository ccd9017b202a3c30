"""Files that are either complete or absent: write under a temporary name, flush to disk, rename."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shared.errors import OutputPathError
from shared.json_files import encodable

LEFTOVER = re.compile(r"\.(?P<stem>.+)\.(?P<machine>[0-9a-f]{8})\.(?P<process>\d+)\.tmp(\.\w+)?")
HERE, EXCHANGE = -100, 2  # of renameat2(2): paths are relative to the working folder; swap what they name


@contextmanager
def atomic_path(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path` (created if absent); on success it becomes `path`, on
    failure nothing is left. The temporary name keeps the suffix, because writers choose their format by it.

    Raises OutputPathError where `path` exists and `overwrite` is false or the folder cannot be written.
    """
    path = Path(path)
    _refuse(path, overwrite)
    temporary = path.with_name(f".{path.stem}.{machine()}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        _replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise OutputPathError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def remove_leftovers(folder: Path, stem: str = "") -> None:
    """Remove what processes of this machine that were killed left half-written in `folder`; `stem`: of the
    target of that name alone. What a living process writes, or one of another machine, stays."""
    for path in folder.glob(".*.tmp*"):
        found = LEFTOVER.fullmatch(path.name)
        if found and found["machine"] == machine() and not running(int(found["process"])):
            if found["stem"] == stem or not stem:
                _remove(path)


def running(process: int) -> bool:
    """Is there such a process here? One that ended and was not yet collected by its parent does not count."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # not ours to ask
        return True
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in "ZX"


def write_json(path: str | Path, content: Mapping[str, Any], *, overwrite: bool = True) -> Path:
    """Write `content` as indented UTF-8 JSON, atomically."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(encodable(text) + "\n", encoding="utf-8")
    return Path(path)


def check_suffix(path: Path, suffix: str, what: str) -> Path:
    """`path`, whose suffix says that the file may be `what`: a film in its place would be lost."""
    if path.suffix != suffix:
        raise OutputPathError(f"{what} is a {suffix} file, got {path}")
    return path


def _refuse(path: Path, overwrite: bool) -> None:
    if path.name in ("", "..") or (path.exists() and not (path.is_file() or path.is_dir())):
        raise OutputPathError(f"{path} is no place for a file: name one in a folder")
    if path.exists() and not overwrite:
        raise OutputPathError(
            f"{path} already exists; choose another name or allow overwriting (--overwrite)"
        )


def _replace(temporary: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(temporary, path)
        return
    if not temporary.is_dir():  # a file in its place would take along all that is in the folder
        raise OutputPathError(f"{path} is a folder; name a file")
    if _exchanged(temporary, path):
        return
    old = path.with_name(f".{path.stem}.old.{machine()}.{os.getpid()}.tmp{path.suffix}")
    os.replace(path, old)  # a folder cannot be renamed over a folder that has files
    os.replace(temporary, path)
    _remove(old)


def _exchanged(a: Path, b: Path) -> bool:
    """Swap two folders in one step, so that a name is never without one; False where the system cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return swap is not None and swap(HERE, os.fsencode(a), HERE, os.fsencode(b), EXCHANGE) == 0


def machine() -> str:
    """This machine, or the container that numbers this process, in 8 hex digits."""
    space = ""
    with suppress(OSError):
        space = str(os.stat("/proc/self/ns/pid").st_ino)
    return f"{zlib.crc32(f'{platform.node()} {space}'.encode()):08x}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # absent, or its folder could never be written
            path.unlink()
