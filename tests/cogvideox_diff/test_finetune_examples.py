"""The examples on fine-tuning, with next to no steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cogvideox_diff import CogVideoXPipeline
from shared.clips import shapes
from tests.figures import record_figure

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_new_colour_is_new_and_the_oracle_reads_it() -> None:
    concept = example("lora_new_concept")
    assert not any(concept.WORD in caption.text for caption in shapes.captions())
    scenes = concept.new_scenes(12, 0)
    for scene in scenes:
        reading = shapes.read(shapes.render(scene), concept.COLOURS)
        assert reading.valid
        assert all(reading.agrees(scene.caption.attributes()).values())
    assert {shapes.read(shapes.render(scene)).colour for scene in scenes} <= set(shapes.COLOURS)
    for scene in concept.old_scenes(20, 0):
        assert shapes.read(shapes.render(scene), concept.COLOURS).colour == scene.caption.colour


def test_its_word_is_told_from_every_other() -> None:
    concept = example("lora_new_concept")
    tokenizer = CogVideoXPipeline.from_pretrained("demo", device="cpu").engine.tokenizer
    texts = [scene.caption.text for scene in concept.new_scenes(64, 0)]
    found = tokenizer(texts)
    assert not any(found.truncated)
    others = tokenizer([text.replace(concept.WORD, colour) for text in texts for colour in shapes.COLOURS])
    assert not {tuple(ids) for ids in found.ids.tolist()} & {tuple(ids) for ids in others.ids.tolist()}


@pytest.mark.peers
def test_its_adapter_loads_in_diffusers_pipeline(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    concept = example("lora_new_concept")
    pipeline = CogVideoXPipeline.from_pretrained("demo", device="cpu")
    pipeline.save_pretrained(tmp_path / "base", format="diffusers")
    file = concept.learn(pipeline, tmp_path / "out", steps=2, num_clips=1, quiet=True)
    peer = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "base" / "transformer")
    whole = diffusers.CogVideoXPipeline(None, None, None, peer, diffusers.CogVideoXDDIMScheduler())
    whole.load_lora_weights(str(file.parent))
    net = pipeline.config.transformer
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, net.in_channels, 8, 8, generator=random)
    text = torch.randn(1, net.text_len, net.text_dim, generator=random)
    cos, sin = pipeline.parts.transformer.rope((5, 4, 4), 0, torch.device("cpu"))
    rope = (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1))
    with torch.no_grad():
        ours = pipeline.parts.transformer(x, text, torch.tensor([700]))
        theirs = peer(x, text, torch.tensor([700]), image_rotary_emb=rope, return_dict=False)[0]
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    record_figure("demo transformer with the trained adapter", error, 1e-4)
    assert error <= 1e-4


@pytest.mark.peers
def test_a_training_step_is_that_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    found = example("training_throughput").compare(heads=1, layers=1, repeats=2)
    assert found["loss_apart"] <= 1e-5
    assert found["seconds"]["ours"] > 0
