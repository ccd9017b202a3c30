"""docs/architecture.svg is what the code says today."""

from __future__ import annotations

from xml.etree import ElementTree

from tests.reliability.families import ROOT, example

PICTURE = ROOT / "docs" / "architecture.svg"


def test_the_picture_is_that_of_this_code() -> None:
    drawn = example("draw_architecture").draw()
    assert PICTURE.read_text(encoding="utf-8") == drawn, "run: python examples/draw_architecture.py"
    ElementTree.fromstring(drawn)


def test_rows_and_arrows_follow_the_imports() -> None:
    drawing = example("draw_architecture")
    links = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "x": {"y"}, "y": {"x", "c"}}
    assert drawing.reduced(links) == {"a": {"b"}, "b": {"c"}, "c": set(), "x": {"y"}, "y": {"x", "c"}}
    assert drawing.levels(links) == {"a": 2, "b": 1, "c": 0, "x": 1, "y": 1}
    for package in drawing.FAMILIES:
        found = drawing.graph(package)
        assert {"transformer", "config", "pipeline", "commands/"} <= found.keys()
        assert "config" in drawing.reach(found, "transformer")
        assert {"text", "decode"} <= set(drawing.stages(package))
    assert not any(drawing.imported(path) & {"tests"} for path in drawing.modules("shared")["files"])
