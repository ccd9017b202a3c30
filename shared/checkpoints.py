"""Checkpoint formats as tables, and the readers and writer of weight files.

A table is a tuple of rules. A rule's names are exact but for placeholders: `{n}` (also `{i}`, `{j}`, `{k}`,
`{m}`) is a run of digits, `{p}` is `weight` or `bias`, `{name}` is any text that is not empty, dots included.
A placeholder stands for the same text wherever it occurs in a rule.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shared.doctor.containers import NUMPY_STATE, check_file, read_header, read_index
from shared.errors import OutputPathError, WeightsError, shown
from shared.files import atomic_path

PLACEHOLDERS = {**dict.fromkeys("nijkm", r"\d+"), "p": "weight|bias", "name": ".+"}
DtypeOf = Callable[[str], torch.dtype] | None
WRAPPERS = ("module", "model", "state_dict")
MAX_WRAPPERS = 8  # one in the other
PREFERRED_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
READ_BYTES = 256 * 2**20  # of a file, between two openings of it where tensors are cast while they are read


# ---- rules


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A change of value and its exact inverse, both working on meta tensors too."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Rule:
    """`sources` joined along `dim`, changed by `value`, cut into equal `targets` along `dim`."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    dim: int = 0
    value: Transform | None = None

    def __post_init__(self) -> None:
        wanted = set(_placeholders(self.sources[0]))
        for name in (*self.sources, *self.targets):
            if set(_placeholders(name)) != wanted:
                raise ValueError(f"placeholders of {name!r} differ from those of {self.sources[0]!r}")

    def apply(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), self.dim)
        if self.value is not None:
            whole = self.value.forward(whole)
        return _cut(whole, len(self.targets), self.dim)

    def inverted(self) -> _Rule | None:
        if not self.targets:
            return None
        value = self.value and Transform(forward=self.value.inverse, inverse=self.value.forward)
        return _Rule(self.targets, self.sources, self.dim, value)


Table = tuple[_Rule, ...]


def Rename(src: str, dst: str, *, value: Transform | None = None) -> _Rule:  # noqa: N802 - reads as a table entry
    """One tensor under another name."""
    return _Rule((src,), (dst,), value=value)


def Split(src: str, dst: Sequence[str], dim: int = 0, *, value: Transform | None = None) -> _Rule:  # noqa: N802
    """One tensor (after `value`) cut into equal parts along `dim`."""
    return _Rule((src,), tuple(dst), dim, value)


def Merge(src: Sequence[str], dst: str, dim: int = 0, *, value: Transform | None = None) -> _Rule:  # noqa: N802
    """Tensors of equal size joined along `dim`, then changed by `value`."""
    return _Rule(tuple(src), (dst,), dim, value)


def Drop(pattern: str) -> _Rule:  # noqa: N802
    """A tensor that the target does not store; running the table backwards does not bring it back."""
    return _Rule((pattern,), ())


def reshape(
    new: Callable[[torch.Size], Sequence[int]], old: Callable[[torch.Size], Sequence[int]]
) -> Transform:
    """The same numbers in another shape; both arguments compute the wanted shape from the given one."""
    return Transform(forward=lambda x: x.reshape(*new(x.shape)), inverse=lambda x: x.reshape(*old(x.shape)))


# ---- engine


def convert(tensors: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Rewrite `tensors` by `table`. Exactly one rule must fit every key, a rule's sources must come together,
    no two rules may write the same name; else WeightsError with the first offenders and their counts."""
    groups, problems = _group(tensors, table)
    result: dict[str, Tensor] = {}
    for (index, binding), parts in groups.items():
        rule, names = table[index], [parts[slot] for slot in sorted(parts)]
        if len(parts) < len(rule.sources):
            absent = (s for i, s in enumerate(rule.sources) if i not in parts)
            problems["missing"] += [_fill(pattern, dict(binding)) for pattern in absent]
            continue
        targets = [_fill(pattern, dict(binding)) for pattern in rule.targets]
        problems["written twice"] += [name for name in targets if name in result]
        result.update(zip(targets, _apply(rule, names, tensors), strict=True))
    if any(problems.values()):
        raise WeightsError(f"checkpoint does not fit the table: {_describe(problems)}")
    return result


def invert(tensors: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Run `table` backwards; what its Drop rules removed stays away."""
    return convert(tensors, tuple(rule for rule in map(_Rule.inverted, table) if rule is not None))


_Groups = dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]]


def _group(keys: Iterable[str], table: Table) -> tuple[_Groups, dict[str, list[str]]]:
    """(rule, placeholder values) -> {source slot: key}, and the keys that no rule or several rules fit."""
    groups: _Groups = {}
    problems: dict[str, list[str]] = {"unmatched": [], "ambiguous": [], "missing": [], "written twice": []}
    for key in keys:
        hits = [
            (index, slot, match)
            for index, rule in enumerate(table)
            for slot, pattern in enumerate(rule.sources)
            if (match := _regex(pattern).fullmatch(key))
        ]
        if len(hits) != 1:
            problems["ambiguous" if hits else "unmatched"].append(key)
            continue
        index, slot, match = hits[0]
        groups.setdefault((index, tuple(sorted(match.groupdict().items()))), {})[slot] = key
    return groups, problems


def _apply(rule: _Rule, names: Sequence[str], tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    try:
        return rule.apply([tensors[name] for name in names]) if rule.targets else ()
    except (ValueError, RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in names)
        raise WeightsError(f"cannot convert {shapes}: {str(error).splitlines()[0]}") from error


def _cut(x: Tensor, count: int, dim: int) -> tuple[Tensor, ...]:
    if count == 1:
        return (x,)
    if x.shape[dim] % count:
        raise ValueError(f"dimension {dim} of size {x.shape[dim]} does not divide into {count}")
    return x.chunk(count, dim)


def _placeholders(pattern: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", pattern)


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{PLACEHOLDERS[name]})"

    if unknown := set(_placeholders(pattern)) - PLACEHOLDERS.keys():
        raise ValueError(
            f"unknown placeholder {sorted(unknown)} in {pattern!r}; legal: {', '.join(PLACEHOLDERS)}"
        )
    return re.compile("".join(re.sub(r"\\\{(\w+)\\\}", group, re.escape(pattern))))


def _fill(pattern: str, binding: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: binding[match[1]], pattern)


def _describe(problems: Mapping[str, Sequence[str]]) -> str:
    """ "2 missing (a, b); 7 unmatched (c, d, e, f, g and 2 more)"; empty lists are left out."""
    return "; ".join(f"{len(names)} {kind} ({shown(names)})" for kind, names in problems.items() if names)


# ---- reading


def load_tensors(path: str | Path, *, device: str = "cpu", dtype_of: DtypeOf = None) -> dict[str, Tensor]:
    """Names and tensors of a .safetensors file, a torch file (tensors only: nothing in it is executed) or a
    folder: sharded with an index, one weight file, or SAT (with `latest`). `device="meta"` reads only names,
    shapes and dtypes. Tensors are mapped files until they are changed. `dtype_of` gives the type that a named
    tensor is to have, if it is a floating one; casting here keeps both versions from being in memory at once.

    Raises WeightsError with a one-line reason (missing, truncated, a Git LFS pointer, not a checkpoint, ...).
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, device, dtype_of)
    if check_file(path) == "safetensors":
        return _load_safetensors(path, device, dtype_of)
    tensors = _load_torch(path, device)
    return tensors if dtype_of is None else {name: _cast(x, dtype_of(name)) for name, x in tensors.items()}


def load_metadata(path: str | Path) -> dict[str, str]:
    """The text entries in the header of a .safetensors file."""
    check_file(Path(path))
    with open_safetensors(Path(path)) as file:
        return dict(file.metadata() or {})


def sat_checkpoint_file(folder: str | Path) -> Path:
    """The one weight file of a SAT folder (or of one nested in it): `latest` names the iteration."""
    files = sat_checkpoint_files(folder)
    if len(files) > 1:
        raise WeightsError(f"{files[0].parent} has {len(files)} model-parallel parts; merge them first")
    return files[0]


def sat_checkpoint_files(folder: str | Path) -> list[Path]:
    """All model-parallel parts of a SAT folder in rank order."""
    latest = _find_latest(Path(folder))
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if tag.isdecimal() and int(tag) > 0:
        tag = str(int(tag))
    elif tag != "release":
        raise WeightsError(f"{latest} must hold a positive iteration number or 'release', got {tag[:40]!r}")
    files = sorted((latest.parent / tag).glob("mp_rank_*_model_states.pt"))
    if not files:
        raise WeightsError(f"missing {latest.parent / tag / 'mp_rank_00_model_states.pt'}, named by {latest}")
    return files


def _find_latest(folder: Path) -> Path:
    if (folder / "latest").is_file():
        return folder / "latest"
    found = [file for pattern in ("*/latest", "*/*/latest") for file in sorted(folder.glob(pattern))]
    if len(found) != 1:
        names = shown([str(file.parent) for file in found])
        reason = f"several checkpoints ({names}); name one" if found else "no file 'latest'"
        raise WeightsError(f"{folder} is not a SAT checkpoint folder: {reason}")
    return found[0]


def _load_folder(folder: Path, device: str, dtype_of: DtypeOf) -> dict[str, Tensor]:
    indexes = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.bin.index.json"))
    if len(indexes) == 1:
        return _load_shards(indexes[0], device, dtype_of)
    for name in PREFERRED_FILES:
        if (folder / name).is_file():
            return load_tensors(folder / name, device=device, dtype_of=dtype_of)
    files = sorted(folder.glob("*.safetensors")) or sorted([*folder.glob("*.pt"), *folder.glob("*.bin")])
    if len(files) == 1:
        return load_tensors(files[0], device=device, dtype_of=dtype_of)
    if files or indexes:
        names = shown([file.name for file in indexes or files])
        raise WeightsError(f"{folder} holds several weight files ({names}); name one")
    if (folder / "latest").is_file():
        return load_tensors(sat_checkpoint_file(folder), device=device, dtype_of=dtype_of)
    raise WeightsError(f"no weight file in {folder} (looked for .safetensors, .bin, .pt and a SAT 'latest')")


def _load_shards(index: Path, device: str, dtype_of: DtypeOf) -> dict[str, Tensor]:
    places = read_index(index)
    shards = sorted(set(places.values()))
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise WeightsError(f"shards of {index} are absent: {_describe({f'of {len(shards)}': absent})}")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= load_tensors(shard, device=device, dtype_of=dtype_of)
    if absent := sorted(places.keys() - tensors.keys()):
        raise WeightsError(f"shards of {index} lack tensors: {_describe({'missing': absent})}")
    return tensors


def open_safetensors(path: Path) -> Any:
    """A `safe_open` whose header was checked; WeightsError else."""
    read_header(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is truncated or not a safetensors file: {str(error).splitlines()[0]}"
        ) from error


def _load_safetensors(path: Path, device: str, dtype_of: DtypeOf) -> dict[str, Tensor]:
    with open_safetensors(path) as file:
        if device == "meta":
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: torch.empty(part.get_shape(), dtype=_dtype(part.get_dtype()), device="meta")
                for name, part in slices.items()
            }
        names = list(file.keys())
        if dtype_of is None:
            return {name: file.get_tensor(name).to(device) for name in names}
    return _load_cast(path, names, device, dtype_of)


def _load_cast(path: Path, names: list[str], device: str, dtype_of: Callable) -> dict[str, Tensor]:
    """Open the file anew now and then: the pages that were read count as memory until it is closed."""
    tensors: dict[str, Tensor] = {}
    while names:
        with open_safetensors(path) as file:
            left = READ_BYTES
            while names and left > 0:
                x = file.get_tensor(name := names.pop(0))
                left -= x.numel() * x.element_size()
                tensors[name] = _cast(x, dtype_of(name)).to(device)
            del x
    return tensors


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _dtype(name: str) -> torch.dtype:
    floats = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BF16": torch.bfloat16}
    if name in floats or name == "BOOL":
        return floats.get(name, torch.bool)
    return getattr(torch, {"F": "float", "I": "int", "U": "uint"}[name[0]] + name[1:])


def _load_torch(path: Path, device: str) -> dict[str, Tensor]:
    zipped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in NUMPY_STATE]):
            content = torch.load(
                path, map_location=device, weights_only=True, mmap=zipped and device != "meta"
            )
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"the Python type {found[1]}" if found else "something that is not plain tensors"
        raise WeightsError(f"{path} is refused: it holds {what}; convert it where it was made") from error
    except Exception as error:  # torch raises of all kinds on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path} is truncated or not a torch checkpoint: {reason}") from error
    return _unwrap(content, path)


class _Inert:
    """Stands for each part of a numpy random state, which SAT files hold and nobody here needs: numpy itself
    never sees what a file says."""

    def __new__(cls, *parts: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *parts: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Open `module`, `model` and `state_dict` wrappers, one inside the other."""
    for _ in range(MAX_WRAPPERS):  # a file can hold a mapping that is its own entry
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds no named tensors (looked inside {', '.join(WRAPPERS)})")
    if others := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        raise WeightsError(f"{path} holds {_describe({'entries that are not tensors': others})}")
    return dict(content)


# ---- writing and loading


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a .safetensors file atomically: after a crash there is the old file or the new one, no half."""
    with atomic_path(path) as temporary:
        try:
            save_file(_unshared(tensors), temporary, dict(metadata or {}))
        except SafetensorError as error:
            raise OutputPathError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
        temporary.chmod(0o644)  # safetensors writes files that only their owner may read
    return Path(path)


def load_into(
    model: nn.Module, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Load strictly and return `model`; WeightsError lists missing and extra names and other shapes. A model
    built on the meta device takes the tensors themselves and their dtype; `dtype` casts floating ones first.
    """
    wanted = model.state_dict()
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if problems := _describe({"missing": missing, "unexpected": extra, "of another shape": sorted(shapes)}):
        raise WeightsError(f"weights do not fit {type(model).__name__}: {problems}")
    if dtype is not None:
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=any(x.is_meta for x in wanted.values()))
    left = [name for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_meta]
    if left and not any(x.is_meta for x in tensors.values()):
        raise WeightsError(
            f"{type(model).__name__} has tensors that no checkpoint fills: {_describe({'empty': left})}"
        )
    return model


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with storage of its own: the format cannot hold views or ties."""
    seen: set[int] = set()
    result = {}
    for name, x in tensors.items():
        x = x.detach().cpu().contiguous()
        storage = x.untyped_storage()
        if storage.nbytes() != x.numel() * x.element_size() or storage.data_ptr() in seen:
            x = x.clone()
        seen.add(x.untyped_storage().data_ptr())
        result[name] = x
    return result
