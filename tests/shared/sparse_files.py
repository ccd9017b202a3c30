"""Weight files of the released sizes whose numbers are holes, and take no room. Not a test file."""

from __future__ import annotations

import json
import shlex
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


def write_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Any = None) -> Path:
    """In the place of `shared.checkpoints.save_tensors`, for tensors without numbers."""
    header, at = {}, 0
    for name, x in tensors.items():
        end = at + x.numel() * x.element_size()
        header[name] = {"dtype": TYPES[x.dtype], "shape": list(x.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return Path(path)


def write_torch(content: Mapping[str, Mapping[str, Tensor]], path: Path) -> Path:
    """In the place of `torch.save`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    summed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with FakeTensorMode():
            fake = {
                key: {name: torch.empty(x.shape, dtype=x.dtype) for name, x in tensors.items()}
                for key, tensors in content.items()
            }
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(fake, path)
    finally:
        torch.serialization.set_crc32_options(summed)
    _sum_up(path)
    return path


def _sum_up(path: Path) -> None:
    """Write the check sum of the list of tensors, which was left out along with those of the numbers."""
    with zipfile.ZipFile(path) as archive, path.open("r+b") as file:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        file.seek(entry.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
        crc = zlib.crc32(file.read(entry.file_size))
        file.seek(archive.start_dir)
        record = file.read()
        at = record.index(entry.filename.encode()) - 46  # the fixed part of a record, before its name
        file.seek(archive.start_dir + at + 16)
        file.write(struct.pack("<I", crc))


def write_sat(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """A checkpoint folder as SAT writes it."""
    file = write_torch({"module": tensors}, path / "1" / "mp_rank_00_model_states.pt")
    (path / "latest").write_text("1", encoding="utf-8")
    return file


def check_command(line: str) -> list[str]:
    """The words of a proposed command; each must be one that its program takes."""
    from cogvideo_ar.__main__ import PROGRAM as COGVIDEO
    from cogvideox_diff.__main__ import PROGRAM as COGVIDEOX

    words = shlex.split(line, comments=True)
    for command in _commands(words):
        if command[0] in ("cogvideo-ar", "cogvideox"):
            program = COGVIDEO if command[0] == "cogvideo-ar" else COGVIDEOX
            program.parser(command[1]).parse_args(command[1:])
        else:
            assert command[0] in ("rm", "git", "hf"), line
            assert command[0] != "hf" or command[1] == "download"
    return words


def _commands(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts
