"""Files that are either complete or absent: write under a temporary name, flush to disk, rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shared.errors import OutputPathError


@contextmanager
def atomic_path(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path` (created if absent); on success it becomes `path`, on
    failure nothing is left. The temporary name keeps the suffix, because writers choose their format by it.

    Raises OutputPathError where `path` exists and `overwrite` is false or the folder cannot be written.
    """
    path = Path(path)
    _refuse(path, overwrite)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
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


def write_json(path: str | Path, content: Mapping[str, Any], *, overwrite: bool = True) -> Path:
    """Write `content` as indented UTF-8 JSON, atomically."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def _refuse(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise OutputPathError(
            f"{path} already exists; choose another name or allow overwriting (--overwrite)"
        )


def _replace(temporary: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(temporary, path)
        return
    old = temporary.with_name(
        temporary.name + ".old"
    )  # a folder cannot be renamed over a folder that has files
    os.replace(path, old)
    os.replace(temporary, path)
    _remove(old)


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
