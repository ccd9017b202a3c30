"""Two processes learn what one learns: both families' nets with their own losses, gradients summed (ddp) or
everything sharded (fsdp), and states that pass from one number of processes to another."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cogvideo_ar.config import TransformerConfig as ARConfig
from cogvideo_ar.layout import SequenceLayout, image_layout, keyframe_layout, training_batch
from cogvideo_ar.training.recipes import stage_loss
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideox_diff.config import ScheduleConfig, TransformerConfig, VAEConfig
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.training.data import LatentClips
from cogvideox_diff.training.objective import summed
from cogvideox_diff.training.recipes import _batch_loss
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.clips import shapes
from shared.distributed import ParallelContext
from shared.errors import SettingError, WeightsError
from shared.training import Interrupted, Logs, Objective, TrainConfig, train
from shared.training_parallel import Parallelism, Strategy, started_strategy, whole_state
from shared.training_state import newest
from tests.distributed.launch import run_ranks

TOLERANCE = 2e-5  # rounding of float32 sums, through three steps
KEY_BIASES = ("norm_k.bias", "qkv.bias")  # softmax cancels a bias of the keys: its gradient is all rounding,
KEY_BIAS_TOLERANCE = 2e-3  # which Adam brings up to the size of a step
VAE_TOLERANCE = 1e-3  # as Muon does with the smallest singular values; its norms cancel much, hence float64
CONFIG = TrainConfig(
    steps=3, lr=1e-2, muon_lr=1e-2, optimizer="muon", ema_decay=0.9, warmup_steps=1, accumulation=4,
    clip_norm=0.5, log_every=1,
)  # fmt: skip
MODES: tuple[Parallelism, ...] = ("ddp", "fsdp")


# ---- both families, tiny


class Diffusion(nn.Module):
    """A container like the recipe's: two nets that learn together, itself never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = TransformerConfig(
            num_layers=2, num_heads=3, head_dim=16, in_channels=4, out_channels=4, position="rope",
            sample_size=(2, 4, 4), time_embed_dim=17, text_dim=12, text_len=5,
        )  # fmt: skip
        self.text_encoder = nn.Embedding(40, 12)
        self.transformer = ExpertTransformer(config)
        self.transformer.init_weights(torch.Generator().manual_seed(0), zero_modulation=False)


def diffusion() -> tuple[nn.Module, Objective]:
    model, schedule = Diffusion(), NoiseSchedule.from_config(ScheduleConfig())
    captions = shapes.captions()[:6]
    draws = torch.Generator().manual_seed(1)
    clips = LatentClips(latents=torch.randn(6, 2, 4, 4, 4, generator=draws).half(), captions=tuple(captions))
    said = ["", *(c.text for c in captions), *(c.image_text for c in captions)]
    ids = {text: torch.tensor([(7 * i + k) % 40 for k in range(5)]) for i, text in enumerate(said)}

    def objective(micro: int) -> tuple[Tensor, Logs]:
        rng = np.random.default_rng(micro)
        (first, figures), (second, more) = (
            _batch_loss(model, schedule, 1.0, ids, clips, size, rng)  # type: ignore[arg-type]
            for size in (2, 3)
        )
        return first + 0.5 * second, {"second": float(second.detach())} | summed(figures, more)

    return model, objective


def autoregressive() -> tuple[nn.Module, Objective]:
    config = ARConfig(
        num_layers=2, num_heads=2, head_dim=8, num_image_tokens=32, vocab_size=48, start_of_image=40,
        pad_token=33, grid=(4, 4), num_frames=3, max_text_len=6, attention_dropout=0.1, hidden_dropout=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CogVideoTransformer(config)

    def batch(draws: torch.Generator, layout: SequenceLayout) -> tuple[Tensor, dict[int, float]]:
        text = torch.randint(32, 48, (2, 6), generator=draws)
        frames = torch.randint(32, (2, layout.num_frames, 16), generator=draws)
        return stage_loss(model, training_batch(layout, text, frames, start_of_image=40))

    def objective(micro: int) -> tuple[Tensor, Logs]:
        draws = torch.Generator().manual_seed(micro)
        video, logs = batch(draws, keyframe_layout(config, 6))
        image, _ = batch(draws, image_layout(config, 6))  # without the temporal channel
        return video + image, {f"frame{t}": x for t, x in logs.items()}

    return model, objective


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Objective]]] = {"diff": diffusion, "ar": autoregressive}


def frozen_base() -> tuple[nn.Module, Objective]:
    """Stage 2: the temporal channel alone learns."""
    model, objective = autoregressive()
    assert isinstance(model, CogVideoTransformer)
    for _, parameter in model.base_parameters():
        parameter.requires_grad = False
    return model, objective


def codec() -> tuple[nn.Module, Objective]:
    """The VAE, whose levels nobody calls, in two pieces of a clip."""
    torch.manual_seed(0)
    config = VAEConfig(latent_channels=4, widths=(8, 8, 8, 16), blocks_per_level=1, norm_groups=4)
    model = CausalVAE(config).double()

    def objective(micro: int) -> tuple[Tensor, Logs]:
        draws = torch.Generator().manual_seed(micro)
        pixels = torch.rand(1, 3, 17, 16, 16, generator=draws).double() * 2 - 1
        posterior = model.encode(pixels)
        error = (model.decode(posterior.mode()) - pixels).square().mean()
        return error + 1e-3 * posterior.kl() / posterior.mean.numel(), {}

    return model, objective


CASES = FAMILIES | {"frozen base": frozen_base, "vae": codec}


# ---- runs


def learnt(case: str, folder: Path, strategy: Strategy, config: TrainConfig = CONFIG) -> dict[str, Tensor]:
    """Weights after training, whole, on the main process."""
    model, objective = CASES[case]()
    train(model, objective, config, folder, strategy=strategy, quiet=True)
    return whole_state(model, strategy)


def strategy_of(world: ParallelContext, parallel: Parallelism, **options: Any) -> Strategy:
    return Strategy(parallel=parallel, world=world, control=world.group, **options)


@cache
def alone(case: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        return learnt(case, Path(folder), Strategy())


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], case: str) -> None:
    """Every weight, within the tolerance of the largest change that training made to any."""
    before = CASES[case]()[0].state_dict()
    largest = max(float((expected[name] - before[name]).abs().max()) for name in expected)
    assert largest > 1e-3 and got.keys() == expected.keys()
    usual = VAE_TOLERANCE if case == "vae" else TOLERANCE
    for name in expected:
        error = float((got[name] - expected[name]).abs().max()) / largest
        assert error <= (KEY_BIAS_TOLERANCE if name.endswith(KEY_BIASES) else usual), (name, error)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stopped(case: str, folder: Path, strategy: Strategy, *, by_rank: int = 0) -> None:
    """A run of which one process gets SIGTERM within its second step."""
    model, objective = CASES[case]()

    def interrupted(micro: int) -> tuple[Tensor, Logs]:
        if micro // CONFIG.accumulation == 1 and strategy.world.rank == by_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return objective(micro)

    with pytest.raises(Interrupted, match="stopped at step 2 of 3"):
        train(model, interrupted, CONFIG, folder, strategy=strategy, quiet=True)


def broken(folder: Path, strategy: Strategy) -> str:
    """What a process says when only the other one's loss is not finite."""
    model, objective = autoregressive()

    def bad(micro: int) -> tuple[Tensor, Logs]:
        loss, logs = objective(micro)
        return loss * (float("nan") if micro == 5 else 1.0), logs

    with pytest.raises(FloatingPointError) as caught:
        train(model, bad, CONFIG, folder, strategy=strategy, quiet=True)
    return str(caught.value)


def refused(folder: Path, strategy: Strategy) -> str:
    with pytest.raises(SettingError) as caught:
        learnt("ar", folder, strategy, replace(CONFIG, accumulation=3))
    return str(caught.value)


def unequal(folder: Path, strategy: Strategy) -> str:
    """What a process says when each comes with weights of its own."""
    model, objective = autoregressive()
    torch.nn.init.constant_(model.get_parameter("final_norm.weight"), 1.0 + strategy.world.rank)
    with pytest.raises(ValueError) as caught:
        train(model, objective, CONFIG, folder, strategy=strategy, quiet=True)
    return str(caught.value)


# ---- what the two processes do; one start for all of it


def work(world: ParallelContext, folder: Path) -> dict[str, Any]:
    torch.set_grad_enabled(True)
    strategies = {mode: strategy_of(world, mode) for mode in MODES}
    results: dict[str, Any] = {}
    for mode, strategy in strategies.items():
        for case in CASES:
            results[f"{mode} {case}"] = learnt(case, folder / f"{mode} {case}", strategy)
        stopped("diff", folder / f"{mode} stopped", strategy, by_rank=1)
        strategy.wait()
        if strategy.is_main:
            for use in ("resumed", "exchanged"):
                shutil.copytree(folder / f"{mode} stopped", folder / f"{mode} {use}")
        strategy.wait()
        results[f"{mode} resumed"] = learnt("diff", folder / f"{mode} resumed", strategy)
        results[f"{mode} from one"] = learnt("diff", folder / f"{mode} from one", strategy)
        results[f"{mode} broken"] = broken(folder / f"{mode} broken", strategy)
    for mode, other in (("fsdp", "ddp"), ("ddp", "fsdp")):
        results[f"{mode} exchanged"] = learnt("diff", folder / f"{mode} exchanged", strategies[other])
    results["refused"] = refused(folder / "refused", strategies["fsdp"])
    results["unequal"] = unequal(folder / "unequal", strategies["ddp"])
    thrifty = strategy_of(world, "fsdp", activation_checkpointing="block")
    results["thrifty"] = learnt("ar", folder / "thrifty", thrifty)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of all runs, and what the main process and the other one returned."""
    folder = tmp_path_factory.mktemp("parallel")
    for mode in MODES:
        stopped("diff", folder / f"{mode} from one", Strategy())
    return folder, *run_ranks(partial(work, folder=folder), folder / "ranks")


# ---- the same batches, the same weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(case: str, mode: str, runs: Any) -> None:
    _, main, other = runs
    assert_near(main[f"{mode} {case}"], alone(case), case)
    assert other[f"{mode} {case}"] == {}


@pytest.mark.parametrize("mode", MODES)
def test_figures_are_those_of_all_micro_batches(mode: str, runs: Any, tmp_path: Path) -> None:
    learnt("diff", tmp_path, Strategy())
    for got, expected in zip(lines(runs[0] / f"{mode} diff"), lines(tmp_path), strict=True):
        assert got.keys() == expected.keys()
        by_timestep = {name for name in got if name.startswith("timesteps")}
        assert by_timestep <= {f"timesteps{t}-{t + 199}" for t in range(0, 1000, 200)}
        assert len(by_timestep) > 2
        for name in ("loss", "second", "grad_norm", "lr", *by_timestep):
            assert got[name] == pytest.approx(expected[name], rel=1e-5)
        assert got["samples_per_second"] * got["seconds_per_step"] == pytest.approx(4 * 5)
        tokens = 4 * 5 * (5 + 2 * 2 * 2)  # text, and 2 frames of 2 x 2 patches
        assert got["tokens_per_second"] * got["seconds_per_step"] == pytest.approx(tokens)


def test_gradients_are_computed_twice_and_learn_the_same(runs: Any) -> None:
    assert_near(runs[1]["thrifty"], alone("ar"), "ar")


@pytest.mark.parametrize("mode", MODES)
def test_one_bad_loss_ends_all_processes(mode: str, runs: Any) -> None:
    for said in (result[f"{mode} broken"] for result in runs[1:]):
        assert said.startswith("the loss is nan at step 1")


def test_batches_that_cannot_be_dealt_out_are_refused(runs: Any) -> None:
    for result in runs[1:]:
        assert "accumulation=3" in result["refused"] and "legal: 1, 3" in result["refused"]


def test_unequal_weights_are_refused(runs: Any) -> None:
    for result in runs[1:]:
        assert "start from different weights" in result["unequal"]


# ---- states


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_run_resumes_bit_for_bit(mode: str, runs: Any) -> None:
    folder, main, _ = runs
    assert [path.name for path in (folder / f"{mode} stopped").glob("state*")] == ["state-2"]
    assert [path.name for path in (folder / f"{mode} resumed").glob("state*")] == ["state-3"]
    for name, value in main[f"{mode} diff"].items():
        assert torch.equal(main[f"{mode} resumed"][name], value), name


@pytest.mark.parametrize("mode", MODES)
def test_one_process_continues_what_two_began(mode: str, runs: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0] / f"{mode} stopped", tmp_path / "run")
    assert_near(learnt("diff", folder, Strategy()), alone("diff"), "diff")
    assert [path.name for path in folder.glob("state*")] == ["state.pt"]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_continue_what_one_began(mode: str, runs: Any) -> None:
    assert_near(runs[1][f"{mode} from one"], alone("diff"), "diff")
    assert [path.name for path in (runs[0] / f"{mode} from one").glob("state*")] == ["state-3"]


@pytest.mark.parametrize("mode", MODES)
def test_a_state_passes_to_the_other_way_of_sharing(mode: str, runs: Any) -> None:
    assert_near(runs[1][f"{mode} exchanged"], alone("diff"), "diff")


def test_a_finished_run_is_read_by_one_process(runs: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0] / "fsdp ar", tmp_path / "run")
    for name, value in learnt("ar", folder, Strategy()).items():
        assert torch.equal(value, runs[1]["fsdp ar"][name]), name


def test_a_state_of_another_model_is_named(runs: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0] / "fsdp ar", tmp_path / "run")
    with pytest.raises(WeightsError, match=r"state-3 does not continue this run: no model\."):
        learnt("diff", folder, Strategy())


@pytest.mark.parametrize("damage", ["shard", "index"])
def test_a_damaged_state_is_named(damage: str, runs: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0] / "fsdp stopped", tmp_path / "run")
    path = next((folder / "state-2").glob("*.distcp" if damage == "shard" else ".metadata"))
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(WeightsError, match=r"state-2 does not continue this run: ."):
        learnt("diff", folder, Strategy())


def test_a_save_that_was_killed_leaves_the_state_before_it(runs: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0] / "ddp stopped", tmp_path / "run")
    shutil.copytree(folder / "state-2", folder / "state-3.part")
    (folder / "state-3.part" / ".metadata").unlink()
    assert newest(folder) == (folder / "state-2", 2)
    learnt("diff", folder, Strategy())
    assert [path.name for path in folder.glob("state*")] == ["state.pt"]


# ---- how processes are started


def test_several_processes_must_say_how_they_share() -> None:
    with pytest.raises(SettingError, match="2 processes were started: --parallel ddp or fsdp"):
        with started_strategy("none", {"WORLD_SIZE": "2"}):
            pass


def test_sharing_needs_torchrun() -> None:
    with pytest.raises(SettingError, match="torchrun"), started_strategy("ddp", {}):
        pass
