"""The transformer: patches, start values, backends, gradients, and errors in words."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from cogvideox_diff.config import PRESETS, TransformerConfig
from cogvideox_diff.schedule import NoiseSchedule, ScheduleConfig
from cogvideox_diff.training.objective import diffusion_loss
from cogvideox_diff.transformer import ExpertTransformer, patchify, unpatchify
from shared.attention import attend

TINY = TransformerConfig(
    num_layers=2,
    num_heads=2,
    head_dim=16,
    in_channels=4,
    out_channels=4,
    position="rope",
    sample_size=(2, 8, 8),
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


def build(
    config: TransformerConfig, *, zero_modulation: bool = False, **options: object
) -> ExpertTransformer:
    model = ExpertTransformer(config, **options)  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(0), zero_modulation=zero_modulation)
    return model


def inputs(config: TransformerConfig, batch: int = 2, frames: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, frames, config.in_channels, 8, 8, generator=generator)
    text = torch.randn(batch, config.text_len, config.text_dim, generator=generator)
    ofs = (torch.tensor([2.0]),) if config.ofs_embed_dim else ()
    return latents, text, torch.tensor([999, 3])[:batch], *ofs


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2), (3, 1, 2)])
def test_patches_invert(patch: tuple[int, int, int]) -> None:
    x = torch.randn(2, 6, 5, 4, 8)
    grid = (6 // patch[0], 4 // patch[1], 8 // patch[2])
    tokens = patchify(x, patch)
    assert tokens.shape == (2, grid[0] * grid[1] * grid[2], 5 * patch[0] * patch[1] * patch[2])
    assert torch.equal(unpatchify(tokens, grid, patch), x)


def test_patch_order() -> None:
    """Inside a token: channel, time, row, column; between tokens: columns fastest."""
    x = torch.arange(2 * 2 * 2 * 4).view(1, 2, 2, 2, 4)  # T C H W
    tokens = patchify(x, (2, 2, 2))
    assert tokens[0, 1].tolist() == [
        x[0, t, c, h, 2 + w] for c in (0, 1) for t in (0, 1) for h in (0, 1) for w in (0, 1)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_start_makes_every_block_the_identity(variant: str) -> None:
    model = build(VARIANTS[variant], zero_modulation=True)
    text, video, emb = torch.randn(2, 5, 32), torch.randn(2, 16, 32), torch.randn(2, 16)
    same_text, same_video = model.run_blocks(text, video, emb, None)
    assert torch.equal(same_text, text)
    assert torch.equal(same_video, video)
    text, video = build(VARIANTS[variant]).run_blocks(text, video, emb, None)
    assert not torch.equal(video, same_video)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_depend_on_the_generator_only(variant: str) -> None:
    torch.manual_seed(1)
    one = build(VARIANTS[variant]).state_dict()
    torch.manual_seed(2)
    two = build(VARIANTS[variant]).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["blocks.0.attn.q.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert one["blocks.0.mlp.fc2.weight"].std().item() == pytest.approx(0.01, rel=0.1)  # 0.02 / sqrt(2 * 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_backends_agree(variant: str) -> None:
    config = VARIANTS[variant]
    model, given = build(config), inputs(config)
    reference = build(config, attend=partial(attend, backend="math"))
    with torch.no_grad():
        torch.testing.assert_close(model(*given), reference(*given))


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_of_a_batch_do_not_mix(variant: str) -> None:
    config = VARIANTS[variant]
    model, given = build(config), inputs(config)
    with torch.no_grad():
        both = model(*given)
        first = model(*(x[:1] for x in given))
    torch.testing.assert_close(both[:1], first)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_gets_a_gradient(variant: str) -> None:
    config = VARIANTS[variant]
    model = build(config)
    latents, text, timesteps, *ofs = inputs(config)
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    loss = diffusion_loss(
        model, schedule, latents, text, timesteps, torch.randn_like(latents), ofs=ofs[0] if ofs else None
    )
    assert loss.shape == (2,)
    loss.mean().backward()
    # text only matters through attention, so what happens to it after the last attention does not
    idle = {"blocks.1.norm2.text.weight", "blocks.1.norm2.text.bias"}
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == idle


def test_the_model_learns() -> None:
    model = build(TINY, zero_modulation=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule, (x0, text, timesteps) = NoiseSchedule.from_config(ScheduleConfig()), inputs(TINY)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(30):
        loss = diffusion_loss(model, schedule, x0, text, timesteps, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_fewer_frames_take_the_learned_tables_prefix() -> None:
    model = build(VARIANTS["rope+learned"])
    torch.nn.init.normal_(model.pos_embedding)
    text, video = model.learned_table((1, 4, 4), 5)
    assert torch.equal(torch.cat([text, video], dim=1), model.pos_embedding[:, : 5 + 16])


@pytest.mark.parametrize(
    ("variant", "shape", "text", "message"),
    [
        ("rope", (1, 2, 3, 8, 8), (1, 5, 12), "latents have 3 channels, the model reads 4"),
        ("rope", (1, 2, 4, 7, 8), (1, 5, 12), r"\(2, 7, 8\) must divide by \(1, 2, 2\)"),
        ("pairs", (1, 3, 4, 8, 8), (1, 5, 12), r"\(3, 8, 8\) must divide by \(2, 2, 2\)"),
        ("rope", (1, 2, 4, 8, 8), (1, 5, 10), "width 10, the model reads 12"),
        ("rope+learned", (1, 2, 4, 8, 4), (1, 5, 12), "the learned table is for 2 x 4 x 4 patches"),
        ("rope+learned", (1, 2, 4, 8, 8), (1, 4, 12), "for 5 text tokens, got 4"),
        ("pairs", (1, 2, 4, 8, 8), (1, 5, 12), "pass ofs"),
    ],
)
def test_errors(variant: str, shape: tuple[int, ...], text: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(VARIANTS[variant])(torch.zeros(shape), torch.zeros(text), torch.tensor([1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 24}, "head_dim % 16 == 0, got 24"),
        ({"position": "alibi"}, "got 'alibi'"),
        ({"sample_size": (2, 7, 8)}, r"\(2, 7, 8\) must divide by"),
        ({"num_layers": 0}, "must be positive"),
        ({"ofs_embed_dim": 5}, r"one of \(0, 16\)"),
    ],
)
def test_illegal_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_on_the_meta_device(preset: str) -> None:
    with torch.device("meta"):
        ExpertTransformer(PRESETS[preset]().transformer)
