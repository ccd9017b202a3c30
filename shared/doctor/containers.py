"""Weight files as containers: what they are, whether they are whole and harmless, before a reader sees them.

Only headers are read. A torch file's pickle is listed, never run: `check_file` refuses every name in it that
is not needed to rebuild tensors, and the reader (`torch.load` with `weights_only=True`) refuses them again.
"""

from __future__ import annotations

import json
import math
import pickletools
import re
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from shared.errors import WeightsError

Kind = Literal["safetensors", "torch"]

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
MAX_PICKLE = 2**28
MAX_ENTRIES = 100_000  # of an archive
MAX_INDEX = 2**26
MAX_RANK = 16
MAX_NAME = 1024
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
NUMPY_STATE = tuple(  # what a numpy random state in a SAT file is made of, before and since numpy 2
    [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
    + ["numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType"]
)
_ALLOWED = re.compile(
    r"collections\.OrderedDict|__builtin__\.set|_codecs\.encode|torch\.Size|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.(\w+Storage|storage\.UntypedStorage|storage\.TypedStorage)"
    r"|torch\.(b?float\d+\w*|u?int\d+|bool|half|double|long)"
    + "".join("|" + re.escape(name) for name in NUMPY_STATE)
)
_OPCODES_OF_CODE = {  # that torch.save never writes: other ways to a class, and to hide what was built
    *("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"),
    *("POP", "POP_MARK", "DUP", "NEXT_BUFFER", "READONLY_BUFFER"),
}
_TORCH_ENTRIES = re.compile(
    r"data\.pkl|data/\d+|version|byteorder|\.data/serialization_id|\.format_version|\.storage_alignment"
)
_MAX_TUPLES = 1000  # without a tensor between: deeply nested ones exhaust the stack of who hashes them


def check_file(path: Path) -> Kind:
    """The container's kind, by content. WeightsError where it is absent, no regular file, a Git LFS pointer,
    a web page, cut off, inconsistent, or holds anything but tensors."""
    kind = _file_kind(path)
    if kind == "safetensors":
        read_header(path)
    else:
        _check_torch(path)
    return kind


def _file_kind(path: Path) -> Kind:
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise WeightsError(f"{path} is not a regular file")  # opening a pipe would wait for ever
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    if not head:
        raise WeightsError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights; fetch it with `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(f"{path} is a web page, not weights; the download went wrong")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "torch"
    raise WeightsError(f"{path} is not a checkpoint (neither safetensors nor a torch file)")


# ---- safetensors


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type as the format writes it, shape) of a safetensors file, whose tensors cover it exactly.

    Raises WeightsError for sizes, offsets, names or entries that the format does not allow."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            plain = _strict_json(file.read(length))
        return _tensors(plain, size - 8 - length)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise WeightsError(f"{path} is truncated or not a safetensors file: {reason}") from error


def _strict_json(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("the header names something twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} in the header")

    if not text.startswith(b"{"):
        raise ValueError("the header is not a JSON object")
    return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)


def _tensors(plain: dict[str, Any], data_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    metadata = plain.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("the metadata are not texts")
    spans = sorted((*_span(name, entry), name) for name, entry in plain.items())
    at = 0
    for begin, end, name in spans:
        if begin != at:
            raise ValueError(f"tensor {name!r} begins at {begin}, not at {at} where the one before ends")
        at = end
    if at != data_bytes:
        raise ValueError(f"the header describes {at} bytes of tensors, the file has {data_bytes}")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in plain.items()}


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes lie; ValueError unless they are as many as its type and shape say."""
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"an illegal name {name[:40]!r}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry {name!r} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} is of the unknown type {str(dtype)[:40]!r}")
    if not _sizes(shape) or len(shape) > MAX_RANK or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise ValueError(f"tensor {name!r} has an illegal shape")
    if not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has illegal offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"tensor {name!r} has offsets that do not fit its shape")
    return offsets[0], offsets[1]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


# ---- torch files


def _check_torch(path: Path) -> None:
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        elif path.open("rb").read(2) == b"PK":
            raise WeightsError(f"{path} is truncated: a zip archive without its end")
        else:
            with path.open("rb") as file:  # of before torch 1.6: five pickles, then the numbers
                for _ in range(5):
                    _check_pickle(file, path)
    except WeightsError:
        raise
    except Exception as error:  # the standard library's readers raise of all kinds on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise WeightsError(f"{path} is truncated or not a torch checkpoint: {reason}") from error


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if problem := _archive_problem(archive, entries, path.stat().st_size):
            raise WeightsError(f"{path} is refused: {problem}")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        with archive.open(pickles[0]) as file:
            _check_pickle(file, path)


def _archive_problem(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], size: int) -> str:
    """What is wrong with the archive's table; "" if nothing is."""
    names = [entry.filename for entry in entries]
    if len(names) > MAX_ENTRIES or len(set(names)) < len(names):
        return "its archive has too many files, or one twice"
    if archive.comment:
        return "its archive has a comment, in which another archive can hide"
    if sum(entry.file_size for entry in entries) > size:
        return "its archive says it holds more than its own size"
    if problem := next(filter(None, map(_entry_problem, entries)), ""):
        return problem
    if len({PurePosixPath(name).parts[0] for name in names}) > 1:
        return "its archive has several folders"
    if sum(name.endswith("/data.pkl") for name in names) != 1:
        return "its archive has no list of tensors (data.pkl)"
    return ""


def _entry_problem(entry: zipfile.ZipInfo) -> str:
    name, parts = entry.filename, PurePosixPath(entry.filename).parts
    if not name.isprintable() or "\\" in name or name.startswith("/") or ".." in parts or ":" in name:
        return f"its archive has the illegal path {name[:80]!r}"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return f"its archive has the link {name[:80]!r}"
    if entry.flag_bits & 1 or entry.compress_type != zipfile.ZIP_STORED:
        return f"{name[:80]!r} in its archive is compressed or encrypted"
    if not _TORCH_ENTRIES.fullmatch("/".join(parts[1:])):
        return f"its archive holds {name[:80]!r}, which is not part of a file of tensors"
    if name.endswith("/data.pkl") and entry.file_size > MAX_PICKLE:
        return "its list of tensors is too long"
    return ""


def _check_pickle(file: IO[bytes], path: Path) -> None:
    """WeightsError unless running the pickle could only make tensors, containers and plain values."""
    tuples = 0
    for opcode, argument in _operations(file):
        tuples = 0 if opcode == "REDUCE" else tuples + opcode.startswith("TUPLE")
        if opcode in _OPCODES_OF_CODE or tuples > _MAX_TUPLES:
            what = "nested too deeply" if tuples > _MAX_TUPLES else f"the pickle operation {opcode}"
            raise WeightsError(f"{path} is refused: it holds something that is not plain tensors ({what})")
        name = str(argument).replace(" ", ".")
        if opcode == "GLOBAL" and not _ALLOWED.fullmatch(name):
            shown = name[:80] if name.isprintable() else repr(name[:80])
            raise WeightsError(
                f"{path} is refused: it holds the Python type {shown}; convert it where it was made"
            )


def _operations(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    return ((opcode.name, argument) for opcode, argument, _ in pickletools.genops(file))


# ---- folders


def read_index(index: Path) -> dict[str, Path]:
    """Tensor -> file, of an index of shards. WeightsError where it names a file outside of its folder."""
    try:
        if index.stat().st_size > MAX_INDEX:
            raise ValueError(f"it has more than {MAX_INDEX} bytes")
        places = _strict_json(index.read_bytes().strip())["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError("its weight_map is no table of file names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise WeightsError(f"{index} is not a weight index: {error!r}"[:400]) from error
    files = {name: shard_file(index, name) for name in set(places.values())}
    return {name: files[place] for name, place in places.items()}


def shard_file(index: Path, name: str) -> Path:
    """The file that an index names; it must lie in the index's folder, also if it is a link."""
    file = index.parent / name
    if (
        name in ("", "..")
        or Path(name).name != name
        or not name.isprintable()
        or "\\" in name
        or leaves(file, index.parent)
    ):
        raise WeightsError(
            f"{index} is refused: it names {name[:80]!r}, which is not a file of its own folder"
        )
    return file


def leaves(file: Path, folder: Path) -> bool:
    """Whether `file` is a link to a place outside of `folder`, and not into the blobs of the hub's cache
    (`models--A--B/blobs`, beside the `snapshots` that `folder` is in)."""
    if not file.is_symlink():
        return False
    try:
        target = file.resolve()
        around = folder.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return True
    caches = [p.parent / "blobs" for p in (around, *around.parents) if p.name == "snapshots"]
    return not any(target.is_relative_to(legal) for legal in (around, *caches))
