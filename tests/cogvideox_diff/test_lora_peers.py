"""Adapters of ours in diffusers' live transformer, and its in ours."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideox_diff import lora
from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER
from cogvideox_diff.commands import lora as lora_command
from cogvideox_diff.lora import inject, load_lora, save_lora
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import convert, load_into
from tests.cogvideox_diff.tiny_lora import ALPHA, RANK, randomise
from tests.figures import record_figure
from tests.parity.cogvideox.tiny_sat import from_diffusers, relative_error

PEER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 24,
    "ofs_embed_dim": None,
    "text_embed_dim": 20,
    "num_layers": 2,
    "sample_height": 4,
    "sample_width": 6,
    "sample_frames": 9,
    "patch_size": 2,
    "patch_size_t": None,
    "max_text_seq_length": 5,
    "spatial_interpolation_scale": 1.875,
    "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False,
}


def peer_and_ours() -> tuple[Any, ExpertTransformer]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    peer = diffusers.CogVideoXTransformer3DModel(**PEER).eval()
    model = ExpertTransformer(from_diffusers(PEER, final_norm_eps=1e-5)).eval()
    return peer, load_into(model, convert(peer.state_dict(), DIFFUSERS_TRANSFORMER))


def outputs(peer: Any, model: ExpertTransformer) -> tuple[Tensor, Tensor]:
    latents, text, steps = torch.randn(2, 3, 4, 4, 6), torch.randn(2, 5, 20), torch.tensor([999, 17])
    with torch.no_grad():
        return peer(latents, text, steps, return_dict=False)[0], model(latents, text, steps)


@pytest.mark.peers
@pytest.mark.parametrize("targets", [lora.TARGETS, ("attn.v", "mlp.fc1", "norm1.video", "norm1.text")])
def test_diffusers_pipeline_loads_ours(tmp_path: Path, targets: tuple[str, ...]) -> None:
    pytest.importorskip("peft")
    import diffusers

    peer, model = peer_and_ours()
    inject(model, RANK, ALPHA, targets)
    randomise(model)
    pipe = diffusers.CogVideoXPipeline(None, None, None, peer, diffusers.CogVideoXDDIMScheduler())
    plain, ours = outputs(peer, model)
    assert relative_error(plain, ours) > 1e-2
    pipe.load_lora_weights(str(save_lora(model, tmp_path).parent))
    wanted, ours = outputs(peer, model)
    error = relative_error(ours, wanted)
    print(f"{error:.1e}")
    record_figure("transformer with an adapter", error, 1e-4)
    assert error <= 1e-4


@pytest.mark.peers
def test_diffusers_saves_what_we_load(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import diffusers

    peer, model = peer_and_ours()
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=5, target_modules=["to_q", "to_out.0"], init_lora_weights=False
    )
    peer.add_adapter(settings)
    layers = peft.get_peft_model_state_dict(peer)
    told = {"r": RANK, "lora_alpha": 5, "target_modules": ["to_q", "to_out.0"]}
    diffusers.CogVideoXPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=told
    )
    report = load_lora(model, tmp_path)
    assert (report.matched, report.alphas) == (4, [5])
    wanted, ours = outputs(peer, model)
    error = relative_error(ours, wanted)
    print(f"{error:.1e}")
    record_figure("transformer with an adapter", error, 1e-4)
    assert error <= 1e-4


@pytest.mark.peers
def test_diffusers_with_merged_weights_agrees(tmp_path: Path) -> None:
    """The same without PEFT: a diffusers folder merged by us."""
    peer, model = peer_and_ours()
    base = copy.deepcopy(peer)
    base.save_pretrained(tmp_path / "base")
    inject(model, RANK, ALPHA)
    randomise(model)
    file = save_lora(model, tmp_path / "lora")
    lora_command.merge_files(file, tmp_path / "merged", base=tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = type(peer).from_pretrained(tmp_path / "merged").eval()
    wanted, ours = outputs(merged, model)
    record_figure("transformer with an adapter merged by us", relative_error(ours, wanted), 1e-4)
    assert relative_error(ours, wanted) <= 1e-4
