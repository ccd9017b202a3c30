"""Who may import whom, and how long a file may grow: what keeps the families apart and readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {"cogvideo_ar", "cogvideox_diff"}
MAY_IMPORT = {
    "shared": set(),
    "cogvideo_ar": {"shared"},
    "cogvideox_diff": {"shared"},
    "benchmarks": {"shared"} | FAMILIES,
}
NEVER = {"tests"}  # and diffusers, with two doors: the live peer of the benchmark
PEER_DOORS = [ROOT / "benchmarks" / "peers" / name for name in ("diffusion.py", "generator.py")]
FAMILY_DOOR = ROOT / "benchmarks" / "registry.py"
MAX_LINES = 500
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imported_roots(source: str) -> set[str]:
    """First names of all absolute imports, wherever they stand; also of import_module("...")."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    names += [literal_import(node) for node in nodes if isinstance(node, ast.Call)]
    return {name.split(".")[0] for name in names} - {""}


def literal_import(call: ast.Call) -> str:
    """The module that an import call with a literal or partly literal argument names, else ""."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function not in {"import_module", "__import__"} or not call.args:
        return ""
    first = call.args[0].values[0] if isinstance(call.args[0], ast.JoinedStr) else call.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_packages_import_only_downwards(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    roots = imported_roots(path.read_text(encoding="utf-8"))
    assert not (roots & MAY_IMPORT.keys()) - MAY_IMPORT[package] - {package}
    if package == "benchmarks" and path != FAMILY_DOOR:
        assert not roots & FAMILIES, "inside benchmarks only registry.py names a family"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_packages_import_no_tests_and_no_peer(path: Path) -> None:
    roots = imported_roots(path.read_text(encoding="utf-8"))
    assert not roots & NEVER
    if path not in PEER_DOORS:
        assert "diffusers" not in roots


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=relative)
def test_files_have_one_subject(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: two subjects in one room?"


def test_all_packages_are_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == MAY_IMPORT.keys()


@pytest.mark.parametrize(
    ("source", "roots"),
    [
        ("import a.b, c", {"a", "c"}),
        ("from a.b import c", {"a"}),
        ("from . import a", set()),
        ("def f():\n    from a import b", {"a"}),
        ("import importlib\nimportlib.import_module('a.b')", {"importlib", "a"}),
        ("__import__(f'a.{name}')", {"a"}),
        ("import_module(name)", set()),
    ],
)
def test_every_form_of_import_is_seen(source: str, roots: set[str]) -> None:
    assert imported_roots(source) == roots
