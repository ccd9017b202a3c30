"""What all ablations share: sizes, one short training, and its figures in a file."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shared.files import write_json
from shared.training import TrainConfig, train

Figures = dict[str, list[float]]
"""Name of a measure -> one value per held-out clip or prompt, or a single one for the whole run."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of every run; the defaults take about 45 minutes of one CPU core for three seeds."""

    num_clips: int = 2048  # encoded once; the last `num_held` of them are never trained on
    num_held: int = 96
    num_prompts: int = 30  # continued after an autoregressive run
    num_layers: int = 4
    num_heads: int = 4  # of 32
    diffusion_steps: int = 200
    diffusion_batch: int = 16
    base_steps: int = 350  # the image model that all autoregressive runs start from
    base_batch: int = 32
    ar_steps: int = 120
    ar_batch: int = 8

    def train_config(self, steps: int, seed: int, *, lr: float, muon_lr: float) -> TrainConfig:
        """The demo recipes', for a short run: it gets further at higher rates than theirs."""
        return TrainConfig(
            steps=steps,
            lr=lr,
            optimizer="muon",
            muon_lr=muon_lr,
            weight_decay=0.01,
            warmup_steps=min(30, steps),
            decay_fraction=0.5,
            autocast="bfloat16",
            seed=seed,
            save_every=steps,
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run of one arm."""

    arm: str
    seed: int
    figures: Figures
    trained: int  # parameters that learn
    seconds_per_step: float  # of CPU time
    settings: dict[str, Any] = field(default_factory=dict)


def run_once(
    arm: str,
    seed: int,
    settings: Settings,
    folder: Path,
    measure: Callable[[], Outcome],
    *,
    needed: Collection[str] = (),
) -> Outcome:
    """`measure`'s outcome, or the one that an earlier call with the same settings left in `folder`, if it has
    all figures that are `needed`."""
    path = folder / f"{arm}-{seed}.json"
    said = asdict(settings)
    if path.exists():
        known = Outcome(**json.loads(path.read_text(encoding="utf-8")))
        if known.settings == said and known.figures.keys() >= set(needed):
            return known
    made = asdict(measure()) | {"settings": said}
    write_json(path, made)
    return Outcome(**made)


def fit(model: nn.Module, loss_of: Callable[[int], Tensor], config: TrainConfig) -> tuple[list[float], float]:
    """Train in place; the loss of every step, and the CPU seconds of one."""
    losses: list[float] = []

    def objective(step: int) -> tuple[Tensor, dict[str, float]]:
        loss = loss_of(step)
        losses.append(float(loss.detach()))
        return loss, {}

    with tempfile.TemporaryDirectory() as scratch:  # a run takes a minute: its state is not worth keeping
        began = time.process_time()
        train(model, objective, config, Path(scratch), quiet=True)
    return losses, (time.process_time() - began) / config.steps


def num_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
