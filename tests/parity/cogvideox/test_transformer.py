"""The expert transformer against recorded SAT calls, diffusers live, and the released manifests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER, sat_transformer_table
from cogvideox_diff.config import PRESETS, TransformerConfig
from cogvideox_diff.training.objective import diffusion_loss
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import convert, invert, load_into, load_tensors
from tests.figures import record_figure
from tests.parity.cogvideox.tiny_sat import (
    case_names,
    from_diffusers,
    load_model,
    load_schedule,
    read_case,
    relative_error,
)
from tests.parity.recorded import case_folder, read_json, read_tensors

RELEASED = {
    "CogVideoX-2b": "cogvideox-2b",
    "CogVideoX-5b": "cogvideox-5b",
    "CogVideoX-5b-I2V": "cogvideox-5b-i2v",
    "CogVideoX1.5-5B": "cogvideox-1.5-5b",
    "CogVideoX1.5-5B-I2V": "cogvideox-1.5-5b-i2v",
}
STEPS = sorted(path.name for path in (case_folder("cogvideox") / "sat_tiny").glob("train_step_*.safetensors"))


# ---- recorded SAT calls


@pytest.mark.parity
@pytest.mark.parametrize("name", case_names())
def test_forward(name: str) -> None:
    case = read_case(name)
    given = case.inputs()
    latents = case.io["forward.latents"]
    if given["image_latents"] is not None:
        latents = torch.cat([latents, given["image_latents"]], dim=2)
    with torch.no_grad():
        got = load_model(case)(latents, given["text"], case.io["forward.timesteps"], given["ofs"])
    error = relative_error(got, case.io["forward.output"])
    print(f"{name}: {error:.1e}")
    record_figure(f"SAT transformer {name}", error, 1e-5)
    assert error < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("name", case_names())
def test_loss(name: str) -> None:
    case = read_case(name)
    given, io = case.inputs(), case.io
    schedule = load_schedule(case)
    a = schedule.alphas_cumprod[io["loss.index"]].sqrt()
    assert relative_error(a, io["loss.sqrt_alpha_bar"]) < 1e-6
    with torch.no_grad():
        got = diffusion_loss(
            load_model(case),
            schedule,
            io["loss.x0"],
            given["text"],
            io["loss.index"],
            io["loss.noise"],
            image_latents_BTCHW=given["image_latents"],
            ofs=given["ofs"],
        )
    error = relative_error(got, io["loss.per_sample"])
    print(f"{name}: {error:.1e}")
    record_figure(f"SAT loss {name}", error, 1e-5)
    assert error < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in case_names() if "lora" not in read_case(name).meta])
def test_sat_table_inverts(name: str) -> None:
    """Backwards, the table gives the file's tensors bit for bit, but for the dropped tables."""
    case = read_case(name)
    tensors = load_tensors(case.folder / "transformer")
    config = from_diffusers(case.meta["diffusers_config"], final_norm_eps=1e-6)
    table = sat_transformer_table(config)
    back = invert(convert(tensors, table), table)
    dropped = tensors.keys() - back.keys()
    assert back.keys() <= tensors.keys()
    assert all("pos_embed" in key or "position_embeddings" in key for key in dropped)
    assert all(torch.equal(back[key], tensors[key]) for key in back)


@pytest.mark.parity
@pytest.mark.parametrize("file", STEPS)
def test_train_step(file: str) -> None:
    """A recorded complete SAT step, from its latents on."""
    step = read_tensors(case_folder("cogvideox") / "sat_tiny" / file)
    case = read_case(file.removeprefix("train_step_").removesuffix(".safetensors"))
    with torch.no_grad():
        got = diffusion_loss(
            load_model(case),
            load_schedule(case),
            step["x0_latents"],
            step["text"],
            step["index"],
            step["diffusion_noise"],
            image_latents_BTCHW=step["image_latents"],
            ofs=step["ofs"],
        )
    record_figure("complete SAT training step", relative_error(got, step["per_sample_loss"]), 1e-5)
    assert relative_error(got, step["per_sample_loss"]) < 1e-5
    assert relative_error(got.mean(), step["loss"]) < 1e-5


# ---- released names and shapes


@pytest.mark.parity
@pytest.mark.parametrize("released", RELEASED)
def test_presets_are_the_released_configurations(released: str) -> None:
    settings = read_json(case_folder("cogvideox") / "configs.json")["transformer"][released]
    # Conflict of sources: the converter leaves 226 text tokens for 1.5, training used 224
    settings |= {"max_text_seq_length": PRESETS[RELEASED[released]]().transformer.text_len}
    wanted = from_diffusers(settings, final_norm_eps=1e-5)
    got = PRESETS[RELEASED[released]]().transformer
    if got.grid_rule == "slice":  # its frame count limits nothing
        wanted = replace(wanted, sample_size=(got.sample_size[0], *wanted.sample_size[1:]))
    assert got == wanted


def full_size(released: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return ExpertTransformer(PRESETS[RELEASED[released]]().transformer).state_dict()


def shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in tensors.items()}


@pytest.mark.parity
@pytest.mark.parametrize("released", RELEASED)
def test_diffusers_manifest(released: str) -> None:
    """Full-size names and shapes in both directions of the table."""
    wanted = read_json(case_folder("cogvideox") / "manifests" / f"{released}.transformer.json")["tensors"]
    ours = full_size(released)
    assert shapes(invert(ours, DIFFUSERS_TRANSFORMER)) == wanted
    theirs = {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}
    assert shapes(convert(theirs, DIFFUSERS_TRANSFORMER)) == shapes(ours)


@pytest.mark.parity
@pytest.mark.parametrize("released", RELEASED)
def test_sat_manifest(released: str) -> None:
    """The same for the SAT names; a file may also hold tables that are computed here."""
    entry = read_json(case_folder("cogvideox") / "manifests" / "sat_keys.json")[released]
    wanted = dict(entry["global_tensors"])
    for layer in range(entry["num_layers"]):
        wanted |= {name.replace("{i}", str(layer)): x for name, x in entry["per_layer_tensors"].items()}
    table = sat_transformer_table(PRESETS[RELEASED[released]]().transformer)
    ours = full_size(released)
    theirs = {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}
    assert shapes(convert(theirs, table)) == shapes(ours)
    back = shapes(invert(ours, table))
    computed = wanted.keys() - back.keys()
    assert {name: wanted[name] for name in back} == back
    assert all("pos_embed" in name or "position_embeddings" in name for name in computed)


# ---- diffusers live


def tiny_settings(**changes: Any) -> dict[str, Any]:
    """A diffusers configuration that builds in no time."""
    return {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 24,
        "ofs_embed_dim": None,
        "text_embed_dim": 20,
        "num_layers": 2,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 9,
        "patch_size": 2,
        "patch_size_t": None,
        "max_text_seq_length": 7,
        "spatial_interpolation_scale": 1.875,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": False,
        **changes,
    }


LARGE = {"patch_size_t": 2, "sample_height": 24, "sample_width": 24, "patch_bias": False}
VARIANTS = {
    "2b": tiny_settings(use_rotary_positional_embeddings=False),
    "5b": tiny_settings(),
    "5b-i2v": tiny_settings(in_channels=8, use_learned_positional_embeddings=True),
    "1.5-5b": tiny_settings(**LARGE),
    "1.5-5b-i2v": tiny_settings(in_channels=8, ofs_embed_dim=24, **LARGE),
}
# (frames, rows, columns) of the latents; the first is each variant's own size
SIZES = {
    "2b": [(3, 8, 12), (2, 12, 8), (1, 6, 20)],
    "5b": [(3, 8, 12), (2, 12, 8), (1, 6, 20), (4, 4, 4)],
    "5b-i2v": [(3, 8, 12)],
    "1.5-5b": [(4, 8, 12), (2, 24, 6), (6, 4, 24)],
    "1.5-5b-i2v": [(4, 8, 12), (2, 12, 8)],
}


def peer_rope(config: TransformerConfig, size: tuple[int, int, int]) -> tuple[Tensor, Tensor] | None:
    """The rotation tables that diffusers' pipelines make outside of the model."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    pipeline = pytest.importorskip("diffusers.pipelines.cogvideo.pipeline_cogvideox")
    if config.position == "sincos":
        return None
    t, h, w = (-(-n // p) for n, p in zip(size, config.patch_size, strict=True))
    _, base_h, base_w = config.sample_grid
    if config.grid_rule == "slice":
        return embeddings.get_3d_rotary_pos_embed(
            config.head_dim, None, (h, w), t, grid_type="slice", max_size=(base_h, base_w)
        )
    box = pipeline.get_resize_crop_region_for_grid((h, w), base_w, base_h)
    return embeddings.get_3d_rotary_pos_embed(config.head_dim, box, (h, w), t)


@pytest.mark.peers
@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_live(variant: str) -> None:
    """The same random weights in both, carried over by the table, at several sizes."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    peer = diffusers.CogVideoXTransformer3DModel(**VARIANTS[variant]).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = from_diffusers(VARIANTS[variant], final_norm_eps=1e-5)
    weights = peer.state_dict()
    if config.position == "rope+learned":  # a buffer there, made from the fixed table
        weights["patch_embed.pos_embedding"].normal_(std=0.5)
    model = load_into(ExpertTransformer(config), convert(weights, DIFFUSERS_TRANSFORMER)).eval()
    for size in SIZES[variant]:
        latents = torch.randn(2, size[0], config.in_channels, *size[1:])
        text, timesteps = torch.randn(2, config.text_len, config.text_dim), torch.tensor([999.0, 17.0])
        ofs = torch.full((1,), 2.0) if config.ofs_embed_dim else None
        with torch.no_grad():
            wanted = peer(
                latents,
                text,
                timesteps,
                ofs=ofs,
                image_rotary_emb=peer_rope(config, size),
                return_dict=False,
            )[0]
            error = relative_error(model(latents, text, timesteps, ofs), wanted)
        print(f"{variant} {size}: {error:.1e}")
        record_figure(f"transformer {variant}, its sizes", error, 1e-4)
        assert error < 1e-4


@pytest.mark.peers
@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_loads_ours(variant: str) -> None:
    """Our weights through the inverted table fill the diffusers model strictly, and both agree."""
    diffusers = pytest.importorskip("diffusers")
    config = from_diffusers(VARIANTS[variant], final_norm_eps=1e-5)
    model = ExpertTransformer(config).eval()
    model.init_weights(torch.Generator().manual_seed(2), zero_modulation=False)
    peer = diffusers.CogVideoXTransformer3DModel(**VARIANTS[variant]).eval()
    weights = invert(model.state_dict(), DIFFUSERS_TRANSFORMER)
    peer.load_state_dict(weights, strict=True)
    size = SIZES[variant][0]
    latents, text = torch.randn(1, size[0], config.in_channels, *size[1:]), torch.randn(1, 7, config.text_dim)
    timesteps, ofs = torch.tensor([500]), torch.full((1,), 2.0) if config.ofs_embed_dim else None
    with torch.no_grad():
        wanted = peer(
            latents, text, timesteps, ofs=ofs, image_rotary_emb=peer_rope(config, size), return_dict=False
        )[0]
        error = relative_error(model(latents, text, timesteps, ofs), wanted)
    record_figure(f"transformer {variant} holding our weights", error, 1e-4)
    assert error < 1e-4
