"""Guidance and sequence parallelism of the transformer against one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideox_diff.config import SamplingConfig, ScheduleConfig, TransformerConfig
from cogvideox_diff.denoising import denoise
from cogvideox_diff.guidance import Predictor, make_guidance
from cogvideox_diff.parallel import InferenceGroups, ParallelTransformer
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import draw_from, draw_noise, make_scheduler
from cogvideox_diff.transformer import ExpertTransformer
from shared.attention import attend
from shared.distributed import ParallelContext
from shared.errors import SettingError
from tests.distributed.launch import run_ranks

TOLERANCE = 2e-6  # of the largest value
TINY = TransformerConfig(
    num_layers=2,
    num_heads=3,  # cut into 2 and 1
    head_dim=16,
    in_channels=4,
    out_channels=4,
    position="rope",
    sample_size=(3, 6, 10),
    time_embed_dim=16,
    text_dim=12,
    text_len=5,
)
VARIANTS = {
    "sincos": replace(TINY, position="sincos"),
    "rope": TINY,
    "rope+learned": replace(TINY, position="rope+learned"),
    "pairs": replace(TINY, patch_size=(2, 2, 2), grid_rule="slice", ofs_embed_dim=16),
}
WIDE = replace(TINY, num_layers=1, num_heads=8, head_dim=64, sample_size=(5, 16, 24), text_len=64)
SIZES = [(3, 6, 10), (1, 6, 10)]  # latents; 45 and 15 tokens: neither divides by 2


def build(config: TransformerConfig) -> ExpertTransformer:
    model = ExpertTransformer(config)
    model.init_weights(torch.Generator().manual_seed(0), zero_modulation=False)
    if config.position == "rope+learned":
        torch.nn.init.normal_(model.pos_embedding, generator=torch.Generator().manual_seed(1))
    return model.eval()


def inputs(config: TransformerConfig, size: tuple[int, int, int], batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    frames = -(-size[0] // config.patch_size[0]) * config.patch_size[0]
    latents = torch.randn(batch, frames, config.in_channels, *size[1:], generator=generator)
    text = torch.randn(batch, config.text_len, config.text_dim, generator=generator)
    ofs = (torch.tensor([2.0]),) if config.ofs_embed_dim else ()
    return latents, text, torch.tensor([999, 3, 500])[:batch], *ofs


def forwards(make_model: Any) -> dict[str, Tensor]:
    """Every variant at every size."""
    results = {}
    for name, config in VARIANTS.items():
        model = make_model(build(config))
        for size in SIZES:
            results[f"{name} {size}"] = model(*inputs(config, size))
    model = make_model(build(TINY))
    results["three rows"] = model(*inputs(TINY, SIZES[1], batch=3))
    # 272 tokens each, of the video 208 and 272: one too few to leave the plain layers
    results["two paths"] = make_model(build(WIDE))(*inputs(WIDE, WIDE.sample_size))
    results["half"] = make_model(build(TINY).bfloat16())(
        *(x.bfloat16() if x.is_floating_point() else x for x in inputs(TINY, SIZES[0]))
    )
    return results


def sampled(make_model: Any) -> Tensor:
    """A guided run of the stochastic sampler, from seeds alone."""
    sampling = SamplingConfig(num_inference_steps=4, scheduler="dpm", dynamic_cfg="upstream")
    random = [torch.Generator().manual_seed(3)]
    generator = torch.Generator().manual_seed(4)
    text, negative = torch.randn(2, 1, TINY.text_len, TINY.text_dim, generator=generator)
    return denoise(
        Predictor(model=make_model(build(TINY)), text=text, negative=negative),
        make_scheduler(NoiseSchedule.from_config(ScheduleConfig()), sampling),
        draw_noise((3, TINY.in_channels, 6, 10), random),
        make_guidance(sampling, 4),
        draw_from(random),
    )


def on_two_ranks(world: ParallelContext) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for guidance in (1, 2):
        groups = InferenceGroups.of(world, guidance=guidance)
        results[f"places {guidance}"] = (groups.guidance.ranks, groups.sequence.ranks, groups.clip.ranks)
        make_model = partial(ParallelTransformer.of, groups=groups)
        results |= {f"{name}, guidance {guidance}": x for name, x in forwards(make_model).items()}
        results[f"sampled, guidance {guidance}"] = sampled(make_model)
    single_row = inputs(TINY, SIZES[0], batch=1)
    with pytest.raises(SettingError) as refused:
        ParallelTransformer.of(build(TINY), groups)(*single_row)
    results["refused"] = str(refused.value)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, tmp_path_factory.mktemp("ranks"))


@cache
@torch.no_grad()
def alone() -> dict[str, Tensor]:
    return forwards(lambda model: model) | {"sampled": sampled(lambda model: model)}


CASES = [f"{name} {size}" for name in VARIANTS for size in SIZES] + [
    "three rows",
    "two paths",
    "half",
    "sampled",
]


@pytest.mark.distributed
@pytest.mark.parametrize("guidance", [1, 2], ids=["sequence", "guidance"])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(results: list[dict[str, Any]], case: str, guidance: int) -> None:
    wanted = alone()[case]
    tolerance = 0.02 if wanted.dtype == torch.bfloat16 else TOLERANCE
    for result in results:
        got = result[f"{case}, guidance {guidance}"]
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        error = ((got - wanted).abs().max() / wanted.abs().max()).item()
        print(f"{case}, guidance {guidance}: relative maximum error {error:.1e}")
        assert error <= tolerance


@pytest.mark.distributed
def test_ranks_agree_to_the_bit(results: list[dict[str, Any]]) -> None:
    """Each rank goes on from its own copy, so copies must never part."""
    first, second = results
    assert all(torch.equal(x, second[name]) for name, x in first.items() if isinstance(x, Tensor))


@pytest.mark.distributed
def test_groups_of_two_ranks(results: list[dict[str, Any]]) -> None:
    assert [result["places 1"] for result in results] == [((0,), (0, 1), (0, 1)), ((1,), (0, 1), (0, 1))]
    assert [result["places 2"] for result in results] == [((0, 1), (0,), (0, 1)), ((0, 1), (1,), (0, 1))]


@pytest.mark.distributed
def test_a_single_row_has_no_halves(results: list[dict[str, Any]]) -> None:
    assert all("guidance with 1 rows: 2 processes" in result["refused"] for result in results)


def both_cuts(world: ParallelContext) -> tuple[Tensor, Tensor]:
    groups = InferenceGroups.of(world, guidance=2)
    model = ParallelTransformer.of(build(TINY), groups)
    return model(*inputs(TINY, SIZES[0])), torch.tensor(groups.guidance.ranks + groups.sequence.ranks)


@pytest.mark.distributed
def test_both_cuts_on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> None:
    wanted = alone()[f"rope {SIZES[0]}"]
    everyone = run_ranks(both_cuts, tmp_path_factory.mktemp("four"), world_size=4)
    for rank, (got, places) in enumerate(everyone):
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE * wanted.abs().max().item())
        assert places.tolist() == [rank % 2, rank % 2 + 2, rank // 2 * 2, rank // 2 * 2 + 1]


# ---- without other processes


@torch.no_grad()
def test_one_process_is_unchanged() -> None:
    model = build(TINY)
    groups = InferenceGroups.of(ParallelContext())
    parallel = ParallelTransformer.of(model, groups, kernel=partial(attend, backend="math"))
    case = inputs(TINY, SIZES[0])
    torch.testing.assert_close(parallel(*case), model(*case), atol=1e-5, rtol=1e-5)


def test_weights_and_names_are_the_models_own() -> None:
    model = build(TINY)
    parallel = ParallelTransformer.of(model, InferenceGroups.of(ParallelContext()))
    ours = dict(model.named_parameters())
    assert ours.keys() == dict(parallel.named_parameters()).keys()
    assert all(parameter is ours[name] for name, parameter in parallel.named_parameters())
    assert not parallel.training


def test_more_ranks_than_heads_are_refused() -> None:
    many = ParallelContext(ranks=tuple(range(4)))
    with pytest.raises(SettingError, match=r"sequence: 4 processes are not legal; legal: 1, 2, 3 "):
        ParallelTransformer(TINY, guidance=ParallelContext(), sequence=many)


def test_more_ranks_than_tokens_are_refused() -> None:
    many = ParallelContext(ranks=(0, 1))
    model = ParallelTransformer(TINY, guidance=ParallelContext(), sequence=many)
    with pytest.raises(SettingError, match="sequence of 1 video tokens: 2 processes are not legal; legal: 1"):
        model(torch.zeros(1, 1, 4, 2, 2), torch.zeros(1, 5, 12), torch.tensor([1]))
