"""Frozen dataclass configs to and from JSON, strictly: an unknown or missing field is an error."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from shared.errors import WeightsError
from shared.json_files import read_json

ConfigT = TypeVar("ConfigT")
MOST = 2**63 - 1  # of whole numbers
MOST_LAYERS = 1000  # of any net; a damaged count would have millions of them built


def to_plain(value: Any) -> Any:
    """Nested dataclasses and tuples to dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[ConfigT], plain: dict[str, Any]) -> ConfigT:
    """Inverse of `to_plain` for a dataclass type. Raises WeightsError naming fields that do not belong."""
    hints = typing.get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown, missing = sorted(plain.keys() - fields), sorted(fields - plain.keys())
    if unknown or missing:
        raise WeightsError(f"{kind.__name__}: unknown fields {unknown}, missing fields {missing}")
    values = {name: _parse(hints[name], value) for name, value in plain.items()}
    try:
        for name, value in values.items():
            check_type(hints[name], value, name)
        return kind(**values)
    except WeightsError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise WeightsError(f"{kind.__name__}: {error}") from error


def check_type(hint: Any, value: Any, name: str) -> None:
    """ValueError unless `value` is of the annotated type; a whole number is a number, and numbers are finite.
    What is inside of dictionaries and other classes is not looked at."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if not any(_fits(option, value, name) for option in args):
            raise ValueError(f"{name} must be {_words(hint)}, got {value!r:.80}")
    elif origin is Literal:
        if not any(type(value) is type(legal) and value == legal for legal in args):
            raise ValueError(f"{name} must be one of {list(args)}, got {value!r:.80}")
    elif origin is tuple and isinstance(value, tuple):
        inners = args[:1] * len(value) if args[-1:] == (Ellipsis,) else args
        for inner, item in zip(inners, value, strict=True):
            check_type(inner, item, name)
    elif not _is_plain(origin or hint, value):
        raise ValueError(f"{name} must be {_words(hint)}, got {value!r:.80}")


def _fits(hint: Any, value: Any, name: str) -> bool:
    try:
        check_type(hint, value, name)
    except ValueError:
        return False
    return True


def _is_plain(kind: Any, value: Any) -> bool:
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        most = MOST if isinstance(value, int) else sys.float_info.max
        return number and abs(value) <= most and (kind is float or isinstance(value, int))
    return not isinstance(kind, type) or isinstance(value, kind)


def _words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list"}
    return names.get(typing.get_origin(hint) or hint, str(hint).replace("typing.", ""))


def _parse(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_plain(hint, value)  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in args if a is not type(None)]
        dataclass_like = [a for a in options if dataclasses.is_dataclass(a) or typing.get_origin(a) is tuple]
        return value if value is None or not dataclass_like else _parse(dataclass_like[0], value)
    if origin is tuple and isinstance(value, list):
        inner = [args[0]] * len(value) if args[-1:] == (Ellipsis,) else list(args)
        if len(inner) != len(value):
            raise WeightsError(f"a list of {len(inner)} values is needed, got {len(value)}")
        return tuple(_parse(a, v) for a, v in zip(inner, value, strict=True))
    return value


def save_config(config: Any, path: Path, **header: Any) -> None:
    """Write a config as JSON under "config", beside whatever identifies it (family, format version)."""
    text = json.dumps(header | {"config": to_plain(config)}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def load_config(kind: type[ConfigT], path: Path) -> ConfigT:
    """Read what `save_config` wrote."""
    return from_plain(kind, read_header(path)["config"])


def read_header(path: Path) -> dict[str, Any]:
    """The whole JSON object of a config file; WeightsError when it is not one of ours."""
    plain = read_json(path, WeightsError)
    if not isinstance(plain, dict) or not isinstance(plain.get("config"), dict):
        raise WeightsError(f'{path} is not a model config of this project (no "config" object in it)')
    return plain
