"""The parts of the training loop that are not about one step: runs that are killed, blocks that compute
twice, samples, and what several processes agree on (the processes themselves: tests/distributed)."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvideo_ar.layout import keyframe_layout, training_batch
from cogvideo_ar.training.recipes import stage_loss
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideox_diff.config import TransformerConfig
from cogvideox_diff.transformer import ExpertTransformer
from shared.distributed import ParallelContext
from shared.errors import SettingError
from shared.offload import blocks_of
from shared.training import Interrupted, Logs, TrainConfig, recipe_of, train
from shared.training_memory import RECOMPUTE, Recompute, recomputed
from shared.training_parallel import Strategy, nets_of, whole_state
from shared.training_state import TrainState, newest
from shared.video import Video
from tests.cogvideo_ar.tiny import NUM_IMAGE_TOKENS, tiny_config

CONFIG = TrainConfig(
    steps=40, lr=1e-2, muon_lr=1e-2, optimizer="muon", ema_decay=0.9, warmup_steps=3, accumulation=2,
    log_every=1, save_every=3,
)  # fmt: skip


def learn(folder: Path, config: TrainConfig = CONFIG, **options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.1), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 1))

    def objective(micro: int) -> tuple[Tensor, Logs]:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(micro))
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {"samples": 8, "tokens": 32}

    train(model, objective, config, folder, quiet=True, **options)
    return model


def lines(folder: Path) -> list[dict[str, float]]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- killed


def killed_at(folder: Path, last: int, seconds: float) -> None:
    """Trains, and is killed so many seconds after it has taken step `last`, whatever it does then."""
    torch.set_num_threads(1)

    def kill() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def after_step(step: int) -> None:
        if step == last:
            threading.Thread(target=kill).start()
        elif step == CONFIG.steps - 1:
            time.sleep(60)  # so that it cannot end before the thread has had its turn

    learn(folder, after_step=after_step)


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """SIGKILL, twice, wherever it hits: also while a state is being written."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shared.training", "torch.utils.tensorboard"])  # imported once
    draws = torch.Generator()
    draws.seed()  # another moment every time that this runs
    begun = 0
    for _ in range(2):
        last, delay = begun + int(torch.randint(1, 16, (), generator=draws)), torch.rand((), generator=draws)
        arguments = (tmp_path / "killed", last, 0.02 * float(delay))
        process = context.Process(target=killed_at, args=arguments, daemon=True)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        begun = newest(tmp_path / "killed")[1]
    reached = lines(tmp_path / "killed")[-1]["step"]
    path, step = newest(tmp_path / "killed")
    assert (path is None) == (step == 0) and 0 <= reached - step <= 3
    resumed, whole = learn(tmp_path / "killed"), learn(tmp_path / "whole")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    states = [
        torch.load(tmp_path / run / "state.pt", weights_only=True)["optimizers"]
        for run in ("killed", "whole")
    ]
    for ours, theirs in zip(*states, strict=True):
        for index, entries in theirs["state"].items():
            assert all(torch.equal(ours["state"][index][key], x) for key, x in entries.items())
    losses = [{line["step"]: line["loss"] for line in lines(tmp_path / run)} for run in ("killed", "whole")]
    assert losses[0] == losses[1]


# ---- stopped after its last step, refused


@pytest.mark.parametrize("during", ["save", "evaluate", "sample"])
def test_a_stop_after_the_last_step_is_not_swallowed(
    during: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    hooks: dict[str, Any] = {
        "evaluate": lambda net, step: stop() or {},
        "sample": lambda net, step: stop() or {},
    }
    save, config = TrainState.save, replace(CONFIG, steps=2)
    with monkeypatch.context() as patch:
        if during == "save":
            patch.setattr(TrainState, "save", lambda *args: stop() or save(*args))
        with pytest.raises(Interrupted, match="stopped at step 2 of 2"):
            learn(tmp_path, config, **{name: hook for name, hook in hooks.items() if name == during})
    steps: list[int] = []
    learn(tmp_path, config, after_step=steps.append)
    assert not steps  # it had learnt everything


def test_a_recipe_of_an_earlier_version_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    short = replace(CONFIG, steps=2)
    learn(tmp_path, short, recipe=recipe_of(short, batch=4))
    with pytest.raises(
        SettingError, match=r"recipe \(it does not say tokens, as those of an earlier version"
    ):
        learn(tmp_path, short, recipe=recipe_of(short, batch=4, tokens="abc"))
    with pytest.raises(SettingError, match=r"recipe \(batch differ; it does not say tokens"):
        learn(tmp_path, short, recipe=recipe_of(short, batch=5, tokens="abc"))
    with pytest.raises(SettingError, match=r"recipe \(batch differ\)"):
        learn(tmp_path, short, recipe=recipe_of(short))


ILLEGAL: dict[str, list[tuple[str, Any]]] = {
    "at least 1": [("steps", 0), ("accumulation", 0), ("log_every", 0), ("save_every", -3)],
    "at least 0": [
        *[("lr", -1.0), ("lr", math.nan), ("lr", math.inf), ("muon_lr", -1.0), ("weight_decay", -0.1)],
        *[("warmup_steps", -5), ("evaluate_every", -1), ("sample_every", -1)],
    ],
    "above 0": [("clip_norm", 0.0), ("clip_norm", -1.0)],
    "in [0, 1]": [("decay_fraction", 5.0), ("decay_fraction", -0.1), ("final_lr_fraction", 1.5)],
    "in [0, 1)": [("betas", (1.5, 0.9)), ("betas", (0.9, 1.0)), ("ema_decay", 1.0), ("ema_decay", -0.1)],
    "0 to 4294967295": [("seed", -1), ("seed", 2**32)],
}


@pytest.mark.parametrize(
    ("field", "value", "legal"), [(*x, legal) for legal in ILLEGAL for x in ILLEGAL[legal]]
)
def test_illegal_settings(field: str, value: Any, legal: str) -> None:
    with pytest.raises(SettingError, match=re.escape(f"{field} must be {legal}, got {value}")):
        replace(CONFIG, **{field: value})


def test_the_ends_of_the_legal_ranges() -> None:
    none = dict.fromkeys(("lr", "muon_lr", "weight_decay", "decay_fraction", "final_lr_fraction"), 0.0)
    replace(CONFIG, **none, warmup_steps=0, betas=(0.0, 0.0))
    replace(CONFIG, decay_fraction=1.0, final_lr_fraction=1.0, clip_norm=math.inf, seed=2**32 - 1)


# ---- blocks that compute twice


def autoregressive() -> tuple[nn.Module, Tensor]:
    config = tiny_config(num_frames=3, hidden_dropout=0.2, attention_dropout=0.2)
    torch.manual_seed(0)
    model, draws = CogVideoTransformer(config), torch.Generator().manual_seed(1)
    text = torch.randint(NUM_IMAGE_TOKENS, config.vocab_size, (2, 5), generator=draws)
    frames = torch.randint(NUM_IMAGE_TOKENS, (2, 3, 16), generator=draws)
    batch = training_batch(keyframe_layout(config, 5), text, frames, start_of_image=24)
    return model, stage_loss(model, batch)[0]


def diffusion() -> tuple[nn.Module, Tensor]:
    config = TransformerConfig(
        num_layers=3, num_heads=2, head_dim=16, in_channels=4, out_channels=4, position="rope",
        sample_size=(2, 4, 4), time_embed_dim=16, text_dim=12, text_len=5,
    )  # fmt: skip
    model, draws = ExpertTransformer(config), torch.Generator().manual_seed(1)
    model.init_weights(torch.Generator().manual_seed(0), zero_modulation=False)
    latents, text = torch.randn(2, 2, 4, 4, 4, generator=draws), torch.randn(2, 5, 12, generator=draws)
    return model, model(latents, text, torch.tensor([3, 900])).square().mean()


NETS = {"ar": autoregressive, "diff": diffusion}


def gradients(family: str, mode: Recompute, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """As `mode` gives them, with the switch thrown as soon as the net is built."""
    kind = {"ar": CogVideoTransformer, "diff": ExpertTransformer}[family]
    forward, run = kind.forward, {}

    def switched(self: nn.Module, *args, **kwargs) -> Tensor:
        run["blocks"] = recomputed(self, mode)
        run["blocks"].__enter__()
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", switched)
        model, loss = NETS[family]()
    loss.backward()
    run["blocks"].__exit__(None, None, None)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", NETS)
@pytest.mark.parametrize("mode", RECOMPUTE[1:])
def test_computing_twice_gives_the_same_gradients(
    family: str, mode: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, dropout included."""
    expected, got = (gradients(family, m, monkeypatch) for m in ("none", mode))
    assert got.keys() == expected.keys() and len(got) > 30
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_computing_twice_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    for mode in ("none", "block"):
        sizes: list[int] = []

        def pack(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            gradients("diff", mode, monkeypatch)
        kept[mode] = sum(sizes)
    assert kept["block"] < 0.3 * kept["none"]


def test_blocks_are_as_before_afterwards() -> None:
    model, _ = diffusion()
    with recomputed(model, "block"):
        assert all("forward" in vars(block) for block in blocks_of(model))
        assert "blocks.0.mlp.fc1.weight" in model.state_dict()  # names stay
    assert len(blocks_of(model)) == 3
    assert not any("forward" in vars(module) for module in model.modules())


# ---- what is shown


def test_samples_are_drawn_with_the_averaged_weights(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = []

    def sample(model: nn.Module, step: int) -> dict[str, Video]:
        assert not model.training and not torch.is_grad_enabled()
        asked.append((step, model[0].weight.clone()))
        frames = torch.full((3, 8, 10, 3), 20 * step, dtype=torch.uint8)
        return {"a red circle": Video(frames=frames, fps=8)}

    model = learn(tmp_path, replace(CONFIG, steps=5, sample_every=2), sample=sample)
    assert [step for step, _ in asked] == [2, 4, 5]
    assert torch.equal(asked[-1][1], model[0].weight)
    made = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert made == [f"000000{step}-a red circle.gif" for step in (2, 4, 5)]
    events = EventAccumulator(str(tmp_path)).Reload()
    images = events.Images("samples/a red circle")
    assert [(image.step, image.height, image.width) for image in images] == [(s, 8, 30) for s in (2, 4, 5)]


def test_counts_become_rates(tmp_path: Path) -> None:
    learn(tmp_path, replace(CONFIG, steps=2))
    for line in lines(tmp_path):
        assert line["samples_per_second"] * line["seconds_per_step"] == pytest.approx(2 * 8)
        assert line["tokens_per_second"] == pytest.approx(4 * line["samples_per_second"])
        assert line["memory_bytes"] > 1e7 and "samples" not in line


def test_pairs_become_means_over_the_micro_batches_that_have_them(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)

    def objective(micro: int) -> tuple[Tensor, dict[str, Any]]:
        figures: dict[str, Any] = {"early": (6.0, 3)} if micro % 3 == 0 else {"late": (1.0 * micro, 2)}
        return model.weight.square().sum(), figures

    train(model, objective, TrainConfig(steps=1, accumulation=3, log_every=1), tmp_path, quiet=True)
    (line,) = lines(tmp_path)
    assert line["early"] == pytest.approx(6 / 3) and line["late"] == pytest.approx((1 + 2) / 4)
    assert not any("count" in name for name in line)


# ---- several processes, as far as one can tell


def place_of(rank: int, degree: int) -> Strategy:
    return Strategy(world=ParallelContext(ranks=tuple(range(degree)), rank=rank))


@pytest.mark.parametrize(("accumulation", "degree"), [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6)])
def test_every_micro_batch_is_taken_once(accumulation: int, degree: int) -> None:
    for step in (0, 7):
        taken = [place_of(rank, degree).micro_steps(step, accumulation) for rank in range(degree)]
        assert {len(own) for own in taken} == {accumulation // degree}
        every = sorted(micro for own in taken for micro in own)
        assert every == list(range(step * accumulation, (step + 1) * accumulation))


def test_uneven_shares_are_refused() -> None:
    with pytest.raises(SettingError, match=r"accumulation=6 .*4 processes are not legal; legal: 1, 2, 3, 6"):
        place_of(0, 4).micro_steps(0, 6)


def test_nets_of_containers() -> None:
    model, _ = diffusion()
    assert nets_of(model) == [model]
    assert nets_of(nn.ModuleDict({"one": model, "two": nn.ModuleList([nn.Linear(1, 1)])}))[0] is model
    bare = nn.Module()
    bare.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(SettingError, match="Module has parameters but no forward"):
        nets_of(bare)


def test_the_state_of_one_process_is_whole() -> None:
    model, _ = diffusion()
    state = whole_state(model, Strategy())
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())
    assert not any(x.requires_grad for x in state.values())
