"""Sums (SHA-256) of whole files, compared with those that came with them.

| known from | of |
|---|---|
| `SHA256SUMS` in the folder, `FILE.sha256` beside a file | what they name, as in the demo folders |
| the hub's cache | large files: the blob that a snapshot's link leads to is named by its sum |
| the hub's notes in a folder that it filled (`.cache/huggingface/download/FILE.metadata`) | large files |
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.doctor.containers import leaves
from shared.doctor.report import Finding, bad, note

LIST = "SHA256SUMS"
NOTES = Path(".cache") / "huggingface" / "download"
HASHED = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".model", ".npy"}
READ_BYTES = 1 << 22
MAX_LIST = 1 << 20
_SUM = re.compile(r"[0-9a-f]{64}")
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *]?(.+)")

Progress = Callable[[str, int], object]  # (file, bytes that were just read)


def check_sums(
    path: Path, fetch: Callable[[Path], str], progress: Progress | None = None
) -> tuple[list[Finding], dict[str, str]]:
    """Findings, and the sum of every weight file of a folder (or of the file `path`) by its name."""
    folder = path if path.is_dir() else path.parent
    files = hashed_files(path)
    findings: list[Finding] = []
    sums: dict[str, str] = {}
    unknown = 0
    for file in files:
        name = file.relative_to(folder).as_posix()
        sums[name] = sha256(file, progress)
        known = dict(_known(file, folder))
        unknown += not known
        for source, wanted in known.items():
            if wanted != sums[name]:
                reason = f"{file} has the sum {sums[name]}, {source} says {wanted}: it is damaged or another"
                findings.append(bad(reason, fetch(file) or refetch(file)))
    listed = set(_listed(folder)) if path.is_dir() else set()
    findings += [
        bad(f"{folder / name} is absent, {LIST} lists it", fetch(folder / name))
        for name in sorted(listed - sums.keys())
        if not (folder / name).is_file()
    ]
    if unknown:
        findings.append(note(f"of {unknown} of {len(files)} files no sum is known here; compare by hand"))
    return findings, sums


def hashed_files(path: Path) -> list[Path]:
    """The weight files that a sum is made of."""
    inside = [path] if path.is_file() else sorted(path.rglob("*"))
    named = (file for file in inside if file.suffix in HASHED and file.is_file())
    return [file for file in named if path.is_file() or not leaves(file, path)]


def sha256(file: Path, progress: Progress | None = None) -> str:
    """64 hex digits of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(READ_BYTES):
            digest.update(block)
            if progress is not None:
                progress(file.name, len(block))
    return digest.hexdigest()


def refetch(file: Path) -> str:
    """The command for a file whose source is not known."""
    return f"rm {shlex.quote(str(file))}  # and fetch it again"


def _known(file: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """(who says it, sum)"""
    name = file.relative_to(folder).as_posix()
    if (wanted := _listed(folder).get(name)) is not None:
        yield LIST, wanted
    beside = file.with_name(file.name + ".sha256")
    if beside.is_file() and (found := _SUM.search(_text(beside).lower())):
        yield beside.name, found[0]
    if file.is_symlink() and _SUM.fullmatch(file.resolve().name) and file.resolve().parent.name == "blobs":
        yield "the hub", file.resolve().name
    noted = folder / NOTES / f"{name}.metadata"
    words = _text(noted).split() if noted.is_file() else []
    if len(words) > 1 and _SUM.fullmatch(words[1]):
        yield "the hub", words[1]


def _listed(folder: Path) -> dict[str, str]:
    file = folder / LIST
    lines = _text(file).splitlines() if file.is_file() else []
    found = (match for line in lines if (match := _LINE.fullmatch(line.strip())))
    return {match[2].removeprefix("./"): match[1].lower() for match in found}


def _text(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.read(MAX_LIST).decode("utf-8", errors="replace")
