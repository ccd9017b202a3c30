"""Weights in 8 bits: what the stages share stays shared, and it is said that the video is not exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cogvideo_ar import memory
from cogvideo_ar.__main__ import main
from cogvideo_ar.parts import save_parts
from cogvideo_ar.pipeline import CogVideoPipeline
from shared.errors import SettingError
from shared.offload import blocks_of
from shared.quantize import is_quantized, quantize_mode
from tests.cogvideo_ar.tiny_pipeline import tiny_parts

PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    return save_parts(tiny_parts(folder), folder / "model")


def test_shared_weights_stay_shared(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that halves every matrix of the blocks."""

    def halve(net: nn.Module, mode: str) -> nn.Module:
        for block in blocks_of(net):
            for part in block.modules():
                if isinstance(part, nn.Linear):
                    part.weight = nn.Parameter(part.weight / 2, requires_grad=False)
        return net

    parts = CogVideoPipeline.from_pretrained(model).parts
    before = {name: x.clone() for name, x in parts.interpolation.named_parameters()}
    pairs = zip(parts.keyframes.parameters(), parts.interpolation.parameters(), strict=True)
    shared = sum(x is y for x, y in pairs)
    monkeypatch.setattr(memory, "quantize", halve)
    assert memory.quantized(parts, "none") is parts and not is_quantized(parts.keyframes)
    memory.quantized(parts, "int8")
    pairs = zip(parts.keyframes.parameters(), parts.interpolation.parameters(), strict=True)
    assert sum(x is y for x, y in pairs) == shared > 0
    for name, x in parts.interpolation.named_parameters():
        halved = name.startswith("blocks.") and x.ndim == 2
        torch.testing.assert_close(x, before[name] / 2 if halved else before[name])


def test_plain_weights_are_exact(model: Path) -> None:
    pipeline = CogVideoPipeline.from_pretrained(model)
    assert quantize_mode(pipeline.parts.keyframes) == "none" and "approximate" not in pipeline.settings()


def test_unknown_bits_are_refused(model: Path) -> None:
    with pytest.raises(SettingError, match="unknown quantize 'int4'; legal: none, int8, fp8"):
        CogVideoPipeline.from_pretrained(model, quantize="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_eight_bits_make_a_video_that_says_so(model: Path, tmp_path: Path, mode: str) -> None:
    pytest.importorskip("torchao", reason="extra quant")
    path = tmp_path / "a.mp4"
    words = ["generate", "--prompt", PROMPT, "--model_path", str(model), "--device", "cpu", "--quiet"]
    assert main([*words, "--output_path", str(path), "--quantize", mode]) == 0
    assert json.loads(path.with_suffix(".json").read_text())["settings"]["approximate"] == {"quantize": mode}
    pipeline = CogVideoPipeline.from_pretrained(model, quantize=mode)  # type: ignore[arg-type]
    assert quantize_mode(pipeline.parts.keyframes) == mode
    assert pipeline.settings()["approximate"] == {"quantize": mode}
    with pytest.raises(SettingError, match="quantized"):
        pipeline.save_pretrained(tmp_path / "saved")
