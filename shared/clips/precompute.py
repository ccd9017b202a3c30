"""What an encoder makes of every clip of a list, kept in sharded files: encoded once, trained on many times.

`FOLDER/index.json` says what was encoded, how, and what was left out; `FOLDER/PART/NAME.safetensors` hold the
tensors of some items each, as `KEY.NAME`. A key changes with the clip's content, with how it is prepared and
with the encoder's weights; a shard is named after its keys. So whatever is there is right: an interrupted
call goes on where it was, with the same files as a call that was not, and another list shares what it can.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from shared.checkpoints import load_metadata, load_tensors, open_safetensors, save_tensors
from shared.clips.dataset import Clip, Extent, content_key, probe
from shared.clips.workers import items_of
from shared.config_io import check_type
from shared.errors import (
    BatchError,
    OutOfMemoryError,
    OutputPathError,
    SettingError,
    UserError,
    WeightsError,
)
from shared.files import remove_leftovers, write_json
from shared.json_files import parse_json, read_object, shaped
from shared.runtime import check_workers

FORMAT = 1
INDEX, SUFFIX = "index.json", ".safetensors"
HOLDS = "holds"  # the one metadata entry of a shard: its keys, and what was left out; JSON
T = TypeVar("T")
Sample = dict[str, Tensor]


class ClipReader(Protocol):
    """How a family prepares a clip; worker processes have copies, so it holds no nets."""

    def plan(self, clip: Clip, extent: Extent) -> dict[str, Any]:
        """JSON: all that the encoded clip depends on beside its content and the settings. UserError for a
        clip that does not suit."""
        ...

    def read(self, clip: Clip, plan: Mapping[str, Any]) -> Any:
        """What `encode` takes. UserError for a damaged file."""
        ...


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something to encode, and the key of the result."""

    key: str
    source: Any


@dataclass(frozen=True, kw_only=True)
class Shards:
    """What `write_shards` left behind: `skipped` are keys with the reasons why there is nothing."""

    names: tuple[str, ...]
    skipped: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A clip that suits, with the key of its content; or (`problem`) one that does not."""

    clip: Clip
    content: str = ""
    plan: Mapping[str, Any] | None = None
    problem: str = ""


def make_key(content: str, *about: Any) -> str:
    """32 hex digits of a content and of anything that JSON can write."""
    text = json.dumps([FORMAT, content, *about], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# ---- clips


def plan_clips(
    clips: Sequence[Clip], reader: ClipReader, *, num_workers: int = 0, quiet: bool = False
) -> list[Planned]:
    """Look at every file; those that cannot be used say why."""
    planned = _mapped(clips, partial(_plan, reader), num_workers)
    return list(tqdm(planned, total=len(clips), desc="files", disable=quiet or None))


def _plan(reader: ClipReader, clip: Clip) -> Planned:
    try:
        content = content_key(clip.video)
        return Planned(clip=clip, content=content, plan=reader.plan(clip, probe(clip.video)))
    except UserError as error:
        return Planned(clip=clip, problem=str(error))


def _read(reader: ClipReader, item: Item) -> Any:
    return reader.read(item.source.clip, item.source.plan)


def none_left(skipped: Sequence[Mapping[str, Any]]) -> str:
    """The message where every clip was left out."""
    first = skipped[0]["reason"] if skipped else "the list is empty"
    return f"none of {len(skipped)} clips can be used; first: {first}"


def precompute_clips(
    planned: Sequence[Planned],
    reader: ClipReader,
    encode: Callable[[Any], Sample],
    settings: Mapping[str, Any],
    folder: Path,
    *,
    per_shard: int = 64,
    num_workers: int = 0,
    quiet: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Shards]:
    """Encode the clips into shards in `folder`: rows of the index for those that are there and for those that
    were left out, in the order of the list, and the shards."""
    items = [Item(key=make_key(p.content, p.plan, settings), source=p) for p in planned if not p.problem]
    read = partial(_read, reader)
    shards = write_shards(
        items, read, encode, folder, per_shard=per_shard, num_workers=num_workers, quiet=quiet
    )
    reasons = {item.source.clip.number: shards.skipped.get(item.key, "") for item in items}
    reasons |= {p.clip.number: p.problem for p in planned if p.problem}
    keys = {item.source.clip.number: item.key for item in items}
    done, left = [], []
    for p in planned:
        row: dict[str, Any] = {"number": p.clip.number, "video": p.clip.name}
        if reason := reasons[p.clip.number]:
            left.append(row | {"reason": reason})
        else:
            done.append(row | {"caption": p.clip.caption, "key": keys[p.clip.number], **(p.plan or {})})
    return done, left, shards


# ---- shards


def write_shards(
    items: Sequence[Item],
    read: Callable[[Item], Any],
    encode: Callable[[Any], Sample],
    folder: Path,
    *,
    per_shard: int = 64,
    num_workers: int = 0,
    quiet: bool = False,
    unit: str = "clip",
) -> Shards:
    """Encode what no shard in `folder` holds yet. `read` runs in worker processes, `encode` here, one item at
    a time, so that a result does not depend on its neighbours. Items that raise UserError are left out."""
    if per_shard < 1:
        raise SettingError(f"a shard holds at least 1 item, got {per_shard}")
    items = list({item.key: item for item in items}.values())
    groups = [items[i : i + per_shard] for i in range(0, len(items), per_shard)]
    whole = _whole_shards(folder)
    known = {key: path for path, holds in whole.items() for key in holds["keys"]}
    pending = [item for item in items if item.key not in known]
    fresh = _mapped(pending, partial(_attempt, read), num_workers)
    skipped: dict[str, str] = {}
    with tqdm(total=len(items), desc=folder.name, unit=unit, disable=quiet or None) as bar:
        for group in groups:
            path = folder / f"{_shard_name(group)}{SUFFIX}"
            if path in whole:
                skipped |= whole[path]["skipped"]
                bar.update(len(group))
            else:
                skipped |= _write_shard(path, group, known, fresh, encode, bar)
    return Shards(names=tuple(_shard_name(group) for group in groups), skipped=skipped)


def _write_shard(
    path: Path,
    group: Sequence[Item],
    known: Mapping[str, Path],
    fresh: Iterator[tuple[Any, str]],
    encode: Callable[[Any], Sample],
    bar: tqdm,
) -> dict[str, str]:
    """Write one shard out of other shards and new results; returns what was left out, with reasons."""
    tensors: Sample = {}
    skipped: dict[str, str] = {}
    for item in group:
        if item.key in known:
            sample, reason = _taken_over(known[item.key], item.key)
        else:
            content, reason = next(fresh)
            sample, reason = ({}, reason) if reason else _attempt(encode, content)
        tensors |= {f"{item.key}.{name}": x for name, x in (sample or {}).items()}
        if reason:
            skipped[item.key] = reason
        bar.update()
    holds = {"keys": [item.key for item in group], "skipped": skipped}
    save_tensors(tensors, path, {HOLDS: json.dumps(holds, ensure_ascii=False)})
    return skipped


def _attempt(work: Callable[[T], Any], given: T) -> tuple[Any, str]:
    """(result, "") or (None, why this item cannot be encoded); what would hit every item is raised."""
    try:
        return work(given), ""
    except (OutOfMemoryError, OutputPathError, WeightsError):
        raise
    except UserError as error:
        return None, str(error)


def _taken_over(path: Path, key: str) -> tuple[Sample, str]:
    with open_safetensors(path) as file:
        sample = {n.partition(".")[2]: file.get_tensor(n) for n in file.keys() if n.startswith(f"{key}.")}
    return sample, _holds(path)["skipped"].get(key, "")


def _whole_shards(folder: Path) -> dict[Path, dict[str, Any]]:
    """The shards of earlier calls and what they hold; damaged ones are removed."""
    found: dict[Path, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"[0-9a-f]*{SUFFIX}")):
        try:
            found[path] = _holds(path)
        except (WeightsError, KeyError, ValueError):
            path.unlink()
    return found


def _holds(path: Path) -> dict[str, Any]:
    return parse_json(load_metadata(path)[HOLDS])


def _shard_name(group: Sequence[Item]) -> str:
    return make_key("shard", [item.key for item in group])[:16]


class _Mapped(Dataset):
    def __init__(self, values: Sequence[Any], work: Callable[[Any], Any]) -> None:
        self.values, self.work = values, work

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: int) -> Any:
        return self.work(self.values[place])


def _mapped(values: Sequence[T], work: Callable[[T], Any], num_workers: int) -> Iterator[Any]:
    """`work` of every value, in order; with workers, ahead of need."""
    if check_workers(num_workers) == 0 or not values:
        return iter(map(work, values))
    loader = DataLoader(_Mapped(values, work), batch_size=None, num_workers=num_workers, collate_fn=_same)
    return items_of(loader)


def _same(value: T) -> T:
    return value


# ---- the index


def write_index(
    folder: Path,
    *,
    kind: str,
    settings: Mapping[str, Any],
    clips: Sequence[Mapping[str, Any]],
    skipped: Sequence[Mapping[str, Any]],
    shards: Mapping[str, Shards],
) -> dict[str, Any]:
    """Write FOLDER/index.json, then remove the shards (of the parts in `shards`) that it does not name, and
    what killed processes left half-written."""
    content = {
        "format": FORMAT,
        "kind": kind,
        "settings": dict(settings),
        "num_clips": len(clips),
        "num_skipped": len(skipped),
        "shards": {part: list(of.names) for part, of in shards.items()},
        "skipped": list(skipped),
        "clips": list(clips),
    }
    remove_leftovers(folder)
    write_json(folder / INDEX, content)
    for part, of in shards.items():
        remove_leftovers(folder / part)
        for path in (folder / part).glob(f"*{SUFFIX}"):
            if path.stem not in of.names:
                path.unlink()
    return content


def read_index(folder: Path, kind: str) -> dict[str, Any]:
    """SettingError where there is none, or one of another kind."""
    path = folder / INDEX
    try:
        content = read_object(path, SettingError)
    except SettingError as error:
        raise SettingError(f"{folder} holds nothing precomputed: {error}") from error
    got = content.get("kind"), content.get("format")
    if got != (kind, FORMAT):
        raise SettingError(f"{path} is of (kind, format) {got}, needed is {(kind, FORMAT)}")
    with shaped(path, SettingError):
        for name, hint in (("settings", dict), ("shards", dict), ("clips", list), ("skipped", list)):
            check_type(hint, content[name], name)
        for row in content["clips"]:
            check_type(dict, row, "a clip")
        for names in content["shards"].values():
            check_type(tuple[str, ...], tuple(names), "the names of shards")
    return content


class ShardReader:
    """Items of FOLDER/PART by key. Files are opened when they are first read, in every process anew."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._paths = [folder / f"{name}{SUFFIX}" for name in names]
        self._places: dict[str, tuple[Path, list[str]]] = {}
        for path in self._paths:
            for name in load_tensors(path, device="meta"):
                self._places.setdefault(name.partition(".")[0], (path, []))[1].append(name)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Sample:
        """UserError where the file was damaged since."""
        path, names = self._places[key]
        try:
            with open_safetensors(path) as file:
                return {name.partition(".")[2]: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def tell(options: Any, content: Mapping[str, Any], folder: Path) -> int:
    """Say what was made; the exit code is 7 where clips were left out."""
    from shared.verbs import say

    code = BatchError.exit_code if content["num_skipped"] else 0
    summary = {name: content[name] for name in ("kind", "num_clips", "num_skipped", "skipped", "settings")}
    rows = [f"left out: clip {row['number']} ({row['video']}): {row['reason']}" for row in content["skipped"]]
    said = f"{content['num_clips']} clips in {folder}, {content['num_skipped']} left out"
    say(options, {"ok": code == 0, "exit_code": code, "path": str(folder), **summary}, [*rows, said])
    return code
