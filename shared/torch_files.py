"""Torch files that are either complete or absent."""

from __future__ import annotations

from pathlib import Path

import torch

from shared.errors import OutputPathError
from shared.files import atomic_path
from shared.memory import ran_out


def save_torch(content: object, path: str | Path) -> Path:
    """Write a torch file atomically; OutputPathError where it cannot be written."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of the archive's writer, which only says where in the archive
            if ran_out(error):
                raise
            raise OutputPathError(f"cannot write {path}: {_reason(error)}") from error
    return Path(path)


def _reason(error: BaseException) -> str:
    """What the system said to the write that failed first."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return str(cause.strerror or cause) if cause else "the file cannot be written whole; is the disk full?"
