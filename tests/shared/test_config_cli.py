"""Overrides, flags in both spellings, and how a process ends."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch

from shared.config_cli import FlagParser, nearest, override, override_all, pick, run
from shared.errors import SettingError, WeightsError


@dataclass(frozen=True, kw_only=True)
class Net:
    num_layers: int = 4
    scale: float = 1.0
    patch: tuple[int, int, int] = (1, 2, 2)
    widths: tuple[int, ...] = (1, 2)
    position: Literal["sincos", "rope"] = "sincos"
    bias: bool = True
    limit: int | None = 3
    name: str = "a"

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be positive, got {self.num_layers}")


@dataclass(frozen=True, kw_only=True)
class Config:
    net: Net = field(default_factory=Net)
    steps: int = 50


LEGAL = [
    ("net.num_layers=2", "num_layers", 2),
    ("net.scale=1e-3", "scale", 1e-3),
    ("net.scale=2", "scale", 2.0),
    ("net.patch=2,2,4", "patch", (2, 2, 4)),
    ("net.patch=(2, 2, 4)", "patch", (2, 2, 4)),
    ("net.widths=5", "widths", (5,)),
    ("net.position=rope", "position", "rope"),
    ("net.bias=false", "bias", False),
    ("net.limit=none", "limit", None),
    ("net.limit=7", "limit", 7),
    ("net.name=x=y", "name", "x=y"),
]


@pytest.mark.parametrize(("setting", "name", "value"), LEGAL)
def test_values_are_read_by_the_type_of_their_field(setting, name, value):
    changed = override(Config(), setting)
    got = getattr(changed.net, name)
    assert got == value and type(got) is type(value)
    assert override(changed, f"steps={changed.steps}") == changed != Config()


ILLEGAL = [
    ("net.num_layer=2", "no field 'num_layer' in Net (nearest: 'num_layers')"),
    ("nett.num_layers=2", "no field 'nett' in Config (nearest: 'net')"),
    ("net.bias=True", "true or false"),
    ("net.bias=1", "true or false"),
    ("net.num_layers=2.0", "a whole number, got '2.0'"),
    ("net.scale=nan", "a number, got 'nan'"),
    ("net.patch=1,2", "3 values"),
    ("net.patch=1,2,x", "whole number, got 'x'"),
    ("net.position=ropes", "(nearest: 'rope'); legal: sincos, rope"),
    ("net.limit=many", "a whole number"),
    ("net=3", "group of settings; name one: net.num_layers"),
    ("steps.more=3", "single value has no field 'more'"),
    ("net.num_layers=0", "net.num_layers: num_layers must be positive"),
    ("steps", "FIELD=VALUE"),
]


@pytest.mark.parametrize(("setting", "reason"), ILLEGAL)
def test_illegal_overrides_say_why(setting, reason):
    with pytest.raises(SettingError) as caught:
        override(Config(), setting)
    assert reason in str(caught.value)


def test_the_last_override_counts():
    assert override_all(Config(), ["steps=1", "net.bias=false", "steps=2"]) == Config(
        net=Net(bias=False), steps=2
    )


def test_pick_and_nearest():
    assert pick("preset", "demo", {"demo": 1}) == 1
    with pytest.raises(SettingError, match=r"unknown preset 'dmo' \(nearest: 'demo'\); legal: demo, tiny"):
        pick("preset", "dmo", {"demo": 1, "tiny": 2})
    assert nearest("qqq", ["demo"]) == ""


def make_parser() -> FlagParser:
    parser = FlagParser(prog="tool")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate")
    generate.add_argument("--num_frames", type=int)
    generate.add_argument("--dry-run", action="store_true")
    generate.add_argument("--prompt")
    generate.add_argument("--json", action="store_true")
    return parser


@pytest.mark.parametrize("flags", [["--num-frames", "9"], ["--num_frames=9"], ["--num-frames=9"]])
def test_dash_and_underscore_are_the_same(flags):
    assert make_parser().parse_args(["generate", *flags]).num_frames == 9
    assert make_parser().parse_args(["generate", "--dry_run"]).dry_run


def test_values_keep_their_underscores():
    parsed = make_parser().parse_args(["generate", "--prompt=a_b --c_d", "--num-frames", "9"])
    assert parsed.prompt == "a_b --c_d"


BAD_FLAGS = [
    (["generate", "--num_frame", "9"], "unrecognised argument --num_frame (nearest: '--num_frames')"),
    (["generate", "--num_frames", "x"], "invalid int value: 'x'"),
    (["make"], "invalid choice: 'make'"),
    ([], "required: command"),
]


@pytest.mark.parametrize(("arguments", "reason"), BAD_FLAGS)
def test_bad_flags_exit_with_2_and_one_line(arguments, reason, capsys):
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(arguments)
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert reason in printed.err and printed.err.count("\n") == 1


def test_bad_flags_with_json_are_one_object(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["generate", "--json", "--oops"])
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


def failing(error: BaseException):
    def main(arguments):
        raise error

    return main


def test_run_gives_mains_own_code():
    assert run(lambda arguments: None, []) == 0
    assert run(lambda arguments: len(arguments), ["a", "b", "c"]) == 3


ENDINGS = [
    (SettingError("bad\nvalue"), 2, "bad value"),
    (WeightsError("no weights"), 3, "no weights"),
    (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 4, "CUDA out of memory."),
    (MemoryError(), 4, "no more memory"),
    (OSError(12, "Cannot allocate memory"), 4, "out of memory"),
    (ImportError("x.so: failed to map segment from shared object"), 4, "out of memory"),
    (RuntimeError("can't start new thread"), 4, "out of memory"),
    (RuntimeError("could not create a primitive"), 4, "out of memory"),
    (RuntimeError("Resource temporarily unavailable"), 4, "out of memory"),
    (SystemError("error return without exception set"), 4, "for lack of memory"),
    (OSError(28, "No space left on device", "a.mp4"), 2, "No space left on device: a.mp4"),
    (FloatingPointError("the loss is nan at step 3"), 5, "the loss is nan at step 3"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize(("error", "code", "reason"), ENDINGS)
def test_run_turns_errors_into_one_line_and_a_code(error, code, reason, capsys):
    assert run(failing(error), []) == code
    printed = capsys.readouterr()
    assert reason in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_run_with_json_prints_one_object(capsys):
    assert run(failing(WeightsError("no weights")), ["--json"]) == 3
    expected = {"ok": False, "exit_code": 3, "error": "WeightsError", "reason": "no weights"}
    assert json.loads(capsys.readouterr().out) == expected


def test_a_bug_keeps_its_traceback():
    for error in (ZeroDivisionError(), RuntimeError("shapes differ"), ImportError("no module named x")):
        with pytest.raises(type(error)):
            run(failing(error), [])
