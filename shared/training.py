"""The one training loop: a function that both families call with a model and an objective.

Data are a function of the micro-batch's number (`objective(micro_step)`), so a resumed run sees exactly the
batches that an uninterrupted one would have seen, and "exact resume" needs no saved data position. For the
same reason any number of processes sees the same batches (`shared/training_parallel.py`).
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shared.errors import SettingError
from shared.files import remove_leftovers, write_json
from shared.json_files import read_object
from shared.optimizers import Muon
from shared.training_log import Logbook, memory_bytes
from shared.training_memory import recomputed
from shared.training_parallel import ALONE, Strategy, add_gradients, place, whole
from shared.training_state import EMA, TrainState
from shared.video import Video

MUON_MIN_WIDTH = 16

Logs = dict[str, float]
Objective = Callable[[int], tuple[Tensor, dict[str, Any]]]
"""Number of a micro-batch -> (loss scalar with graph, figures to log). Depends on nothing but that number and
the model; micro-batches of one step run the same nets in the same order. The figures "samples" and "tokens"
are counts, and logged as rates; a pair (sum, count) is logged as the mean over those micro-batches that have
it."""
COUNTS = frozenset({"samples", "tokens"})
RECIPE = "recipe.json"  # of a run's folder
OF = "/count"  # ends the name under which the counts of a pair are added up


_LEGAL: Mapping[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (lambda x: x >= 1, ("steps", "accumulation", "log_every", "save_every")),
    "at least 0": (
        lambda x: 0 <= x < math.inf,
        ("lr", "muon_lr", "weight_decay", "warmup_steps", "evaluate_every", "sample_every"),
    ),
    "above 0": (lambda x: x > 0, ("clip_norm",)),
    "in [0, 1]": (lambda x: 0 <= x <= 1, ("decay_fraction", "final_lr_fraction")),
    "in [0, 1)": (lambda x: 0 <= x < 1, ("betas", "ema_decay")),
    f"0 to {2**32 - 1}": (lambda x: 0 <= x < 2**32, ("seed",)),
}  # of TrainConfig's fields; what is not a number fits nowhere


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
    sample_every: int = 0  # likewise

    def __post_init__(self) -> None:
        for legal, (fits, names) in _LEGAL.items():
            for name in names:
                value = getattr(self, name)
                if not all(map(fits, value if isinstance(value, tuple) else (value,))):
                    raise SettingError(f"{name} must be {legal}, got {value}")

    def is_due(self, every: int, done: int) -> bool:
        """Whether something happens after `done` steps: always after the last, else every so many."""
        return done == self.steps or (every > 0 and done % every == 0)

    def lr_factor(self, step: int) -> float:
        """Share of the full learning rate at a step, 0..1."""
        rise = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        decay_steps = max(1, round(self.steps * self.decay_fraction))
        left = min(1.0, (self.steps - step) / decay_steps)
        return rise * (self.final_lr_fraction + (1 - self.final_lr_fraction) * left)


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

    def is_asked(self, strategy: Strategy) -> bool:
        """Whether any process was; one decision for all, which all must call."""
        return strategy.total(float(self.signal is not None)) > 0

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and saved its state; the same command resumes it."""


def _stopped(done: int, config: TrainConfig) -> str:
    return f"stopped at step {done} of {config.steps}; the same command resumes"


def train(
    model: nn.Module,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    *,
    evaluate: Callable[[nn.Module, int], Logs] | None = None,
    sample: Callable[[nn.Module, int], Mapping[str, Video]] | None = None,
    after_step: Callable[[int], None] | None = None,
    recipe: dict[str, Any] | None = None,
    strategy: Strategy = ALONE,
    quiet: bool = False,
) -> Path:
    """Train `model` in place and return the folder, which then holds the state (for resuming), `log.jsonl`,
    TensorBoard events and samples, and `model` holds the averaged weights if EMA is on. With fsdp it stays
    sharded: `shared.training_parallel.whole_state` gathers it.

    With several processes all call it alike; each takes its share of the micro-batches, the main one writes.
    `evaluate` and `sample` are called on every process, with the averaged weights.

    A folder with a state is resumed, bit for bit on one process; one whose `recipe` differs is refused.
    Raises `Interrupted` after SIGTERM or SIGINT to any process, with the state saved, and FloatingPointError
    when the loss or its gradient is not finite (the last saved state stays).
    """
    strategy.micro_steps(0, config.accumulation)  # refuses what cannot be dealt out, before anything is made
    folder.mkdir(parents=True, exist_ok=True)
    new_recipe = _checked_recipe(folder, recipe)
    if strategy.is_main:
        remove_leftovers(folder)
    place(model, strategy)
    ema = EMA(model, config.ema_decay) if config.ema_decay else None
    state = TrainState(model, make_optimizers(model, config), ema)
    start = state.resume(folder, strategy)
    if start > config.steps:
        raise SettingError(
            f"{folder} holds a run of {start} steps; steps must be at least that, got {config.steps}"
        )
    strategy.wait()  # all have read
    if new_recipe is not None and strategy.is_main:
        write_json(folder / RECIPE, new_recipe)
    device = next(model.parameters()).device
    with (
        Logbook(folder, steps=config.steps, start=start, active=strategy.is_main, quiet=quiet) as book,
        recomputed(model, strategy.activation_checkpointing),
        _Stop() as stop,
    ):
        for step in range(start, config.steps):
            model.train()
            figures = _step(state, objective, config, strategy, step)
            if ema:
                ema.update(model)
            if after_step:
                after_step(step)
            done = step + 1
            stopping = stop.is_asked(strategy)
            book.advance()
            if config.is_due(config.log_every, done):
                book.report(
                    done, _summary(figures, strategy) | {"memory_bytes": memory_bytes(device)}, show=True
                )
            if config.is_due(config.save_every, done) or stopping:
                state.save(folder, done, strategy)
            if stopping:
                raise Interrupted(_stopped(done, config))
            if evaluate and config.is_due(config.evaluate_every, done):
                with _averaged(model, ema):
                    book.report(done, evaluate(model, done))
            if sample and config.is_due(config.sample_every, done):
                with _averaged(model, ema):
                    book.draw(done, sample(model, done))
    if stop.is_asked(strategy):  # since the last step: while its state was saved, evaluated or shown
        raise Interrupted(_stopped(config.steps, config))
    if ema:
        ema.copy_to(model)
    model.eval()
    return folder


def _step(
    state: TrainState, objective: Objective, config: TrainConfig, strategy: Strategy, step: int
) -> Logs:
    """One update; figures of this process's micro-batches, already divided by the number of all."""
    began = time.perf_counter()
    factor = config.lr_factor(step)
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
    device = next(state.model.parameters()).device.type
    totals = _gradients(objective, config, strategy, step, device)
    _require_finite("loss", strategy.total(totals["loss"]), step)
    add_gradients(state.model.parameters(), strategy)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = float(whole(nn.utils.clip_grad_norm_(parameters, config.clip_norm)))
    _require_finite("loss's gradient", norm, step)
    for optimizer in state.optimizers:
        optimizer.step()
    common = {"grad_norm": norm, "lr": config.lr * factor, "seconds_per_step": time.perf_counter() - began}
    return totals | {name: value / strategy.world.degree for name, value in common.items()}


def _gradients(objective: Objective, config: TrainConfig, strategy: Strategy, step: int, device: str) -> Logs:
    """Backward passes of this process's micro-batches, and their share of the figures."""
    totals: Logs = {}
    for micro in strategy.micro_steps(step, config.accumulation):
        number = micro - step * config.accumulation
        torch.manual_seed(config.seed * 1_000_003 + step + (number << 40))  # dropout: after a resume too
        with torch.autocast(device, torch.bfloat16, enabled=config.autocast == "bfloat16"):
            loss, logs = objective(micro)
        (loss / config.accumulation).backward()
        for name, value in _parts({"loss": loss.detach()} | logs, 1 / config.accumulation):
            totals[name] = totals.get(name, 0.0) + value
    return totals


def _parts(figures: Mapping[str, Any], share: float) -> Iterator[tuple[str, float]]:
    """What a micro-batch adds to its step's figures: counts and pairs whole, others by its share."""
    for name, value in figures.items():
        if isinstance(value, tuple):
            yield name, float(value[0])
            yield name + OF, float(value[1])
        else:
            yield name, float(value) * (1 if name in COUNTS else share)


def _summary(figures: Logs, strategy: Strategy) -> Logs:
    """Figures over all processes, with counts as rates and pairs as means."""
    figures = strategy.totals(figures)
    for name in COUNTS & figures.keys():
        figures[f"{name}_per_second"] = figures.pop(name) / figures["seconds_per_step"]
    for name in [name.removesuffix(OF) for name in figures if name.endswith(OF)]:
        figures[name] /= figures.pop(name + OF)
    return figures


@contextmanager
def _averaged(model: nn.Module, ema: EMA | None) -> Iterator[None]:
    """Evaluation mode, without gradients, with the averaged weights."""
    model.eval()
    with torch.no_grad(), ema.applied(model) if ema else nullcontext():
        yield


def _require_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value} at step {step}; the last saved state is untouched")


def _checked_recipe(folder: Path, recipe: dict[str, Any] | None) -> dict[str, Any] | None:
    """The recipe as the folder is to keep it. A run folder belongs to one recipe; its steps may be raised,
    nothing else may change: SettingError."""
    if recipe is None:
        return None
    new: dict[str, Any] = json.loads(json.dumps(recipe, sort_keys=True, default=str))
    path = folder / RECIPE
    old = read_object(path, SettingError) if path.exists() else new
    unnamed = sorted(k for k in new.keys() - old.keys() if new[k] is not None)
    changed = sorted(k for k in old if old[k] != new.get(k) and k != "steps")
    said = [f"{', '.join(changed)} differ"] if changed else []
    if unnamed:
        said.append(f"it does not say {', '.join(unnamed)}, as those of an earlier version")
    if said:
        raise SettingError(
            f"{folder} holds a run with another recipe ({'; '.join(said)}); choose another folder"
        )
    return new


def recipe_of(config: TrainConfig, **parts: Any) -> dict[str, Any]:
    """What identifies a run: the training settings and whatever else the caller names."""
    figures = asdict(config)
    for name in ("log_every", "save_every", "evaluate_every", "sample_every"):  # do not change the result
        del figures[name]
    return figures | parts
