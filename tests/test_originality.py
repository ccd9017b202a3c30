"""No run of lines is shared with the code of those whose models are reimplemented here.

Lines are compared without white space, comments, docstrings, imports and lone punctuation, over all packages.
"""

from __future__ import annotations

import importlib.util
import io
import os
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cogvideo_ar", "cogvideox_diff", "shared", "benchmarks")
INSTALLED = ("diffusers", "peft")
RUN = 8  # lines
Lines = list[tuple[int, str]]


def code_lines(path: Path, among: frozenset[str] | None = None) -> Lines:
    """(number, text without white space) of the lines that say something; none of a file in which too few are
    `among` those to look for, which is quick."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [(n, "".join(line.partition("#")[0].split())) for n, line in enumerate(text.splitlines(), 1)]
    if among is not None and sum(line in among for _, line in lines) < RUN:
        return []
    silent = {number for start, end in _docstrings(text) for number in range(start, end + 1)}
    return [
        (n, line)
        for n, line in lines
        if n not in silent
        and any(c.isalnum() for c in line)
        and not line.startswith(("import", "from"))
        and line not in ("else:", "try:", "pass", "return", "@property", "@classmethod", "@staticmethod")
    ]


def _docstrings(text: str) -> Iterator[tuple[int, int]]:
    """First and last lines of strings that stand alone; none of what is not Python."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return
    starts = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.ENCODING)
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == tokenize.STRING and (before is None or before.type in starts):
            yield token.start[0], token.end[0]


def windows(lines: Lines, length: int = RUN) -> Iterator[tuple[int, tuple[str, ...]]]:
    for i in range(len(lines) - length + 1):
        yield lines[i][0], tuple(line for _, line in lines[i : i + length])


def own_windows() -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for number, window in windows(code_lines(path)):
                found.setdefault(window, f"{path.relative_to(ROOT)}:{number}")
    return found


def shared_runs(folder: Path) -> list[str]:
    own = own_windows()
    known = frozenset(line for window in own for line in window)
    return [
        f"{own[window]} ~ {path.relative_to(folder.parent)}:{number}"
        for path in sorted(folder.rglob("*.py"))
        for number, window in windows(code_lines(path, known))
        if window in own
    ]


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("package", INSTALLED)
def test_nothing_is_copied_from(package: str) -> None:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    assert shared_runs(Path(spec.origin).parent) == []


@pytest.mark.skipif("UPSTREAM_SOURCE" not in os.environ, reason="UPSTREAM_SOURCE names no source tree")
def test_nothing_is_copied_from_a_given_tree() -> None:
    """Such as a checkout of the released SAT code."""
    assert shared_runs(Path(os.environ["UPSTREAM_SOURCE"])) == []


def test_a_copied_run_is_found(tmp_path: Path) -> None:
    """One of ours, indented otherwise and with comments between, is found; seven lines of it are not."""
    lines = (ROOT / "shared" / "attention.py").read_text(encoding="utf-8").splitlines()
    own = [line for n, line in enumerate(lines, 1) if n in dict(code_lines(ROOT / "shared" / "attention.py"))]
    (tmp_path / "copy.py").write_text("".join(f"  {line}  # theirs\n\n" for line in own[:RUN]))
    assert len(shared_runs(tmp_path)) == 1
    (tmp_path / "copy.py").write_text("".join(f"  {line}\n" for line in own[: RUN - 1]))
    assert shared_runs(tmp_path) == []
