"""The house's own rules: what no tracked file may say, and that the documents name things that exist."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).resolve().parent.parent
CONFIGURED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = CONFIGURED["project"]
PACKAGE_DATA: list[str] = CONFIGURED["tool"]["setuptools"]["package-data"]["*"]
SCRIPTS: dict[str, str] = PROJECT["scripts"]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("cogvideo_ar", "cogvideox_diff", "shared", "benchmarks")

# One letter of each is in brackets, so that this file does not match itself.
FORBIDDEN = {
    "a package index's host": r"py[p]i\.org|python[h]osted|npm[j]s|download\.py[t]orch|deb\.[d]ebian",
    "a path of one machine": r"(?<![\w.])/wor[k]/|(?<![\w.])/tmp/[w]/|/opt/[p]ypi|/opt/[w]heels",
    "how the work was organised": r"sub[a]gent|steering [r]epo",
    "a TOD[O] without the condition for its removal, as in TOD[O](when ...)": r"\bTOD[O]\b(?!\([^)]+\))",
}


def git_files() -> list[Path]:
    """Tracked files that are there (a file being moved may not be)."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, or git is not installed")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    return [path for path in (ROOT / name for name in listed.stdout.split("\0") if name) if path.is_file()]


@cache
def tracked_texts() -> dict[str, str]:
    """Tracked text files by relative name; a file with a zero byte near its start is binary."""
    contents = {str(path.relative_to(ROOT)): path.read_bytes() for path in git_files()}
    return {
        name: data.decode("utf-8", "replace") for name, data in contents.items() if b"\0" not in data[:8192]
    }


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_no_tracked_file_says(rule: str) -> None:
    pattern = re.compile(FORBIDDEN[rule])
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in tracked_texts().items()
        for match in pattern.finditer(text)
    ]
    assert not found


def test_forbidden_patterns_match_what_they_mean() -> None:
    examples = ("https://pyp" + "i.org/simple", "cd /wor" + "k/main", "a sub" + "agent", "# TO" + "DO: later")
    for pattern, example in zip(FORBIDDEN.values(), examples, strict=True):
        assert re.search(pattern, example)
    assert not re.search(
        list(FORBIDDEN.values())[-1], "# TO" + "DO(when torch 2.14 is the minimum): drop this"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_console_scripts_lead_somewhere(script: str) -> None:
    module, _, name = SCRIPTS[script].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_a_wheel_has_every_file_of_the_packages() -> None:
    """But results, which are kept in a checkout only."""
    files = [path for path in git_files() if path.relative_to(ROOT).parts[0] in PACKAGES]
    homes = [path.parent for path in files if path.name == "__init__.py"]
    found = {path for home in homes for pattern in PACKAGE_DATA for path in home.glob(pattern)}
    found |= {path for path in files if path.suffix == ".py" and path.parent in homes}
    assert not [path for path in files if path not in found and path.parent != ROOT / "benchmarks/results"]


def test_constraints_pin_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras["dev"] + extras["peers"]):
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{requirement.name} has no pin"
        assert requirement.specifier.contains(pinned), f"{requirement} forbids the pin {pinned}"


def code_blocks(path: Path, *languages: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [body for language, body in blocks if language in languages]


def shell_commands() -> list[tuple[str, ...]]:
    """Every command of the documents' shell blocks, split into words, without comments and assignments."""
    lines = [
        line
        for path in DOCUMENTS
        for block in code_blocks(path, "bash", "sh", "shell", "console")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return sorted({tuple(w) for w in words if w})


def as_script(words: tuple[str, ...]) -> tuple[str, ...] | None:
    """The command without its launcher (`.venv/bin/`, `python -m PACKAGE`), or None where it is not ours."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if len(words) > 2 and Path(words[0]).name.startswith("python") and words[1] == "-m":
        module = f"{words[2]}.__main__:main"
        script = next((script for script, target in SCRIPTS.items() if target == module), None)
        return None if script is None else (script, *words[3:])
    return (Path(words[0]).name, *words[1:]) if words and Path(words[0]).name in SCRIPTS else None


OUR_COMMANDS = sorted({command for words in shell_commands() if (command := as_script(words))})


@pytest.mark.parametrize("command", OUR_COMMANDS, ids=" ".join)
def test_documented_commands_exist(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verb answers to --help, and its help names every flag that the document passes."""
    script, *words = command
    verb = [word for word in words[:1] if not word.startswith("-")]
    module, _, name = SCRIPTS[script].partition(":")
    monkeypatch.setattr(sys, "argv", [script, *verb, "--help"])
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(getattr(importlib.import_module(module), name)())
    assert not ended.value.code
    text = capsys.readouterr().out.replace("-", "_")
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(re.escape(flag.replace("-", "_")) + r"\b", text), f"{script} {verb} has no {flag}"


def test_the_documents_have_commands() -> None:
    assert {command[0] for command in OUR_COMMANDS} >= {"cogvideo-ar", "cogvideox", "cogvideo-bench"}


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", text, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documented_python_imports(path: Path) -> None:
    for block in code_blocks(path, "python"):
        compile(block, path.name, "exec")
        for module, names in re.findall(r"^from ([\w.]+) import ([\w, ]+)", block, re.MULTILINE):
            if module.split(".")[0] in PACKAGES:
                for name in names.split(","):
                    assert hasattr(importlib.import_module(module), name.strip()), f"{module}.{name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [t for t in targets if t and "://" not in t and not (path.parent / t).exists()]
    assert not missing


def quirks_in_code() -> set[str]:
    sources = [
        path.read_text(encoding="utf-8") for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    ]
    return {name for source in sources for name in re.findall(r"Quirk\((\w+)\)", source)}


def test_every_quirk_is_documented_and_pinned() -> None:
    documented = (ROOT / "docs" / "quirks.md").read_text(encoding="utf-8")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in sorted(quirks_in_code()):
        assert f"`{name}`" in documented, f"docs/quirks.md has no row for {name}"
        assert f"def test_quirk_{name}" in tests, f"no test_quirk_{name}"


def test_every_documented_quirk_is_in_the_code() -> None:
    text = (ROOT / "docs" / "quirks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert rows
    assert set(rows) <= quirks_in_code()
