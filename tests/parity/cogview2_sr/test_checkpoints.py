"""Checkpoint folders in the released format, and the released sizes on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogvideo_ar.config import CogLMConfig, cogview2_dsr, cogview2_itersr
from cogvideo_ar.generation import GreedySampler
from cogvideo_ar.super_resolution.direct import enlarge_frames
from cogvideo_ar.super_resolution.iterative import refine_frames
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer
from shared.checkpoints import convert, invert, load_tensors
from shared.errors import WeightsError
from tests.parity.cogview2_sr.models import TABLES, build, config_of, folder, greedy_clusters, texts_of
from tests.parity.recorded import read_json, read_tensors

pytestmark = pytest.mark.parity
FACTS: dict[str, Any] = read_json(folder() / "checkpoint_cases.json")
MANIFEST: dict[str, Any] = read_json(folder() / "full_manifest.json")
RELEASED = {"dsr": cogview2_dsr, "itersr": cogview2_itersr}


def loaded(name: str) -> SuperResolutionTransformer:
    path = folder() / f"cogview2-{name}"
    sizes = read_json(path / "model_config.json")
    config = config_of(
        name,
        sizes,
        sizes["layout"],
        num_image_tokens=FACTS["num_image_tokens"],
        start_of_image=FACTS["start_of_image_id"],
        draw=CogLMConfig(temperature=1.0, top_k=FACTS["dsr_topk_clusters"], temperature2=0.6),
    )
    model = build(config, load_tensors(path), TABLES[name])
    assert sum(p.numel() for p in model.parameters()) == FACTS[f"{name}_parameters"]
    return model


def test_greedy_tokens_of_both_folders() -> None:
    """Coarse tokens through the direct model, its tokens through the iterative one."""
    recorded = {name: x.long() for name, x in read_tensors(folder() / "checkpoint_cases.safetensors").items()}
    texts, model = texts_of(recorded["text"]), loaded("dsr")
    sampler = greedy_clusters(recorded["cluster_labels"][: FACTS["num_image_tokens"]])
    uniforms = torch.zeros(len(texts), model.config.fine_len, 2, dtype=torch.float64)
    fine = enlarge_frames(model, texts, recorded["low_tokens"], sampler, uniforms)
    assert torch.equal(fine, recorded["dsr_greedy"])
    model = loaded("itersr")
    samplers = [GreedySampler()] * len(model.config.pass_top_k)
    uniforms = uniforms[:, None].expand(-1, len(samplers), -1, -1)
    refined = refine_frames(model, texts, recorded["dsr_greedy"], samplers, uniforms)
    assert torch.equal(refined, recorded["itersr_greedy"])


@pytest.mark.parametrize("name", TABLES)
def test_tables_lose_nothing(name: str) -> None:
    tensors = read_tensors(folder() / f"{name}_weights.safetensors")
    back = invert(convert(tensors, TABLES[name]), TABLES[name])
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_a_direct_file_is_no_iterative_one() -> None:
    with pytest.raises(WeightsError, match="attention_plus"):
        convert(load_tensors(folder() / "cogview2-dsr"), TABLES["itersr"])


@pytest.mark.parametrize("name", RELEASED)
def test_full_size_manifest(name: str) -> None:
    facts, base, config = MANIFEST[f"cogview2-{name}"], MANIFEST["base_config"], RELEASED[name]()
    assert config.hidden_size == base["hidden_size"] and config.layernorm_eps == base["layernorm_epsilon"]
    assert config.num_positions + config.fine_len == base["new_sequence_length"]
    coarse = [config.coarse_len] if name == "dsr" else []
    ends = torch.tensor([config.text_len, *coarse, config.fine_len]).cumsum(0)
    assert ends.tolist() == facts["layout"]
    with torch.device("meta"):
        model = SuperResolutionTransformer(config)
    first, last = facts["layer_index_range"]
    expected = dict(facts["other"])
    for layer in range(first, last + 1):
        expected |= {key.format(i=layer): shape for key, shape in facts["per_layer"].items()}
    upstream = invert(model.state_dict(), TABLES[name])
    assert {key: list(tensor.shape) for key, tensor in upstream.items()} == expected
    assert len(upstream) == facts["entries"]
    assert sum(x.numel() for x in upstream.values()) == facts["total_parameters"]
