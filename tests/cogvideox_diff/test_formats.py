"""Model folders: ours, diffusers' and SAT's, written and read back."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.checkpoints import SAT_VAE, sat_transformer_table
from cogvideox_diff.config import (
    PRESETS,
)
from cogvideox_diff.diffusers_config import config_from_diffusers, diffusers_configs
from cogvideox_diff.formats import open_folder
from shared.checkpoints import invert
from shared.errors import SettingError, WeightsError
from tests.cogvideox_diff.tiny_pipeline import (
    FRAMES,
    PROMPT,
    make,
    picture,
    tiny_config,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipe(spiece: Path) -> CogVideoXPipeline:
    return make("5b", spiece)


@pytest.mark.parametrize("layout", ["ours", "diffusers"])
@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_save_and_load_changes_nothing(variant: str, layout: Any, spiece: Path, tmp_path: Path) -> None:
    pipe = make(variant, spiece)
    loaded = CogVideoXPipeline.from_pretrained(
        pipe.save_pretrained(tmp_path / "m", format=layout), device="cpu"
    )
    assert loaded.config == pipe.config and loaded.name == "m"
    assert loaded.settings() == pipe.settings()
    for part in ("transformer", "vae", "text_encoder"):
        before, after = getattr(pipe.parts, part).state_dict(), getattr(loaded.parts, part).state_dict()
        assert before.keys() == after.keys() and all(
            torch.equal(before[name], after[name]) for name in before
        )
    options: dict[str, Any] = {"image": picture()} if "i2v" in variant else {}
    options["num_inference_steps"] = 1
    expected = pipe(PROMPT, output_type="latent", **options)
    # Not bit for bit: CPU products round by where in memory a weight begins, in a mapped file anywhere.
    torch.testing.assert_close(
        loaded(PROMPT, output_type="latent", **options), expected, rtol=1e-5, atol=1e-4
    )
    encoder = loaded.parts.text_encoder.t5
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight


def test_stored_dtype_is_not_the_one_to_compute_in(pipe: CogVideoXPipeline, tmp_path: Path) -> None:
    folder = pipe.save_pretrained(tmp_path, dtype="float16")
    assert CogVideoXPipeline.from_pretrained(folder, device="cpu").engine.dtype == torch.float32
    half = CogVideoXPipeline.from_pretrained(folder, device="cpu", dtype="bf16")
    assert half.settings()["dtype"] == "bfloat16"
    assert half(PROMPT, num_inference_steps=1).num_frames == FRAMES
    again = half.save_pretrained(tmp_path / "half")
    assert open_folder(again).trained_dtype == torch.bfloat16
    with pytest.raises(SettingError, match=r"bfloat16 \(nearest\)"):
        CogVideoXPipeline.from_pretrained(again, dtype="float16")
    forced = CogVideoXPipeline.from_pretrained(again, dtype="fp16", device="cpu", force_dtype=True)
    kept = {x.dtype for name, x in forced.parts.text_encoder.named_parameters() if ".wo." in name}
    assert forced.engine.dtype == torch.float16 and kept == {torch.float32}


def test_folder_errors(pipe: CogVideoXPipeline, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no folder"):
        open_folder(tmp_path / "absent")
    with pytest.raises(WeightsError, match="is no model folder"):
        open_folder(tmp_path)
    folder = pipe.save_pretrained(tmp_path / "m")
    (folder / "vae.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"vae\.safetensors"):
        CogVideoXPipeline.from_pretrained(folder, device="cpu")
    header = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(header | {"family": "cogvideo_ar"}))
    with pytest.raises(WeightsError, match="cogvideo_ar"):
        open_folder(folder)


def save_as_sat(pipe: CogVideoXPipeline, folder: Path) -> Path:
    """The layout of the SAT release, by the tables run backwards."""
    config = pipe.config.transformer
    transformer = invert(pipe.parts.transformer.state_dict(), sat_transformer_table(config))
    pipe.save_pretrained(folder / "diffusers", format="diffusers")
    (folder / "diffusers" / "text_encoder").rename(folder / "t5-v1_1-xxl")
    for file in (folder / "diffusers" / "tokenizer").iterdir():
        file.rename(folder / "t5-v1_1-xxl" / file.name)
    (folder / "transformer" / "1").mkdir(parents=True)
    (folder / "transformer" / "latest").write_text("1")
    torch.save({"module": transformer}, folder / "transformer" / "1" / "mp_rank_00_model_states.pt")
    (folder / "vae").mkdir()
    torch.save({"state_dict": invert(pipe.parts.vae.state_dict(), SAT_VAE)}, folder / "vae" / "3d-vae.pt")
    return folder


@pytest.mark.parametrize("variant", ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_sat_folders(variant: str, spiece: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recognised by their structure alone among the released models, here tiny ones."""
    pipe = make(variant, spiece)
    folder = save_as_sat(pipe, tmp_path)
    with pytest.raises(WeightsError, match="no released model has 2 layers of width 32"):
        open_folder(folder)
    for name in ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"):
        if (name, variant) not in [("2b", "5b"), ("5b", "2b")]:  # told apart by their depth
            monkeypatch.setitem(PRESETS, f"tiny-{name}", partial(tiny_config, name))
    loaded = CogVideoXPipeline.from_pretrained(folder, device="cpu")
    assert loaded.config.transformer == replace(pipe.config.transformer, final_norm_eps=1e-6)
    given = CogVideoXPipeline.from_pretrained(folder, config=pipe.config, device="cpu")
    options: dict[str, Any] = {"image": picture()} if "i2v" in variant else {}
    options["num_inference_steps"] = 1
    wanted = pipe(PROMPT, output_type="latent", **options)
    assert torch.equal(given(PROMPT, output_type="latent", **options), wanted)
    (folder / "t5-v1_1-xxl").rename(folder / "text")  # known by its tokenizer, not by its name
    assert open_folder(folder, pipe.config).tokenizer == folder / "text"
    (folder / "text").rename(tmp_path.parent / f"{tmp_path.name}-text")
    with pytest.raises(WeightsError, match="put the text encoder"):
        CogVideoXPipeline.from_pretrained(folder, config=pipe.config, device="cpu")


@pytest.mark.parametrize("preset", [name for name in PRESETS if "demo" not in name])
def test_released_configurations_survive_diffusers_files(preset: str) -> None:
    """Native size and lengths of 1.5 are not in its files; they are filled in as released."""
    config = PRESETS[preset]()
    back = config_from_diffusers(diffusers_configs(config))
    frames = (back.transformer.sample_size[0], *config.transformer.sample_size[1:])
    assert back.transformer == replace(config.transformer, sample_size=frames)
    assert replace(back, transformer=config.transformer) == config


def test_pieces_that_diffusers_does_not_know_warn(pipe: CogVideoXPipeline, tmp_path: Path) -> None:
    whole = replace(pipe.config.vae, decode_latents=0)
    other = CogVideoXPipeline(replace(pipe.config, vae=whole), pipe.parts, pipe.engine.tokenizer_path)
    with pytest.warns(UserWarning, match="num_latent_frames_batch_size"):
        other.save_pretrained(tmp_path, format="diffusers")
