"""A program of several verbs: a table of names, and what each says and does in a module of its own."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from shared.config_cli import INTERRUPTED, FlagParser, run
from shared.config_io import to_plain
from shared.interruptions import interrupting_signals, raise_if_interrupted
from shared.json_files import encodable


@dataclass(frozen=True, kw_only=True)
class Program:
    """A console script: `sys.exit(program.main())`.

    `verbs` holds a line for --help on each. Module `PACKAGE.commands.VERB` has `add_arguments(parser)` and
    `run(options)`, which returns an exit code or None for 0. It is imported when its verb is called, so that
    one verb does not wait for the imports of another. `options.command` is the whole command line, as words.
    """

    name: str
    package: str
    description: str | None
    verbs: Mapping[str, str]

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the verb that `argv` (default: this process's arguments) names; returns the exit code."""
        return interruptible(self._run, argv)

    def parser(self, called: str | None = None) -> FlagParser:
        """With the flags of the verb `called` alone; None: of all."""
        parser = FlagParser(prog=self.name, description=self.description or "")
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
        for name, words in self.verbs.items():
            own = verbs.add_parser(name, help=words, description=words)
            if called in (None, name):
                self._module(name).add_arguments(own)
        return parser

    def _run(self, argv: Sequence[str]) -> int | None:
        called = argv[0] if argv and argv[0] in self.verbs else ""
        options = self.parser(called).parse_args(argv)
        options.command = (self.name, *argv)
        return self._module(options.verb).run(options)

    def _module(self, verb: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.commands.{verb}")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """How a verb says what it did."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of sentences")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no settings")


def say(options: argparse.Namespace, content: Mapping[str, Any], lines: Sequence[str]) -> None:
    """`lines` on standard output, or with --json `content` as one object."""
    for line in [json.dumps(to_plain(content), ensure_ascii=False)] if options.json else lines:
        sys.stdout.write(encodable(line) + "\n")


def interruptible(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """`shared.config_cli.run`, where SIGTERM interrupts as Ctrl-C does, so that temporary files go."""

    def until_interrupted(arguments: Sequence[str]) -> int | None:
        try:
            return main(arguments)
        except Exception as error:
            raise_if_interrupted(error)
            raise

    with interrupting_signals():
        try:
            return run(until_interrupted, argv)
        except KeyboardInterrupt:  # while an interruption was being reported
            return INTERRUPTED
