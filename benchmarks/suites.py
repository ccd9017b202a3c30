"""Suites: which models make which videos, from which prompts and seeds. A suite is a JSON file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from benchmarks.windows import Window
from shared.clips import shapes
from shared.config_cli import pick
from shared.config_io import check_type
from shared.errors import SettingError
from shared.generation_cli import slug
from shared.json_files import read_object

FOLDER = Path(__file__).parent / "suites"
SPLITS = ("heldout", "train")
MOST = 100_000  # videos or clips


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a run does.

    `prompts` is a split of the shapes world, or the texts themselves; `num_clips` clips go through each
    model's codec; `warm_up` makes one video per model that is neither kept nor timed; `feature_files` are the
    nets that some metrics need (`benchmarks.features.files.KINDS`).

    `translations` holds the same prompts in other languages, and `languages` says which model reads which;
    metrics see the prompt itself. `window` is what every model's videos are brought to before they are
    measured. `interleave` keeps all models in memory and lets them take turns, for a fair measure of speed.
    """

    name: str
    models: tuple[str, ...]
    description: str = ""
    prompts: str | tuple[str, ...] = "heldout"
    num_prompts: int = 4
    num_videos_per_prompt: int = 1
    num_clips: int = 8
    seed: int = 0
    warm_up: bool = False
    feature_files: tuple[str, ...] = ()  # KIND=PATH
    translations: dict[str, tuple[str, ...]] = field(default_factory=dict)  # language -> one text per prompt
    languages: dict[str, str] = field(default_factory=dict)  # model -> language
    window: Window | None = None
    interleave: bool = False

    def __post_init__(self) -> None:
        if not self.models or len(set(self.models)) < len(self.models):
            raise SettingError(f"a suite names each model once and at least one; got {list(self.models)}")
        if isinstance(self.prompts, str):
            one_of("prompts", self.prompts, SPLITS)
        elif not 0 < self.num_prompts <= len(self.prompts):
            raise SettingError(f"num_prompts {self.num_prompts} of {len(self.prompts)} given prompts")
        for name, least in (("num_prompts", 1), ("num_videos_per_prompt", 1), ("num_clips", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("num_prompts", "num_videos_per_prompt", "num_clips"):
            if getattr(self, name) > MOST:
                raise SettingError(f"{name} must be at most {MOST}, got {getattr(self, name)}")
        if self.num_prompts * self.num_videos_per_prompt > MOST:
            raise SettingError(f"a suite makes at most {MOST} videos with a model")
        self._check_languages()

    def _check_languages(self) -> None:
        texts = prompt_texts(self) if self.translations else []
        for language, translated in self.translations.items():
            if len(translated) < len(texts):
                raise SettingError(f"{len(texts)} prompts, but {len(translated)} in language {language!r}")
        for model, language in self.languages.items():
            one_of("model of languages", model, self.models)
            one_of("language", language, list(self.translations))

    @property
    def command(self) -> str:
        """The command line that repeats this suite, but for where prompts and results lie."""
        name = self.name if self.name in suite_names() else f"{self.name}.json"
        words = ["cogvideo-bench", "run", name, "--models", *self.models]
        split = self.prompts if isinstance(self.prompts, str) else ""
        words += ["--prompts", split] if split else ["--prompt_file", "PROMPTS.txt"]
        for flag in ("num_prompts", "num_videos_per_prompt", "num_clips", "seed"):
            words += [f"--{flag}", str(getattr(self, flag))]
        words += ["--warm_up" if self.warm_up else "--no-warm_up"]
        words += ["--interleave" if self.interleave else "--no-interleave"]
        words += ["--window", str(self.window)] if self.window else []
        words += ["--feature_files", *self.feature_files] if self.feature_files else []
        return shlex.join(words)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One video to make: `sample` counts the videos of one prompt, and every model gets the same seed.
    `text` is the prompt in the language that the model reads."""

    id: str
    prompt: str
    prompt_index: int
    sample: int
    seed: int
    text: str


def one_of(setting: str, got: str, legal: Sequence[str]) -> str:
    """`got`, if legal; else a SettingError that names the legal values and the nearest."""
    return pick(setting, got, {name: name for name in legal})


def suite_names() -> list[str]:
    """The suites that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_suite(name: str) -> Suite:
    """A suite of the package by name, or any other by the path of its JSON file."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{one_of('suite', name, suite_names())}.json"
    return suite_from(read_object(path, SettingError))


def suite_from(plain: dict[str, Any]) -> Suite:
    """A suite from its JSON object; a field that no suite has is a SettingError."""
    for name in plain:
        one_of("suite field", name, [known.name for known in fields(Suite)])
    if missing := {"name", "models"} - plain.keys():
        raise SettingError(f"a suite needs {' and '.join(sorted(missing))}")
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in plain.items()}
    if isinstance(values.get("window"), dict):
        values["window"] = Window.from_plain(values["window"])
    try:
        for name, hint in get_type_hints(Suite).items():
            if name in values:
                check_type(hint, values[name], name)
        for name in ("translations", "languages"):
            values[name] = {key: _texts(name, value) for key, value in values.get(name, {}).items()}
        return Suite(**values)
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(f"suite: {error}") from error


def _texts(name: str, value: Any) -> str | tuple[str, ...]:
    """A text of `languages`, the texts of `translations`."""
    texts = tuple(value) if isinstance(value, list) else (value,)
    check_type(tuple[str, ...], texts, name)
    if isinstance(value, list) != (name == "translations"):
        raise ValueError(f"{name} must be {'lists of texts' if name == 'translations' else 'texts'}")
    return texts if isinstance(value, list) else value


def items(suite: Suite, model: str = "") -> list[Item]:
    """Every video that each model makes, in order; with what `model` is told."""
    texts = prompt_texts(suite)
    told = suite.translations[suite.languages[model]] if model in suite.languages else texts
    each = suite.num_videos_per_prompt
    return [
        Item(
            id=f"{index:03d}-{sample}-{slug(text, 48)}",
            prompt=text,
            prompt_index=index,
            sample=sample,
            seed=suite.seed + index * each + sample,
            text=told[index],
        )
        for index, text in enumerate(texts)
        for sample in range(each)
    ]


def prompt_texts(suite: Suite) -> list[str]:
    if isinstance(suite.prompts, str):
        return [caption.text for caption in world_captions(suite, suite.num_prompts)]
    return list(suite.prompts[: suite.num_prompts])


def world_captions(suite: Suite, num: int) -> list[shapes.Caption]:
    """The suite's prompts as captions of the shapes world; given texts fall back to the held-out split."""
    split = "train" if suite.prompts == "train" else "heldout"
    return shapes.prompts(split, num, suite.seed)
