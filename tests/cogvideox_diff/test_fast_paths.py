"""What runs without gradients equals what runs with them, which is the plain form; half precision loses no
more by it. Float64 takes the plain form always and is the measure."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_diff import fast_block
from cogvideox_diff.config import PRESETS, TransformerConfig, VAEConfig
from cogvideox_diff.memory import native_plan, stage_needs
from cogvideox_diff.transformer import Attention, ExpertTransformer
from cogvideox_diff.vae import blocks, fast, winograd
from cogvideox_diff.vae.autoencoder import CausalVAE
from cogvideox_diff.vae.causal_conv import CausalConv3d, ClipContext, conv_by_taps, convolve_extended
from shared import cpu_attention
from shared.cpu_linear import apply_linear, quick_linear
from shared.memory import peak_bytes

NET = TransformerConfig(
    num_layers=2,
    num_heads=3,
    head_dim=16,
    in_channels=4,
    out_channels=4,
    position="rope",
    sample_size=(3, 8, 8),
    time_embed_dim=16,
    text_dim=8,
    text_len=5,
)
VAE = VAEConfig(latent_channels=4, widths=(32, 32, 32, 32), blocks_per_level=1, norm_groups=8)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


# ---- transformer


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the smallest block takes the quick form, in several blocks of rows."""
    monkeypatch.setattr(fast_block, "FEWEST_VALUES", 1)
    monkeypatch.setattr(fast_block, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(cpu_attention, "BLOCK_ROWS", 7)


@pytest.mark.parametrize("position", ["rope", "sincos", "rope+learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_without_gradients(position: str, dtype: torch.dtype, tiny_blocks: None) -> None:
    """Two samples of different timesteps."""
    model = ExpertTransformer(replace(NET, position=position)).to(dtype)  # type: ignore[arg-type]
    x, text = torch.randn(2, 3, 4, 8, 8).to(dtype), torch.randn(2, 5, 8).to(dtype)
    times = torch.tensor([7.0, 600.0])
    exact = copy.deepcopy(model).double()(x.double(), text.double(), times).detach()
    plain = model(x, text, times).detach()
    with torch.no_grad():
        quick = model(x, text, times)
    assert not torch.equal(quick, plain), "the quick form was not taken"
    assert error(quick, exact) < max(1.3 * error(plain, exact), 1e-6)


@torch.no_grad()
def test_inputs_of_a_block_stay(tiny_blocks: None) -> None:
    model = ExpertTransformer(NET)
    parts = torch.randn(2, 5, 48), torch.randn(2, 48, 48)
    kept = [x.clone() for x in parts]
    model.blocks[0](*parts, torch.randn(2, 16), model.rope((3, 4, 4), 5, parts[0].device))
    assert all(torch.equal(x, y) for x, y in zip(parts, kept, strict=True))


@torch.no_grad()
def test_a_kernel_of_ones_own_is_called(tiny_blocks: None) -> None:
    calls = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape)
        return torch.zeros_like(q)

    layer = Attention(NET, attend)
    fast_block.attention(layer, torch.randn(9, 48), None, 2)
    assert calls == [(1, 3, 9, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
def test_quick_linear(gelu: bool, dtype: torch.dtype) -> None:
    layer, x = nn.Linear(6, 5).to(dtype), torch.randn(2, 3, 6).to(dtype)
    plain = F.gelu(layer(x), approximate="tanh") if gelu else layer(x)
    with torch.no_grad():
        torch.testing.assert_close(quick_linear(x, layer.weight, layer.bias, gelu=gelu), plain)
        torch.testing.assert_close(apply_linear(layer, x, gelu=gelu), plain)
        heard: list[int] = []
        layer.register_forward_hook(lambda *call: heard.append(1))
        apply_linear(layer, x)
    assert heard == [1]
    assert apply_linear(layer, x).requires_grad


# ---- VAE


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels", [(3, 5), (32, 48)])
def test_winograds_convolution(channels: tuple[int, int], threads: int) -> None:
    conv = nn.Conv3d(channels[0], channels[1], 3)
    x_CTHW = torch.randn(channels[0], 5, 10, 14)
    exact = copy.deepcopy(conv).double()(x_CTHW[None].double())[0].movedim(0, -1).detach()
    out = torch.empty(3, 8, 12, channels[1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.no_grad():
        kernel = winograd.transform_kernel(conv.weight)
        winograd.convolve(x_CTHW.movedim(0, -1).contiguous(), kernel, conv.bias, out)
    torch.set_num_threads(before)
    assert error(out, exact) < 3e-6


@torch.no_grad()
def test_winograds_convolution_whatever_the_default_type() -> None:
    conv, x_THWC = nn.Conv3d(4, 5, 3), torch.randn(5, 10, 14, 4)
    wanted, got = torch.empty(3, 8, 12, 5), torch.empty(3, 8, 12, 5)
    kernel = winograd.transform_kernel(conv.weight)
    winograd.convolve(x_THWC, kernel, None, wanted)
    torch.set_default_dtype(torch.bfloat16)
    try:
        winograd.convolve(x_THWC, winograd.transform_kernel(conv.weight), None, got)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, wanted)


@torch.no_grad()
def test_few_kernels_by_taps() -> None:
    conv, x = nn.Conv3d(6, 3, 3), torch.randn(5, 9, 11, 6)
    wanted = conv(x.movedim(-1, 0)[None])[0]
    torch.testing.assert_close(conv_by_taps(x, conv.weight, conv.bias), wanted)
    torch.testing.assert_close(conv_by_taps(x, conv.weight, None), wanted - conv.bias[:, None, None, None])


@torch.no_grad()
def test_moments_of_groups() -> None:
    """Far from zero, in several blocks: as exact as torch's are where channels are first."""
    x = torch.randn(9, 40, 60, 16) * torch.rand(16) + 50
    grouped = x.double().unflatten(-1, (4, 4))
    mean, var = fast.group_moments(x, 4)
    torch.testing.assert_close(mean, grouped.mean((0, 1, 2, 4)), rtol=1e-9, atol=0)
    torch.testing.assert_close(var, grouped.var((0, 1, 2, 4), correction=0), rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def vae() -> CausalVAE:
    torch.manual_seed(0)
    return CausalVAE(VAE).eval()


@pytest.mark.parametrize("strip", [2**12, 2**30])
@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [(torch.float32, "own"), (torch.float32, "plain"), (torch.bfloat16, "own"), (torch.bfloat16, "plain")],
)
def test_vae_without_gradients(
    vae: CausalVAE, dtype: torch.dtype, kernels: str, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clips in several pieces; sides that are no multiple of a tile; narrow strips and whole frames;
    Winograd's kernels where they pay, and as on a GPU."""
    if kernels == "plain":
        monkeypatch.setattr(fast, "winograd_pays", lambda conv, x: False)
        monkeypatch.setattr(fast, "HALF_BY_WINOGRAD_ONLY", ())
    monkeypatch.setitem(fast.STRIP_BYTES, "cpu", strip)
    monkeypatch.setattr(fast, "WINOGRAD_STRIP_BYTES", strip)
    monkeypatch.setattr(fast, "OTHER_FEWEST_PLACES", 4)
    monkeypatch.setattr(blocks, "FRAMES_BYTES", strip)
    net, exact_net = copy.deepcopy(vae).to(dtype), copy.deepcopy(vae).double()
    z, pixels = torch.randn(2, 4, 5, 3, 5), torch.rand(2, 3, 17, 24, 40) * 2 - 1
    for run, x in ((lambda net, x: net.decode(x), z), (lambda net, x: net.encode(x).mean, pixels)):
        exact = run(exact_net, x.double()).detach()
        plain = run(net, x.to(dtype)).detach()
        with torch.no_grad():
            quick = run(net, x.to(dtype))
        encodes_half = x is pixels and dtype == torch.bfloat16 and kernels == "own"
        assert encodes_half or not torch.equal(quick, plain), "the quick form was not taken"
        assert error(quick, exact) < (4e-6 if dtype == torch.float32 else 1.2 * error(plain, exact))


def test_strips_are_channels_last_on_a_gpu(vae: CausalVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """The strides by which cuDNN is chosen its layout, also of the batch whose size is one."""
    layouts: list[bool] = []

    def convolve(x: Tensor, *args: Any, **options: Any) -> Tensor:
        strides = [x.stride(i) for i in (1, 4, 3, 2, 0)]
        layouts.append(strides == sorted(strides) and strides[0] == 1)
        return convolve_extended(x, *args, **options)

    monkeypatch.setattr(fast, "convolve_extended", convolve)
    with torch.no_grad():
        copy.deepcopy(vae).to("meta").decode(torch.empty(1, 4, 3, 6, 10, device="meta"))
    assert layouts and all(layouts)


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_planned_memory_is_what_is_taken(vae: CausalVAE, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is made on the meta device, as a GPU computes; here the CPU computes so too."""
    monkeypatch.setattr(fast, "winograd_pays", lambda conv, x: False)
    monkeypatch.setattr(fast, "HALF_BY_WINOGRAD_ONLY", ())
    for module, name in ((fast, "STRIP_BYTES"), (fast, "BLOCKS")):
        monkeypatch.setattr(module, name, {})
    for name in ("OTHER_STRIP_BYTES", "OTHER_BLOCK"):
        monkeypatch.setattr(fast, name, 2**14)
    monkeypatch.setattr(blocks, "FRAMES_BYTES", 2**16)
    net = copy.deepcopy(vae).to(torch.bfloat16)
    x = torch.randn((1, 4, 5, 6, 10) if way == "decode" else (1, 3, 17, 48, 80)).bfloat16()
    measured = peak_bytes(lambda: getattr(net, way)(x))
    net, x = net.to("meta"), x.to("meta")
    assert peak_bytes(lambda: getattr(net, way)(x)) == pytest.approx(measured, rel=0.01)


def test_memory_of_the_released_vae() -> None:
    """Weights and tensors of 49 x 480 x 720 in half precision, whole frames in the model's own pieces."""
    config = PRESETS["cogvideox-5b"]()
    need = {x.stage: x for x in stage_needs(config, native_plan(config), torch.float16)}["decode"]
    assert need.weights + need.work < 6 * 2**30


def test_who_takes_the_quick_form(vae: CausalVAE) -> None:
    class Other(ClipContext):
        pass

    conv, x = CausalConv3d(32, 32), torch.zeros(1, 32, 1, 16, 16)
    assert not fast.applies(conv, x, ClipContext(), modulated=True)
    with torch.no_grad():
        assert fast.applies(conv, x, ClipContext(), modulated=True)
        assert not fast.applies(conv, x, Other(), modulated=True)
        assert not fast.applies(conv, x.double(), ClipContext(), modulated=True)
        assert not fast.applies(conv, x.bfloat16(), ClipContext(), modulated=True)
        assert fast.applies(conv, torch.zeros(1, 32, 5, 16, 16).bfloat16(), ClipContext(), modulated=True)
        assert not fast.applies(
            conv, torch.zeros(1, 32, 5, 16, 16).bfloat16(), ClipContext(), modulated=False
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert not fast.applies(conv, x, ClipContext(), modulated=True)
