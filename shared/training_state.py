"""What a run keeps between its steps, and how it comes back: weights, optimizers, average, step.

One process writes the file `state.pt`. Several write the folder `state-STEP` (torch.distributed.checkpoint),
each its own shards. Either is written aside and renamed, so it is whole or absent, and either is read by any
number of processes. The newest counts; the others are removed.
"""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.doctor.containers import check_file
from shared.errors import OutputPathError, WeightsError
from shared.torch_files import save_torch
from shared.training_parallel import Strategy, like, local

FILE = "state.pt"
FOLDER = re.compile(r"state-(\d+)")
_COUNTERS = ("step", "updates")


class EMA:
    """Exponential moving average of the trainable parameters in float32, sharded as they are; the early steps
    average faster: decay min(d, (1 + n) / (10 + n)) after n updates."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        named = dict(model.named_parameters())
        shadows = [local(shadow) for shadow in self.shadow.values()]
        values = [local(named[name].detach()).float() for name in self.shadow]
        torch._foreach_lerp_(shadows, values, weight=1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self, model: nn.Module):
        """The model with the averaged weights, for evaluation and export."""
        named = dict(model.named_parameters())
        kept = {n: named[n].detach().clone() for n in self.shadow}
        self.copy_to(model)
        try:
            yield
        finally:
            _copy_into(named, kept)

    def copy_to(self, model: nn.Module) -> None:
        _copy_into(dict(model.named_parameters()), self.shadow)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates, self.shadow = state["updates"], dict(state["shadow"])


@torch.no_grad()
def _copy_into(named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        named[name].copy_(value)


@dataclass(frozen=True)
class TrainState:
    """What changes in a run. Fill it with `resume`, keep it with `save`."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    ema: EMA | None

    def save(self, folder: Path, step: int, strategy: Strategy) -> None:
        """Keep it whole or not at all, in place of what was kept before. All processes must call it."""
        if strategy.is_spread:
            _save_shards(folder, step, self._flat() | self._counters(step), strategy)
        else:
            self._save_file(folder, step)
        if strategy.is_main:
            _remove_others(folder, f"state-{step}" if strategy.is_spread else FILE)
        strategy.wait()

    def resume(self, folder: Path, strategy: Strategy) -> int:
        """Take over the newest state in the folder, if any, and return its step; WeightsError says why one
        does not fit."""
        path, step = newest(folder)
        if path is None:
            return 0
        try:
            if path.name != FILE:
                self._load_shards(path)
            elif strategy.parallel == "fsdp":
                self._load_file_into_shards(path)
            else:
                self._load_file(path)
        except _UNREADABLE as error:
            raise _misfit(path, error) from error
        return step

    # ---- one file

    def _save_file(self, folder: Path, step: int) -> None:
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "ema": self.ema.state_dict() if self.ema else None,
        }
        save_torch(state, folder / FILE)

    def _load_file(self, path: Path) -> None:
        state = _read(path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            full = [group["full_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, lr in zip(optimizer.param_groups, full, strict=True):
                group["full_lr"] = lr
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])

    def _load_file_into_shards(self, path: Path) -> None:
        state = _read(path, mmap=True)
        flat = {f"model.{name}": tensor for name, tensor in state["model"].items()}
        names = self._names()
        for i, (optimizer, saved) in enumerate(zip(self.optimizers, state["optimizers"], strict=True)):
            owners = [names[p] for group in optimizer.param_groups for p in group["params"]]
            for index, entries in saved["state"].items():
                flat |= {f"optimizers.{i}.{owners[index]}.{key}": x for key, x in entries.items()}
        if self.ema and state["ema"]:
            flat |= {f"ema.{name}": tensor for name, tensor in state["ema"]["shadow"].items()}
            self.ema.updates = state["ema"]["updates"]
        targets = self._targets({key: tensor.shape for key, tensor in flat.items()})
        with torch.no_grad():
            for key, target in targets.items():
                target.copy_(like(flat[key], target))

    # ---- shards

    def _load_shards(self, path: Path) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        saved: Any = FileSystemReader(path).read_metadata().state_dict_metadata
        counters = self._counters(0)
        targets = self._targets({key: entry.size for key, entry in saved.items() if key not in _COUNTERS})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked
            try:
                load(targets | counters, checkpoint_id=path, no_dist=True)  # each reads what it needs
            except CheckpointException as error:
                raise RuntimeError(f"unreadable: {next(iter(error.failures.values()))[0]}") from error
        if self.ema and "updates" in counters:
            self.ema.updates = int(counters["updates"])

    def _counters(self, step: int) -> dict[str, Tensor]:
        counters = {"step": torch.tensor(step)}
        return counters | ({"updates": torch.tensor(self.ema.updates)} if self.ema else {})

    def _names(self) -> dict[Tensor, str]:
        return {p: name for name, p in self.model.named_parameters()}

    def _flat(self) -> dict[str, Tensor]:
        """Every tensor by a name that does not depend on the number of processes."""
        names = self._names()
        flat = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for p, entries in optimizer.state.items():
                flat |= {f"optimizers.{i}.{names[p]}.{key}": x for key, x in entries.items()}
        return flat | ({f"ema.{name}": x for name, x in self.ema.shadow.items()} if self.ema else {})

    def _targets(self, sizes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Where each saved tensor goes; makes the optimizers' entries. KeyError for what has no place,
        ValueError for what is missing or has another shape."""
        targets = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema:
            targets |= {f"ema.{name}": tensor for name, tensor in self.ema.shadow.items()}
        if missing := [key for key in targets if key not in sizes]:
            raise ValueError(f"no {missing[0]} in it")
        trained = dict(self.model.named_parameters())
        for key, size in sizes.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizers":
                number, _, rest = rest.partition(".")
                name, _, entry = rest.rpartition(".")
                p = trained[name].detach()
                made = torch.zeros_like(p) if size == p.shape else torch.zeros(size)
                self.optimizers[int(number)].state[trained[name]][entry] = targets[key] = made
            elif key in targets and size != targets[key].shape:
                raise ValueError(f"{key} is {list(size)}, here {list(targets[key].shape)}")
            elif key not in targets and kind != "ema":
                raise KeyError(key)
        return targets


_UNREADABLE = (
    RuntimeError, KeyError, ValueError, TypeError, EOFError, IndexError, OSError, pickle.UnpicklingError
)  # fmt: skip


def newest(folder: Path) -> tuple[Path | None, int]:
    """The state with the highest step, and that step; (None, 0) where there is none."""
    found = [
        (int(match[1]), path) for path in folder.glob("state-*") if (match := FOLDER.fullmatch(path.name))
    ]
    if (path := folder / FILE).exists():
        try:
            found.append((int(_read(path, mmap=True)["step"]), path))
        except _UNREADABLE as error:
            raise _misfit(path, error) from error
    step, newest_path = max(found, default=(0, None), key=lambda one: one[0])
    return newest_path, step


def _read(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    check_file(path)
    return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)


def _misfit(path: Path, error: Exception) -> WeightsError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return WeightsError(f"{path} does not continue this run: {reason}")


def _save_shards(folder: Path, step: int, flat: dict[str, Tensor], strategy: Strategy) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    aside, final = folder / f"state-{step}.part", folder / f"state-{step}"
    if strategy.is_main:
        shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
        shutil.rmtree(final, ignore_errors=True)
    strategy.wait()
    try:
        save(flat, checkpoint_id=aside, process_group=strategy.control)
    except CheckpointException as error:  # the same on all processes
        reason = (str(next(iter(error.failures.values()))[0]).splitlines() or ["unknown"])[0]
        raise OutputPathError(f"cannot write {final}: {reason}") from error
    if strategy.is_main:
        aside.rename(final)
    strategy.wait()


def _remove_others(folder: Path, kept: str) -> None:
    for path in folder.glob("state-*"):
        if path.name != kept:
            shutil.rmtree(path, ignore_errors=True)
    if kept != FILE:
        (folder / FILE).unlink(missing_ok=True)
