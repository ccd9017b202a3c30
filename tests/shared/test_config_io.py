"""Configs as JSON: what is written is read back, anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import cogvideo_ar.config
import cogvideox_diff.config
from shared.config_io import from_plain, load_config, read_header, save_config, to_plain
from shared.errors import WeightsError

PRESETS: dict[str, Callable[[], Any]] = cogvideo_ar.config.PRESETS | cogvideox_diff.config.PRESETS


@dataclass(frozen=True, kw_only=True)
class Part:
    size: tuple[int, int] = (1, 2)
    rows: tuple[tuple[int, ...], ...] = ((1,), (2, 3))
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.size[0] < 0:
            raise ValueError(f"size must not be negative, got {self.size}")


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: str
    part: Part = field(default_factory=Part)
    other: Part | None = None
    parts: tuple[Part, ...] = ()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back(name: str, tmp_path: Path) -> None:
    config, path = PRESETS[name](), tmp_path / "config.json"
    save_config(config, path, family="f", format=1)
    assert load_config(type(config), path) == config
    assert repr(load_config(type(config), path)) == repr(config)  # tuples stay tuples, integers integers
    header = read_header(path)
    assert (header["family"], header["format"]) == ("f", 1)


@pytest.mark.parametrize(
    "config",
    [
        Whole(name="ä"),
        Whole(name="b", part=Part(size=(3, 4), rows=(), limit=7), other=Part(limit=0)),
        Whole(name="c", parts=(Part(), Part(limit=1))),
    ],
)
def test_nested_and_optional_parts_come_back(config: Whole, tmp_path: Path) -> None:
    save_config(config, tmp_path / "c.json")
    assert load_config(Whole, tmp_path / "c.json") == config


def test_plain_values_are_what_json_knows() -> None:
    plain = to_plain(Whole(name="a", other=Part()))
    assert json.loads(json.dumps(plain)) == plain
    assert plain["other"] == {"size": [1, 2], "rows": [[1], [2, 3]], "limit": None}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda plain: plain.update(colour="red"), r"Whole: unknown fields \['colour'\]"),
        (lambda plain: plain.pop("name"), r"Whole: .*missing fields \['name'\]"),
        (lambda plain: plain["part"].update(sise=[1, 2]), r"Part: unknown fields \['sise'\]"),
        (lambda plain: plain["part"].pop("limit"), r"Part: .*missing fields \['limit'\]"),
    ],
)
def test_fields_that_do_not_belong_are_named(change: Callable[[Any], Any], reason: str) -> None:
    plain = to_plain(Whole(name="a"))
    change(plain)
    with pytest.raises(WeightsError, match=reason):
        from_plain(Whole, plain)


@pytest.mark.parametrize("part", [{"size": [-1, 2]}, {"size": [1, 2, 3]}])
def test_illegal_values_are_refused(part: dict[str, Any]) -> None:
    plain = to_plain(Whole(name="a"))
    plain["part"].update(part)
    with pytest.raises(ValueError):
        from_plain(Whole, plain)


@pytest.mark.parametrize(
    "content", ["", "not json", "[1]", '{"model_type": "t5"}', '{"config": 3}', "\udcff"]
)
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_config(Whole, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.json"):
        read_header(tmp_path / "nowhere.json")


def test_a_config_of_the_other_family_is_refused(tmp_path: Path) -> None:
    save_config(cogvideo_ar.config.cogvideo_demo(), tmp_path / "config.json")
    with pytest.raises(WeightsError, match="CogVideoXConfig: unknown fields"):
        load_config(cogvideox_diff.config.CogVideoXConfig, tmp_path / "config.json")
