"""The command line: presets with overrides, flags in either spelling, errors as one line and an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NoReturn, TypeVar

from shared.errors import OutOfMemoryError, OutputCheckError, OutputPathError, SettingError, UserError

ConfigT = TypeVar("ConfigT")
INTERRUPTED = 130
MOST = 2**63 - 1  # of whole numbers


# ---- overrides of nested frozen dataclasses


def override(config: ConfigT, setting: str) -> ConfigT:
    """A copy of `config` with one field changed: "transformer.num_layers=2". The text is read by the field's
    type; booleans are true or false, tuples "1,2,2", an optional field may be none. SettingError says what is
    wrong."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise SettingError(f"an override reads FIELD=VALUE, got {setting!r}")
    return _replaced(config, path.split("."), text, path)


def override_all(config: ConfigT, settings: Iterable[str]) -> ConfigT:
    """Several overrides, the last one of a field counts."""
    for setting in settings:
        config = override(config, setting)
    return config


def pick(kind: str, name: str, choices: Mapping[str, ConfigT]) -> ConfigT:
    """choices[name]; SettingError lists the legal names and the nearest one."""
    if name not in choices:
        raise SettingError(f"unknown {kind} {name!r}{nearest(name, choices)}; legal: {', '.join(choices)}")
    return choices[name]


def nearest(name: str, legal: Iterable[str]) -> str:
    """ " (nearest: 'x')", or "" where nothing is near."""
    found = difflib.get_close_matches(name, list(legal), n=1)
    return f" (nearest: {found[0]!r})" if found else ""


def _replaced(config: Any, path: Sequence[str], text: str, whole: str) -> Any:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise SettingError(f"{whole}: a single value has no field {path[0]!r}")
    fields = [field.name for field in dataclasses.fields(config)]
    if path[0] not in fields:
        near = nearest(path[0], fields)
        raise SettingError(
            f"{whole}: no field {path[0]!r} in {type(config).__name__}{near}; legal: {', '.join(fields)}"
        )
    old = getattr(config, path[0])
    if len(path) > 1:
        new = _replaced(old, path[1:], text, whole)
    else:
        new = _parse(text, typing.get_type_hints(type(config))[path[0]], whole)
    return _checked_replace(config, path[0], new, whole)


def _checked_replace(config: Any, field: str, value: Any, whole: str) -> Any:
    try:
        return dataclasses.replace(config, **{field: value})
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(f"{whole}: {error}") from error


def _parse(text: str, hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(text, args, name)
    if origin is Literal:
        return _parse_literal(text, args, name)
    if origin is tuple:
        return _parse_tuple(text, args, name)
    if dataclasses.is_dataclass(hint):
        fields = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(hint))
        raise SettingError(f"{name} is a group of settings; name one: {fields}")
    return _parse_scalar(text, hint, name)


def _parse_scalar(text: str, hint: Any, name: str) -> Any:
    if hint is bool:
        if text not in ("true", "false"):
            raise SettingError(f"{name} is true or false, got {text!r}")
        return text == "true"
    if hint is str:
        return text
    if hint not in (int, float):
        raise SettingError(f"{name} cannot be set by text (its type is {hint})")
    kind = "a whole number" if hint is int else "a number"
    try:
        value = hint(text)
    except ValueError as error:
        raise SettingError(f"{name} is {kind}, got {text!r}") from error
    if abs(value) > MOST if isinstance(value, int) else not math.isfinite(value):
        raise SettingError(f"{name} is {kind}, got {text!r}")
    return value


def _parse_union(text: str, options: Sequence[Any], name: str) -> Any:
    if type(None) in options and text.lower() == "none":
        return None
    errors = []
    for option in (option for option in options if option is not type(None)):
        try:
            return _parse(text, option, name)
        except SettingError as error:
            errors.append(str(error))
    raise SettingError("; or ".join(errors))


def _parse_literal(text: str, options: Sequence[Any], name: str) -> Any:
    return pick(f"value of {name}", text, {str(option): option for option in options})


def _parse_tuple(text: str, args: Sequence[Any], name: str) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
    if args[-1:] == (Ellipsis,):
        args = [args[0]] * len(parts)
    if len(parts) != len(args):
        raise SettingError(f"{name} is {len(args)} values with commas between them, got {text!r}")
    return tuple(_parse(part, hint, name) for part, hint in zip(parts, args, strict=True))


# ---- flags


class FlagParser(argparse.ArgumentParser):
    """An argument parser where --num-frames and --num_frames are the same, abbreviations are refused, and an
    error is one line (with --json one object) and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self._as_json = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        given = list(sys.argv[1:] if args is None else args)
        if empty := [word for word in given if word.startswith("--") and word.endswith("=--")]:
            self._as_json = "--json" in given
            self.error(f"{empty[0].removesuffix('=--')} needs a value")  # argparse would take it as a list
        self._as_json = "--json" in given
        return super().parse_known_args(self._canonical(given), namespace)

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            legal = [flag for flag in self._all_flags() if flag.startswith("--")]
            near = nearest(unknown[0].partition("=")[0], legal)
            self.error(f"unrecognised argument {unknown[0]}{near}")
        self._check_numbers(vars(parsed))
        return parsed

    def _check_numbers(self, values: Mapping[str, Any]) -> None:
        """No flag means infinity, what is not a number, or more than a machine counts to."""
        for name, value in values.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    self.error(f"{name} must be a finite number, got {number}")
                if isinstance(number, int) and not -MOST <= number <= MOST:
                    self.error(
                        f"{name} must be at most {MOST}, got a number of {len(str(abs(number)))} digits"
                    )

    def error(self, message: str) -> NoReturn:
        report(SettingError(f"{self.prog}: {message}"), as_json=self._as_json)
        sys.exit(SettingError.exit_code)

    def _canonical(self, args: Sequence[str]) -> list[str]:
        """Flags in the spelling they were declared in; what follows a bare -- is left alone."""
        declared = {_dashed(flag): flag for flag in self._all_flags() if flag.startswith("--")}
        end = args.index("--") if "--" in args else len(args)
        return [self._declared(arg, declared) for arg in args[:end]] + list(args[end:])

    @staticmethod
    def _declared(arg: str, declared: Mapping[str, str]) -> str:
        flag, equals, value = arg.partition("=")
        return declared.get(_dashed(flag), flag) + equals + value if flag.startswith("--") else arg

    def _all_flags(self) -> list[str]:
        flags = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags += [
                    flag for parser in action.choices.values() for flag in parser._option_string_actions
                ]
        return flags


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")


# ---- the end of a process


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call main(arguments) and give the exit code: its own or 0; of a UserError its code, after one line on
    standard error (with --json one object on standard output); 4 if memory ran out; 5 if training met a NaN;
    2 where the system refused to read or write; 130 if interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        code = main(arguments) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return report(error, as_json=as_json)
    except FloatingPointError as error:
        return report(OutputCheckError(str(error)), as_json=as_json)
    except BrokenPipeError:  # whoever read our output has gone, and wants to hear no more
        _close_output()
        return OutputPathError.exit_code
    except (RuntimeError, MemoryError, OSError, ImportError, SystemError) as error:
        if (told := _of_the_machine(error)) is None:
            raise
        return report(told, as_json=as_json)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def _of_the_machine(error: Exception) -> UserError | None:
    """What the user is told of an error that memory, a disk or a pipe is to blame for; None for a bug."""
    from shared.memory import ran_out  # brings torch, for which --help and a typing error need not wait

    if ran_out(error):
        reason = str(error).splitlines()[0] if str(error) else "no more memory"
        return OutOfMemoryError(f"out of memory: {reason}")
    if isinstance(error, SystemError):  # Python lost a MemoryError of its own, in an import as a rule
        return OutOfMemoryError(f"Python itself could not go on, most likely for lack of memory: {error}")
    if str(error).startswith("Symlink loop"):  # of pathlib, before Python 3.13
        return OutputPathError(str(error))
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename is not None else ""
        return OutputPathError(f"{error.strerror or error}{where}")
    return None


def report(error: UserError, *, as_json: bool = False) -> int:
    """Write an error for the user and return its exit code."""
    reason = _printable(" ".join(str(error).split()))
    content = {"ok": False, "exit_code": error.exit_code, "error": type(error).__name__, "reason": reason}
    try:
        if as_json:
            sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            sys.stderr.write(f"error: {reason}\n")
    except OSError:  # standard output is closed or its disk is full: the exit code says it all
        _close_output()
    return error.exit_code


def _printable(text: str) -> str:
    """What a terminal would obey, and what no encoding has, as escapes."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def _close_output() -> None:
    """What is still to be written to standard output goes nowhere, instead of failing again at the end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
