"""Super-resolution as a stage of the whole pipeline, with random weights: 16 x 32 pixels to 48 x 64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo_ar.config import CogLMConfig, SuperResolutionConfig, cogview2_itersr
from cogvideo_ar.options import Options
from cogvideo_ar.parts import Parts
from cogvideo_ar.pipeline import CogVideoPipeline
from cogvideo_ar.super_resolution.direct import build_direct_sampler, enlarge_videos
from cogvideo_ar.super_resolution.iterative import build_pass_samplers, cell_levels, refine_videos
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer
from cogvideo_ar.vqvae import VQVAE
from shared.errors import OutputCheckError, SettingError, WeightsError
from shared.offload import Placement, Weights
from shared.protocol import GenerationRequest
from shared.runtime import generator
from tests.cogvideo_ar.tiny_pipeline import tiny_parts

PROMPT = "a red circle"
FINE = (6, 8)


def with_super_resolution(parts: Parts, **changes: Any) -> Parts:
    frames = parts.config.keyframes
    settings: dict[str, Any] = {
        "kind": "direct",
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 4,
        "text_len": 16,
        "vocab_size": frames.vocab_size,
        "num_image_tokens": frames.num_image_tokens,
        "start_of_image": frames.start_of_image,
        "num_positions": 40,
        "coarse_position_offset": 17,
        "coarse_grid": frames.grid,
        "fine_grid": FINE,
        "coarse_kernel": (3, 3),
        "fine_kernel": (3, 3),
        "draw": CogLMConfig(temperature=1.0, top_k=2, temperature2=0.6),
        "max_batch": 2,
    }
    config = SuperResolutionConfig(**settings | changes)
    model = SuperResolutionTransformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return replace(parts, config=replace(parts.config, super_resolution=config), super_resolution=model)


def with_refinement(parts: Parts, **changes: Any) -> Parts:
    """The same, and an iterative model on the fine grid."""
    assert parts.config.super_resolution is not None
    config = replace(parts.config.super_resolution, kind="iterative", text_len=4, pass_top_k=(4, 3, 2))
    config = replace(config, **changes)
    model = SuperResolutionTransformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return replace(parts, config=replace(parts.config, refinement=config), refinement=model)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return tiny_parts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def pipeline(small: Parts) -> CogVideoPipeline:
    torch.manual_seed(1)
    return CogVideoPipeline(with_super_resolution(small), options=Options(num_frames=9))


class Kept(VQVAE):
    """An image codec that keeps the codes it is to decode."""

    def decode(self, codes: torch.Tensor, rate: int = 8) -> torch.Tensor:
        self.seen = codes
        return super().decode(codes, rate)


def test_frames_are_enlarged_by_their_prompt_and_seed(pipeline: CogVideoPipeline):
    video = pipeline(PROMPT, seed=3)
    assert tuple(video.frames.shape) == (9, 48, 64, 3)
    assert torch.equal(pipeline(PROMPT, seed=3).frames, video.frames)
    assert not torch.equal(pipeline(PROMPT, seed=4).frames, video.frames)


def test_the_stage_is_given_the_small_frames(small: Parts, pipeline: CogVideoPipeline):
    """The codec gets what `enlarge_videos` makes of the tokens of the pipeline without the stage."""
    codec = Kept(small.config.vqvae).eval()
    codec.load_state_dict(small.vqvae.state_dict())
    CogVideoPipeline(replace(small, vqvae=codec))(PROMPT, seed=3, num_frames=5)
    coarse = codec.seen
    CogVideoPipeline(replace(pipeline.parts, vqvae=codec))(PROMPT, seed=3, num_frames=5)
    model = pipeline.parts.super_resolution
    assert model is not None and codec.seen.shape == (5, *FINE)
    expected = enlarge_videos(
        model,
        small.tokenizer,
        [PROMPT],
        small.config.sampling,
        build_direct_sampler(model.config, small.cluster_labels),
        [generator(3, 0, "super_resolution")],
        coarse.flatten(1)[None],
    )
    assert torch.equal(codec.seen.flatten(1), expected[0])


def test_a_batch_gives_what_single_calls_give(pipeline: CogVideoPipeline):
    requests = [GenerationRequest(prompt=PROMPT, seed=1), GenerationRequest(prompt="a blue square", seed=2)]
    together = pipeline.generate_batch(requests)
    for request, result in zip(requests, together, strict=True):
        single = pipeline.generate(request)
        assert torch.equal(single.video.frames, result.video.frames)
        stage = result.stages["model/super_resolution"]
        assert (stage.units, stage.unit) == (9 * FINE[0] * FINE[1], "tokens") and stage.seconds > 0
    assert list(result.stages)[-2:] == ["model/super_resolution", "decode"]


def test_the_size_of_the_small_frames_leaves_the_stage_out(small: Parts, pipeline: CogVideoPipeline):
    without = CogVideoPipeline(small, options=Options(num_frames=9))
    configured = pipeline.configured(Options(height=16))
    result = configured.generate(GenerationRequest(prompt=PROMPT, seed=3))
    assert torch.equal(result.video.frames, without(PROMPT, seed=3).frames)
    assert "model/super_resolution" not in result.stages
    assert configured.settings()["super_resolution"] is None
    assert pipeline.settings()["super_resolution"] == {"temperature": 1.0, "top_k": 2, "temperature2": 0.6}
    assert (pipeline.plan.height, pipeline.plan.width) == (48, 64)
    with pytest.raises(SettingError, match=r"height 40 .* legal: 16, 48; nearest: 48"):
        pipeline.configured(Options(height=40))
    with pytest.raises(SettingError, match=r"width 64 .* legal: 32; nearest: 32"):
        pipeline.configured(Options(height=16, width=64))


def test_progress_ends_at_one(pipeline: CogVideoPipeline):
    seen: list[float] = []
    configured = pipeline.configured()
    configured.on_progress = seen.append
    configured.generate(GenerationRequest(prompt=PROMPT))
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert any(share == pytest.approx(0.5) for share in seen)  # the small frames are there


def test_saved_and_loaded_is_the_same(small: Parts, pipeline: CogVideoPipeline, tmp_path: Path):
    folder = pipeline.save_pretrained(tmp_path / "model")
    loaded = CogVideoPipeline.from_pretrained(folder, device="cpu").configured(pipeline.options)
    assert torch.equal(loaded(PROMPT, seed=5).frames, pipeline(PROMPT, seed=5).frames)
    half = CogVideoPipeline.from_pretrained(folder, dtype="bfloat16", device="cpu").parts.super_resolution
    assert half is not None and half.word_embeddings.weight.dtype == torch.bfloat16
    (folder / "super_resolution.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks super_resolution\.safetensors"):
        CogVideoPipeline.from_pretrained(folder, device="cpu")
    plain = CogVideoPipeline(small).save_pretrained(tmp_path / "plain")
    assert not (plain / "super_resolution.safetensors").exists()


def test_a_prompt_that_only_super_resolution_cannot_take(small: Parts):
    pipeline = CogVideoPipeline(with_super_resolution(small, text_len=4))
    with pytest.raises(SettingError, match="super-resolution takes at most 3"):
        pipeline("a red circle moving left")


def test_numbers_that_are_not_finite_name_their_module(small: Parts):
    parts = with_super_resolution(small)
    assert parts.super_resolution is not None
    parts.super_resolution.blocks[1].mlp.up.weight.data[0, 0] = float("nan")
    with pytest.raises(OutputCheckError, match=r"^super_resolution\.blocks\.1\.mlp\.up: .*NaN"):
        CogVideoPipeline(parts)(PROMPT, num_frames=5)


def test_refinement_is_asked_for_and_redraws_the_higher_levels(
    small: Parts, pipeline: CogVideoPipeline, tmp_path: Path
):
    """The codec gets what `refine_videos` makes of the tokens of super-resolution; cells of level 0 and below
    stay; the default leaves refinement out, as released."""
    torch.manual_seed(2)
    codec = Kept(small.config.vqvae).eval()
    codec.load_state_dict(small.vqvae.state_dict())
    parts = with_refinement(replace(pipeline.parts, vqvae=codec))
    refined = CogVideoPipeline(parts, options=Options(num_frames=9))
    plain = refined(PROMPT, seed=3)
    before = codec.seen
    assert torch.equal(plain.frames, pipeline(PROMPT, seed=3).frames)
    request = GenerationRequest(prompt=PROMPT, seed=3)
    seen: list[float] = []
    asked = refined.configured(Options(super_resolution="direct+iterative"))
    asked.on_progress = seen.append
    result = asked.generate(request)
    model = parts.refinement
    assert model is not None
    expected = refine_videos(
        model,
        small.tokenizer,
        [PROMPT],
        small.config.sampling,
        build_pass_samplers(model.config),
        [generator(3, 0, "refinement")],
        before.flatten(1)[None],
    )
    assert torch.equal(codec.seen.flatten(1), expected[0])
    levels = cell_levels(FINE)
    kept = codec.seen.flatten(1) == before.flatten(1)
    assert bool(kept[:, levels <= 0].all()) and not bool(kept[:, levels > 0].all())
    cells = sum(int((levels > number).sum()) for number in range(3))
    assert result.stages["model/refinement"].units == 9 * cells
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert asked.settings()["refinement"] == [4, 3, 2] and refined.settings()["refinement"] == []
    folder = refined.save_pretrained(tmp_path / "model")
    loaded = CogVideoPipeline.from_pretrained(folder, device="cpu").configured(asked.options)
    assert torch.equal(loaded.generate(request).video.frames, result.video.frames)


def test_ways_to_enlarge_are_those_of_the_parts(small: Parts, pipeline: CogVideoPipeline):
    without = pipeline.configured(Options(super_resolution="none"))
    assert (without.plan.height, without.plan.fine_draw) == (16, None)
    direct = pipeline.configured(Options(super_resolution="direct"))
    assert direct.plan == pipeline.plan
    for parts, wish, legal in (
        (small, "direct", "legal: none "),
        (pipeline.parts, "iterative", "legal: none, direct "),
        (
            with_refinement(pipeline.parts),
            "iterative",
            r"legal: none, direct, direct\+iterative .* nearest: ",
        ),
    ):
        with pytest.raises(SettingError, match=legal):
            CogVideoPipeline(parts, options=Options(super_resolution=wish))
    with pytest.raises(SettingError, match=r"height 16 .* legal: 48"):
        pipeline.configured(Options(super_resolution="direct", height=16))


def test_parts_that_do_not_belong_together_are_refused(small: Parts):
    with pytest.raises(WeightsError, match=r"coarse_grid \(1, 4\), the key frames \(2, 4\)"):
        with_super_resolution(small, coarse_grid=(1, 4))
    with pytest.raises(WeightsError, match="start_of_image"):
        with_super_resolution(small, start_of_image=small.config.keyframes.start_of_image + 1)
    with pytest.raises(WeightsError, match="must be 'direct', got 'iterative'"):
        with_super_resolution(small, kind="iterative")
    with pytest.raises(WeightsError, match=r"refinement has the fine_grid \(12, 8\), super-resolution"):
        with_refinement(with_super_resolution(small), fine_grid=(12, 8))
    with pytest.raises(WeightsError, match="refinement must be 'iterative', got 'direct'"):
        with_refinement(with_super_resolution(small), kind="direct")
    with pytest.raises(WeightsError, match="in both the config and the weights"):
        replace(small, config=replace(small.config, super_resolution=cogview2_itersr()))


# ---- offload


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_offloaded_stages_read_nothing_that_waits(
    small: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
):
    """What waits is made useless; only copies hold the weights. So no stage reads a net that is not there."""
    torch.manual_seed(1)
    parts = with_refinement(with_super_resolution(tiny_parts(tmp_path)))
    options = Options(num_frames=9, super_resolution="direct+iterative")
    image = torch.randint(0, 256, (16, 32, 3), generator=torch.Generator().manual_seed(0)).byte()
    plain = CogVideoPipeline(parts, options=options)
    wanted = plain(PROMPT, seed=3, image=image)
    measured = plain.diagnostics([wanted], [PROMPT])
    tensors = [x for net in parts.nets for x in (*net.parameters(), *net.buffers())]
    kept = {id(x): x.detach().clone() for x in tensors}
    for x in tensors:
        x.data.fill_(float("nan") if x.is_floating_point() else 10**6)

    def copied(weights: Weights, device: torch.device, *, aside: bool = False) -> dict[int, torch.Tensor]:
        return {key: kept[key].clone() for key in weights._waiting}

    monkeypatch.setattr(Weights, "copied", copied)
    offloaded = CogVideoPipeline(parts, options=options, placement=Placement("cpu"))
    offloaded.placement.mode = mode  # type: ignore[assignment]
    assert torch.equal(offloaded(PROMPT, seed=3, image=image).frames, wanted.frames)
    assert offloaded.diagnostics([wanted], [PROMPT]) == measured
