"""Where the files of a folder came from, and the command that gets one of them again."""

from __future__ import annotations

import shlex
from pathlib import Path


def hub_repository(folder: Path) -> str:
    """OWNER/NAME of a snapshot in the hub's cache (`models--OWNER--NAME/snapshots/...`), else ""."""
    for around in (folder.absolute(), *folder.absolute().parents):
        words = around.name.split("--")
        if words[0] == "models" and len(words) == 3 and (around / "snapshots").is_dir():
            return "/".join(words[1:])
    return ""


def hub_command(repository: str, file: Path, root: Path) -> str:
    """What fetches `file` of the model folder `root` again; "" without a repository."""
    cached = hub_repository(root)
    if not (repository := cached or repository) or not file.is_relative_to(root):
        return ""
    name = shlex.quote(file.relative_to(_snapshot(root) if cached else root).as_posix())
    place = "" if cached else f" --local-dir {shlex.quote(str(root))}"
    return f"hf download {shlex.quote(repository)} {name}{place} --force-download"


def _snapshot(root: Path) -> Path:
    parts = (root, *root.parents)
    return next((around for around in parts if around.parent.name == "snapshots"), root)
