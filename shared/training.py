"""The one training loop: a function that both families call with a model and an objective.

Data are a function of the step number (`objective(micro_step)`), so a resumed run sees exactly the batches
that an uninterrupted one would have seen, and "exact resume" needs no saved data position.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared.errors import SettingError, WeightsError
from shared.files import write_json
from shared.optimizers import Muon

MUON_MIN_WIDTH = 16

Logs = dict[str, float]
Objective = Callable[[int], tuple[Tensor, dict[str, Any]]]
"""Micro step -> (loss scalar with graph, figures to log). Depends on nothing but the step and the model."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Learning rates rise linearly over `warmup_steps`, stay, and fall linearly to
    `final_lr_fraction` over the last `decay_fraction` of the steps."""

    steps: int
    lr: float = 1e-3
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices by Muon, the rest by AdamW
    muon_lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_lr_fraction: float = 0.05
    clip_norm: float = 1.0
    accumulation: int = 1
    ema_decay: float = 0.0  # 0: none
    seed: int = 0
    autocast: Literal["none", "bfloat16"] = "none"
    log_every: int = 20
    save_every: int = 200
    evaluate_every: int = 0  # 0: only at the end

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise SettingError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    def lr_factor(self, step: int) -> float:
        """Share of the full learning rate at a step, 0..1."""
        rise = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        decay_steps = max(1, round(self.steps * self.decay_fraction))
        left = min(1.0, (self.steps - step) / decay_steps)
        return rise * (self.final_lr_fraction + (1 - self.final_lr_fraction) * left)


class EMA:
    """Exponential moving average of the trainable parameters in float32; the early steps average faster:
    decay min(d, (1 + n) / (10 + n)) after n updates."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        named = dict(model.named_parameters())
        names = list(self.shadow)
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [self.shadow[n] for n in names], [named[n].detach().float() for n in names], weight=1 - decay
        )

    @contextmanager
    def applied(self, model: nn.Module):
        """The model with the averaged weights, for evaluation and export."""
        named = dict(model.named_parameters())
        kept = {n: named[n].detach().clone() for n in self.shadow}
        _copy_into(named, self.shadow)
        try:
            yield
        finally:
            _copy_into(named, kept)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.shadow = state["updates"], state["shadow"]


@torch.no_grad()
def _copy_into(named: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        named[name].copy_(value)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices ("muon"). Norms, biases and other vectors are not
    decayed. Embeddings are matrices by shape but tables by meaning, so they stay with AdamW."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise SettingError("nothing to train: every parameter is frozen")
    hidden = _hidden_matrices(model) if config.optimizer == "muon" else set()
    matrices = sorted(trainable.keys() & hidden)
    rest = [p for n, p in trainable.items() if n not in hidden]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8))
    if matrices:
        weights = [trainable[n] for n in matrices]
        optimizers.append(Muon(weights, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


def _hidden_matrices(model: nn.Module) -> set[str]:
    """Weights between hidden layers: linear maps and convolutions but the first and the last ones, which face
    data, text, time or pixels. Those are recognised by their narrow side."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return {
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, kinds) and m.weight.ndim > 1 and min(m.weight.shape[:2]) >= MUON_MIN_WIDTH
    }


class _Stop:
    """SIGTERM and SIGINT ask for an orderly end: finish the step, save, leave."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: the caller's handlers stay
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and saved its state; the same command resumes it."""


def train(
    model: nn.Module,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    *,
    evaluate: Callable[[nn.Module, int], Logs] | None = None,
    after_step: Callable[[int], None] | None = None,
    recipe: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Train `model` in place and return the folder, which then holds `state.pt` (for resuming), `log.jsonl`,
    TensorBoard events, and `model` holds the averaged weights if EMA is on.

    A folder with a `state.pt` is resumed, bit for bit on one process; one whose `recipe` differs is refused.
    Raises `Interrupted` after SIGTERM or SIGINT, with the state saved, and FloatingPointError when the loss
    or its gradient is not finite (the last saved state stays).
    """
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    _check_recipe(folder, recipe)
    optimizers = make_optimizers(model, config)
    ema = EMA(model, config.ema_decay) if config.ema_decay else None
    start = _resume(folder, model, optimizers, ema)
    if start > config.steps:
        raise SettingError(
            f"{folder} holds a run of {start} steps; steps must be at least that, got {config.steps}"
        )
    started = time.monotonic()
    with (
        SummaryWriter(str(folder)) as board,
        open(folder / "log.jsonl", "a", encoding="utf-8") as log,
        tqdm(total=config.steps, initial=start, disable=quiet, unit="step", dynamic_ncols=True) as bar,
        _Stop() as stop,
    ):

        def report(step: int, figures: Logs) -> None:
            for name, value in figures.items():
                board.add_scalar(name, value, step)
            line = {"step": step, "elapsed": round(time.monotonic() - started, 1)} | figures
            log.write(json.dumps(line) + "\n")
            log.flush()

        for step in range(start, config.steps):
            model.train()
            torch.manual_seed(config.seed * 1_000_003 + step)  # dropout too is the same after a resume
            figures = _step(model, objective, optimizers, config, step)
            if ema:
                ema.update(model)
            if after_step:
                after_step(step)
            done = step + 1
            bar.update()
            if done % config.log_every == 0 or done == config.steps:
                report(done, figures)
                bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items()})
            if done % config.save_every == 0 or done == config.steps or stop.signal:
                save_state(folder, done, model, optimizers, ema)
            if stop.signal:
                raise Interrupted(f"stopped at step {done} of {config.steps}; the same command resumes")
            if evaluate and (
                done == config.steps or (config.evaluate_every and done % config.evaluate_every == 0)
            ):
                report(done, _evaluate(model, ema, evaluate, done))
    if ema:
        _copy_into(dict(model.named_parameters()), ema.shadow)
    model.eval()
    return folder


def _step(
    model: nn.Module,
    objective: Objective,
    optimizers: list[torch.optim.Optimizer],
    config: TrainConfig,
    step: int,
) -> Logs:
    totals: dict[str, float] = {}
    began = time.perf_counter()
    factor = config.lr_factor(step)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
    device = next(model.parameters()).device.type
    for micro in range(config.accumulation):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=config.autocast == "bfloat16"):
            loss, logs = objective(step * config.accumulation + micro)
        (loss / config.accumulation).backward()
        for name, value in ({"loss": loss.detach()} | logs).items():
            totals[name] = totals.get(name, 0.0) + float(value) / config.accumulation
    _require_finite("loss", totals["loss"], step)
    parameters = [p for p in model.parameters() if p.grad is not None]
    totals["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, config.clip_norm))
    _require_finite("loss's gradient", totals["grad_norm"], step)
    for optimizer in optimizers:
        optimizer.step()
    totals["lr"] = config.lr * factor
    totals["seconds_per_step"] = time.perf_counter() - began
    return totals


def _require_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value} at step {step}; the last saved state is untouched")


def _evaluate(
    model: nn.Module, ema: EMA | None, evaluate: Callable[[nn.Module, int], Logs], step: int
) -> Logs:
    model.eval()
    with torch.no_grad():
        if ema is None:
            return evaluate(model, step)
        with ema.applied(model):
            return evaluate(model, step)


def save_state(
    folder: Path, step: int, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], ema: EMA | None
) -> None:
    """Write `state.pt` whole or not at all."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "ema": ema.state_dict() if ema else None,
    }
    temporary = folder / "state.pt.part"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "state.pt")


def _resume(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], ema: EMA | None) -> int:
    path = folder / "state.pt"
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            full = [group["full_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, lr in zip(optimizer.param_groups, full, strict=True):
                group["full_lr"] = lr
        if ema and state["ema"]:
            ema.load_state_dict(state["ema"])
        return int(state["step"])
    except (RuntimeError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path} does not continue this run: {reason}") from error


def _check_recipe(folder: Path, recipe: dict[str, Any] | None) -> None:
    """A run folder belongs to one recipe; its steps may be raised, nothing else may change."""
    if recipe is None:
        return
    path = folder / "recipe.json"
    new = json.loads(json.dumps(recipe, sort_keys=True, default=str))
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and k != "steps")
        if changed:
            raise SettingError(
                f"{folder} holds a run with another recipe ({', '.join(changed)} differ); "
                "choose another folder"
            )
    write_json(path, new)


def recipe_of(config: TrainConfig, **parts: Any) -> dict[str, Any]:
    """What identifies a run: the training settings and whatever else the caller names."""
    figures = asdict(config)
    for name in ("log_every", "save_every", "evaluate_every"):  # do not change the result
        del figures[name]
    return figures | parts
