"""SAT checkpoints of both stages: real-format files, the way back, and the released sizes on the meta
device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogvideo_ar.checkpoints import SAT_STAGE
from cogvideo_ar.config import PRESETS, TransformerConfig
from cogvideo_ar.transformer import CogVideoTransformer
from shared.checkpoints import convert, invert, load_tensors
from shared.errors import WeightsError
from tests.parity.cogvideo_ar.stages import config_of, folder, fullvocab_weights, special_ids, stage_weights
from tests.parity.recorded import read_json, read_tensors

pytestmark = pytest.mark.parity


def sat_folders() -> list[Path]:
    return sorted(path for path in (folder() / "sat_checkpoints").iterdir() if path.is_dir())


def test_checkpoints_are_there():
    assert len(sat_folders()) == 2


@pytest.mark.parametrize("path", sat_folders(), ids=lambda path: path.name)
def test_real_format_file(path: Path):
    """The file's tensors are the recorded weights, fit the model strictly, and come back unchanged."""
    facts = read_json(path / "model_config.json")
    tensors = load_tensors(path)
    expected = stage_weights(facts["cogvideo_stage"])
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)

    config = config_of(
        facts | {"num_image_tokens": min(special_ids().values())},
        window=facts["window_size"],
        start_of_image=special_ids()["<start_of_image>"],
        frame_len=facts["layout"][1] - facts["layout"][0],
    )
    with torch.device("meta"):
        model = CogVideoTransformer(config)
    converted = convert(tensors, SAT_STAGE)
    model.load_state_dict(converted, strict=True, assign=True)
    back = invert(converted, SAT_STAGE)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_base_and_temporal_parts():
    """The trainable subset is upstream's `mixins.*`, nothing else."""
    shapes = {name: tensor.to("meta") for name, tensor in fullvocab_weights().items()}
    config = read_json(folder() / "fullvocab.json")["config"]
    layout = read_json(folder() / "train_cases.json")["config"]["layout"]
    with torch.device("meta"):
        model = CogVideoTransformer(
            config_of(
                config,
                window=0,
                start_of_image=config["num_image_tokens"],
                frame_len=layout[1] - layout[0],
            )
        )
    temporal, base = dict(model.temporal_parameters()), dict(model.base_parameters())
    assert temporal.keys() | base.keys() == dict(model.named_parameters()).keys()
    mixins = {name for name in shapes if name.startswith("mixins.")}
    assert temporal.keys() == convert({name: shapes[name] for name in mixins}, SAT_STAGE).keys()


def test_unknown_keys_are_refused():
    with pytest.raises(WeightsError, match="surprise"):
        convert(stage_weights(1) | {"transformer.surprise": torch.zeros(1)}, SAT_STAGE)


def released(stage: str) -> TransformerConfig:
    config = PRESETS["cogvideo"]()
    return config.keyframes if stage == "stage1" else config.interpolation


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_full_size_manifest(stage: str):
    manifest = read_json(folder() / "full_size_manifest.json")
    config, facts = released(stage), manifest["config"]
    assert (config.num_layers, config.num_heads) == (facts["num_layers"], facts["num_attention_heads"])
    assert (config.hidden_size, config.vocab_size) == (facts["hidden_size"], facts["vocab_size"])
    assert config.window == max(manifest[stage]["window_size"], 0)
    with torch.device("meta"):
        model = CogVideoTransformer(config)
    upstream = invert(model.state_dict(), SAT_STAGE)
    assert {name: list(tensor.shape) for name, tensor in upstream.items()} == manifest["parameters"]
    assert len(upstream) == manifest["entries"]
    counts = manifest["counts"]
    assert sum(p.numel() for _, p in model.base_parameters()) == counts["base_transformer"]
    assert sum(p.numel() for _, p in model.temporal_parameters()) == counts["trainable_mixins"]


def test_recorded_weights_are_float16():
    """The table moves tensors, it does not touch them."""
    weights = read_tensors(folder() / "weights_stage1.safetensors")
    assert {tensor.dtype for tensor in convert(weights, SAT_STAGE).values()} == {torch.float16}
