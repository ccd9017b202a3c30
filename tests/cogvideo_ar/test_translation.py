"""Scripts of prompts, tables of translations, and prompts in Chinese."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from cogvideo_ar.continuation import Given
from cogvideo_ar.options import Options
from cogvideo_ar.pipeline import CogVideoPipeline, CogVideoResult
from cogvideo_ar.translation import Translation, is_chinese, read_translation, script_of
from shared.errors import SettingError
from shared.protocol import GenerationRequest
from tests.cogvideo_ar.tiny_pipeline import tiny_parts

SCRIPTS = [
    ("a lion is drinking water", "LATIN"),
    ("一只狮子在喝水", "CJK"),
    ("一只 lion 在喝水。", "CJK"),
    ("a lion called 狮子 is drinking", "LATIN"),
    ("ライオン", "KATAKANA"),
    ("水を飲む", "HIRAGANA"),
    ("лев пьёт воду", "CYRILLIC"),
    ("사자가 물을 마신다", "HANGUL"),
    ("أسد يشرب الماء", "ARABIC"),
    ("1234 !?", ""),
]


@pytest.mark.parametrize(("text", "script"), SCRIPTS)
def test_scripts(text: str, script: str):
    assert script_of(text) == script
    assert is_chinese(text) == (script in ("CJK", ""))


def test_tables_are_read(tmp_path: Path):
    table = {"a red circle": "红色圆形", "a lion": "狮子", "two\u2028lines": "两"}
    (tmp_path / "a.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    lines = ["# prompt, translation", "", *(f"{a}\t {b} " for a, b in table.items())]
    (tmp_path / "a.tsv").write_text("\n".join(lines), encoding="utf-8")
    for name in ("a.json", "a.tsv"):
        translation = read_translation(tmp_path / name)
        assert translation.table == table
        assert translation(" a lion ") == "狮子" and translation("猫") == "猫"
        with pytest.raises(SettingError, match=r"no translation of 'a lions'; nearest: 'a lion'"):
            translation("a lions")


BAD = [
    ("a.tsv", "a lion 狮子", "line 1: expected a prompt, a tab"),
    ("a.tsv", "# nothing", "has no translations"),
    ("a.json", "[1]", "must be one JSON object"),
    ("a.json", '{"a": 3}', "must be one JSON object"),
    ("a.json", "{", "is not JSON"),
]


@pytest.mark.parametrize(("name", "text", "reason"), BAD)
def test_bad_tables_are_named(tmp_path: Path, name: str, text: str, reason: str):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SettingError, match=reason):
        read_translation(tmp_path / name)
    with pytest.raises(SettingError, match="cannot read translations"):
        read_translation(tmp_path / "no.tsv")


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> CogVideoPipeline:
    """Trained with Chinese prompts, as far as its settings say; its vocabulary has some characters."""
    parts = tiny_parts(tmp_path_factory.mktemp("text"), sentences=["红色圆形向左移动", "a red circle"] * 9)
    sampling = parts.config.sampling
    sampling = replace(sampling, prompts=replace(sampling.prompts, language="zh"))
    parts = replace(parts, config=replace(parts.config, sampling=sampling))
    return CogVideoPipeline(parts, options=Options(rounds=0))


def test_a_chinese_prompt_is_taken_as_it_is(chinese: CogVideoPipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = chinese.generate(GenerationRequest(prompt="红色圆形"))
    assert isinstance(result, CogVideoResult) and result.warnings == ()


def test_another_language_warns_and_a_translation_does_not(chinese: CogVideoPipeline):
    request = GenerationRequest(prompt="a red circle", seed=3)
    with pytest.warns(UserWarning, match="is not Chinese"):
        untranslated = chinese.generate(request)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = chinese.configured(given=Given(translate=Translation({"a red circle": "红色圆形"}, "table")))
        result = table.generate(request)
        own = chinese.configured(given=Given(translate=lambda prompt: "红色圆形")).generate(request)
        direct = chinese.generate(GenerationRequest(prompt="红色圆形", seed=3))
    assert isinstance(result, CogVideoResult) and result.warnings == ("translated to: 红色圆形",)
    assert (result.video.frames == direct.video.frames).all() and (
        own.video.frames == direct.video.frames
    ).all()
    assert (untranslated.video.frames != direct.video.frames).any()


def test_the_command_translates_and_resumes_by_translation(chinese: CogVideoPipeline, tmp_path: Path, capsys):
    from cogvideo_ar.__main__ import main

    chinese.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    words = [
        "generate",
        "--model_path",
        str(tmp_path / "model"),
        "--device",
        "cpu",
        "--quiet",
        "--rounds",
        "0",
    ]
    words += ["--prompt_file", str(tmp_path / "prompts.txt"), "--output_path", str(tmp_path / "out")]
    words += ["--translation", str(tmp_path / "t.tsv")]
    (tmp_path / "t.tsv").write_text("a blue circle\t圆形\n", encoding="utf-8")
    assert main(words) == 2 and "no translation of 'a red circle'" in capsys.readouterr().err
    (tmp_path / "t.tsv").write_text("a red circle\t红色圆形\n", encoding="utf-8")
    assert main(words) == 0
    known = json.loads(next((tmp_path / "out").glob("000*.json")).read_text(encoding="utf-8"))
    assert known["prompt"] == "a red circle" and known["warnings"] == ["translated to: 红色圆形"]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0 and '"kept"' in capsys.readouterr().out
    (tmp_path / "t.tsv").write_text("a red circle\t圆形\n", encoding="utf-8")
    assert main(words) == 2 and "with other settings" in capsys.readouterr().err
