"""JSON that others wrote: whatever is wrong with a file is an error of the caller's kind, with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import UserError


def parse_json(text: str | bytes) -> Any:
    """The value of a text. ValueError also where it nests too deeply or is no UTF-8."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, kind: type[UserError]) -> Any:
    """The value of a file; `kind` is raised where it cannot be read."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or error
        raise kind(f"cannot read {path}: {reason}") from error


def read_object(path: Path, kind: type[UserError]) -> dict[str, Any]:
    """The object of a file; `kind` is raised also where its value is another."""
    content = read_json(path, kind)
    if not isinstance(content, dict):
        raise kind(f"cannot read {path}: it is a JSON {type(content).__name__}, not an object")
    return content


@contextmanager
def shaped(what: object, kind: type[UserError]) -> Iterator[None]:
    """For what takes apart the values of a file that a program of ours wrote: where they are not as it writes
    them, because somebody changed the file or another version wrote it, `kind` is raised."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise kind(f"{what} does not hold what this program writes there ({reason})") from error


def encodable(text: str) -> str:
    """`text` with the halves of characters that no encoding has written as escapes, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
