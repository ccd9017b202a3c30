"""Model folders of this project: finding and telling them, and a mark that changes with the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from shared.config_io import read_header
from shared.errors import UserError, WeightsError

FORMAT = 1
MARK_BYTES = 1 << 20  # of a file's beginning and end that enter the mark


def find_model(source: str | Path, *, demo: Path, family: str) -> Path:
    """The folder that `source` ("demo" or a path) stands for, with a config.json of this family. WeightsError
    says what is missing."""
    folder = demo if str(source) == "demo" else Path(source)
    if not folder.is_dir():
        what = "the demo weights are not installed" if folder == demo else "there is no such model folder"
        raise WeightsError(f"{what}: {folder} (legal: demo, or a folder with config.json and the weights)")
    read_model_header(folder, family)
    return folder


def read_model_header(folder: Path, family: str) -> dict[str, Any]:
    """config.json of a model folder; WeightsError where it is absent, damaged or of another family."""
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder} is not a model of this project: it has no config.json")
    header = read_header(path)
    if header.get("family") != family:
        raise WeightsError(f"{folder} holds a model of the family {header.get('family')!r}, not {family!r}")
    if header.get("format") != FORMAT:
        raise WeightsError(f"{path} has format {header.get('format')!r}; this version reads {FORMAT}")
    return header


def needed(path: Path) -> Path:
    """`path`, if it is a file; else WeightsError."""
    if not path.is_file():
        raise WeightsError(f"{path.parent} lacks {path.name}")
    return path


def weights_mark(folder: Path) -> str:
    """16 hex digits that change with any file but documents: names, sizes, first and last MiB of each.
    `folder` may be a single file."""
    digest = hashlib.sha256()
    inside = [folder] if folder.is_file() else folder.rglob("*")
    for path in sorted(path for path in inside if path.is_file() and not _is_document(path)):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(MARK_BYTES))
            file.seek(max(size - MARK_BYTES, 0))
            digest.update(file.read(MARK_BYTES))
    return digest.hexdigest()[:16]


def _is_document(path: Path) -> bool:
    return path.suffix == ".md" or path.name == "SHA256SUMS"


def combined_mark(folder: Path | None, parts: Mapping[str, Path]) -> str:
    """That of a model folder, or, where parts lie elsewhere, of all of them together."""
    if folder is not None and not parts:
        return weights_mark(folder)
    digest = hashlib.sha256()
    for name, path in {**({} if folder is None else {"": folder}), **parts}.items():
        digest.update(f"{name} {weights_mark(path)}\n".encode())
    return digest.hexdigest()[:16]


class _NoInit(TorchFunctionMode):
    """`torch.nn.init` leaves tensors as they are: on the meta device its random draws are traced, and
    importing the tracer takes longer than reading a small model."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules that are built in the block have shapes and no numbers, until weights are loaded into them.
    WeightsError where there is no such module, for instance because a size is too large to be counted."""
    try:
        with torch.device("meta"), _NoInit():
            yield
    except UserError:
        raise
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"the settings do not describe a net: {reason}") from error
