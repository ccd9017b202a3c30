"""Real nets on a GPU: what waits on the CPU, and the VAE's quick form in half precision."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from cogvideox_diff.config import VAEConfig
from cogvideox_diff.vae import blocks, fast
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.offload import Placement
from tests.cogvideox_diff.tiny_pipeline import PROMPT, clip, make, write_tokenizer

pytestmark = pytest.mark.gpu

VAE = VAEConfig(latent_channels=4, widths=(32, 32, 32, 64), blocks_per_level=1, norm_groups=8)


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_offload_changes_nothing(tmp_path: Path, mode: str) -> None:
    """All nets, with the VAE both ways."""
    pipe = make("5b", write_tokenizer(tmp_path))
    engine = pipe.engine
    made = []
    for way in ("none", mode):
        engine.placement = Placement("cuda", way)  # type: ignore[arg-type]
        engine.placement.place(engine.parts.transformer, engine.parts.vae, engine.parts.text_encoder)
        engine._known.clear()  # prompts are encoded anew
        latents = pipe(PROMPT, video=clip(), output_type="latent")
        made.append((latents.cpu(), pipe(PROMPT, video=clip()).frames))
    assert torch.equal(made[0][0], made[1][0]) and torch.equal(made[0][1], made[1][1])
    assert next(engine.parts.vae.parameters()).device.type == "cpu"


@pytest.mark.parametrize("strip", [2**14, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_the_vaes_quick_form(dtype: torch.dtype, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the plain layers, both against float64; in several pieces, narrow strips and whole frames."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(fast, "OTHER_STRIP_BYTES", strip)
    monkeypatch.setattr(blocks, "FRAMES_BYTES", strip)
    torch.manual_seed(0)
    vae = CausalVAE(VAE).cuda()
    z, pixels = torch.randn(2, 4, 5, 3, 5).cuda(), torch.rand(2, 3, 17, 24, 40).cuda() * 2 - 1
    net, exact_net = copy.deepcopy(vae).to(dtype), vae.double()
    for run, x in ((lambda net, x: net.decode(x), z), (lambda net, x: net.encode(x).mean, pixels)):
        exact = run(exact_net, x.double())
        quick = run(net, x.to(dtype))
        with monkeypatch.context() as plainly:
            plainly.setattr(fast, "applies", lambda *args, **options: False)
            plain = run(net, x.to(dtype))
        errors = [float((y.double() - exact).norm() / exact.norm()) for y in (quick, plain)]
        assert not torch.equal(quick, plain), "the quick form was not taken"
        assert errors[0] < (1e-5 if dtype == torch.float32 else 1.2 * errors[1]), errors
