"""The language of prompts: what script they are written in, and a user's own table of translations."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path

from shared.errors import SettingError
from shared.json_files import parse_json

CHINESE = "CJK"


def script_of(text: str) -> str:
    """The script of most words, by the first word of its letters' Unicode names (CJK, LATIN, HIRAGANA, ...);
    "" without letters. A run of letters is a word; every Chinese character is one."""
    scripts = [_script(character) for character in text]
    counts: Counter[str] = Counter()
    for script, run in groupby(scripts):
        if script:
            counts[script] += len(list(run)) if script == CHINESE else 1
    if counts.keys() & {"HIRAGANA", "KATAKANA"}:  # Japanese, which has Chinese characters too
        counts.pop(CHINESE, None)
    return counts.most_common(1)[0][0] if counts else ""


def _script(character: str) -> str:
    return unicodedata.name(character, "").partition(" ")[0] if character.isalpha() else ""


def is_chinese(text: str) -> bool:
    """Whether most of it is; also true without any letters."""
    return script_of(text) in (CHINESE, "")


@dataclass(frozen=True)
class Translation:
    """A table prompt -> translation; a prompt in Chinese that it lacks is left as it is."""

    table: dict[str, str]
    source: str

    def __call__(self, prompt: str) -> str:
        key = prompt.strip()
        if key in self.table:
            return self.table[key]
        if is_chinese(key):
            return prompt
        near = get_close_matches(key, self.table, n=1, cutoff=0.0)
        raise SettingError(f"{self.source} has no translation of {key!r}; nearest: {near[0]!r}")


def read_translation(path: str | Path) -> Translation:
    """A .json object {prompt: translation}, or a .tsv of two columns. SettingError names a bad line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"cannot read translations from {path}: {error}") from error
    table = _from_json(text, path) if path.suffix.lower() == ".json" else _from_tsv(text, path)
    if not table:
        raise SettingError(f"{path} has no translations")
    return Translation(table, str(path))


def _from_json(text: str, path: Path) -> dict[str, str]:
    try:
        plain = parse_json(text)
    except ValueError as error:
        raise SettingError(f"{path} is not JSON: {error}") from error
    if not isinstance(plain, dict) or not all(isinstance(x, str) and x.strip() for x in plain.values()):
        raise SettingError(f"{path} must be one JSON object of texts: {{prompt: translation}}")
    return {prompt.strip(): translated.strip() for prompt, translated in plain.items()}


def _from_tsv(text: str, path: Path) -> dict[str, str]:
    table = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) != 2 or not all(columns):
            raise SettingError(f"{path}, line {number}: expected a prompt, a tab and its translation")
        table[columns[0]] = columns[1]
    return table
