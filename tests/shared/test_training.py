"""The training loop: what a resumed run owes an uninterrupted one, and the pieces of a step."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.errors import OutputPathError, SettingError, WeightsError
from shared.optimizers import Muon, orthogonal
from shared.training import EMA, Interrupted, Logs, Objective, TrainConfig, make_optimizers, recipe_of, train

CONFIG = TrainConfig(steps=12, lr=1e-2, muon_lr=1e-2, warmup_steps=3, log_every=1, save_every=5)


class Net(nn.Module):
    """A bit of everything: a hidden matrix and kernel for Muon, narrow ends, a norm, dropout, a buffer."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.kernel = nn.Conv2d(16, 16, 3, padding=1)
        self.hidden = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(32, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        features = self.kernel(self.first(x).tanh()).mean((2, 3))
        return self.last(self.dropout(self.norm(self.hidden(features))))


def data(micro: int, size: int = 4) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(micro)
    x = torch.randn(size, 2, 5, 5, generator=draws)
    return x, x.mean((1, 2, 3))[:, None] * 3


def objective_of(model: nn.Module, hook: Callable[[int], None] = lambda micro: None) -> Objective:
    def objective(micro: int) -> tuple[Tensor, Logs]:
        hook(micro)
        x, y = data(micro)
        loss = (model(x) - y).square().mean()
        return loss, {"error": float(loss.detach().sqrt())}

    return objective


def run(
    folder: Path, config: TrainConfig, hook: Callable[[int], None] = lambda micro: None, **options: Any
) -> Net:
    model = Net()
    train(model, objective_of(model, hook), config, folder, quiet=True, **options)
    return model


def assert_equal(got: Any, expected: Any) -> None:
    """Nested states, bit for bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name in expected:
            assert_equal(got[name], expected[name])
    elif isinstance(expected, list | tuple):
        for one, other in zip(got, expected, strict=True):
            assert_equal(one, other)
    else:
        assert got == expected


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "state.pt", weights_only=True)


def logged(folder: Path, *, name: str = "loss") -> dict[int, float]:
    """The last figure of every step: a run that died between two states says some steps twice."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


# ---- resuming


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_like_an_uninterrupted_one(
    optimizer: str, number: signal.Signals, tmp_path: Path
) -> None:
    config = replace(CONFIG, optimizer=optimizer, accumulation=2, ema_decay=0.9, seed=3)
    whole = run(tmp_path / "whole", config)
    stop_at = int(torch.randint(1, 2 * config.steps - 2, (), generator=torch.Generator().manual_seed(number)))

    def stop(micro: int) -> None:
        if micro == stop_at:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=f"stopped at step {stop_at // 2 + 1} of 12"):
        run(tmp_path / "parts", config, stop)
    assert state(tmp_path / "parts")["step"] == stop_at // 2 + 1
    resumed = run(tmp_path / "parts", config)
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert_equal(state(tmp_path / "parts"), state(tmp_path / "whole"))
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


@pytest.mark.parametrize("died_at", [3, 9])
def test_a_run_that_died_resumes_from_its_last_state(died_at: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", CONFIG)

    def die(micro: int) -> None:
        if micro == died_at:
            raise MemoryError

    with pytest.raises(MemoryError):
        run(tmp_path / "parts", CONFIG, die)
    assert (tmp_path / "parts" / "state.pt").exists() == (died_at > 5)
    assert_equal(run(tmp_path / "parts", CONFIG).state_dict(), whole.state_dict())
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_handlers_of_signals_come_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run(tmp_path, replace(CONFIG, steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    config = replace(CONFIG, ema_decay=0.9)
    whole = run(tmp_path, config)
    asked: list[int] = []
    again = run(tmp_path, config, asked.append)
    assert not asked
    assert_equal(again.state_dict(), whole.state_dict())


def test_steps_may_be_raised(tmp_path: Path) -> None:
    recipe = recipe_of(CONFIG, batch=4)
    run(tmp_path, CONFIG, recipe=recipe)
    longer = replace(CONFIG, steps=15, log_every=2)
    asked: list[int] = []
    run(tmp_path, longer, asked.append, recipe=recipe_of(longer, batch=4))
    assert asked == [12, 13, 14]
    before = (tmp_path / "recipe.json").read_bytes()
    with pytest.raises(SettingError, match=r"15 steps.*got 12"):
        run(tmp_path, CONFIG, recipe=recipe)
    assert (tmp_path / "recipe.json").read_bytes() == before


@pytest.mark.parametrize(("change", "name"), [({"lr": 2e-2}, "lr"), ({"seed": 1}, "seed")])
def test_another_recipe_is_refused(change: dict[str, Any], name: str, tmp_path: Path) -> None:
    short = replace(CONFIG, steps=2)
    run(tmp_path, short, recipe=recipe_of(short, batch=4))
    before = (tmp_path / "state.pt").read_bytes(), (tmp_path / "recipe.json").read_bytes()
    other = replace(short, **change)
    with pytest.raises(SettingError, match=rf"another recipe \({name} differ\)"):
        run(tmp_path, other, recipe=recipe_of(other, batch=4))
    with pytest.raises(SettingError, match=r"batch differ"):
        run(tmp_path, short, recipe=recipe_of(short, batch=5))
    assert before == ((tmp_path / "state.pt").read_bytes(), (tmp_path / "recipe.json").read_bytes())


def test_how_often_to_log_and_save_is_no_part_of_the_recipe() -> None:
    changed = replace(CONFIG, log_every=99, save_every=99, evaluate_every=99)
    assert recipe_of(CONFIG) == recipe_of(changed) != recipe_of(replace(CONFIG, lr=1.0))


@pytest.mark.parametrize("content", [b"", b"not a state", "half"])
def test_an_unreadable_state_is_named(content: bytes | str, tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, steps=1))
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:999] if isinstance(content, str) else content)
    with pytest.raises(WeightsError, match=r"state\.pt does not continue this run"):
        run(tmp_path, CONFIG)


def test_the_state_of_another_model_is_named(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, steps=1))
    other = nn.Linear(3, 3)
    with pytest.raises(WeightsError, match="does not continue this run"):
        train(other, lambda step: (other.weight.sum(), {}), CONFIG, tmp_path, quiet=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_state_is_never_half_written(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, replace(CONFIG, steps=5))
    before = (tmp_path / "state.pt").read_bytes()

    def failing(_state: Any, file: Any) -> None:
        file.write(b"half a state")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        with pytest.raises(OutputPathError if isinstance(error, OSError) else type(error)):
            run(tmp_path, CONFIG)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert_equal(run(tmp_path, CONFIG).state_dict(), run(tmp_path / "whole", CONFIG).state_dict())


# ---- one step


def test_accumulation_equals_a_bigger_batch(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=4, clip_norm=1e9)
    parts, whole = Net(dropout=0).double(), Net(dropout=0).double()

    def part(micro: int) -> tuple[Tensor, Logs]:
        x, y = (t.double() for t in data(micro))
        return (parts(x) - y).square().mean(), {"batch": 4.0}

    def bigger(step: int) -> tuple[Tensor, Logs]:
        x, y = (torch.cat(t).double() for t in zip(*(data(3 * step + i) for i in range(3)), strict=True))
        return (whole(x) - y).square().mean(), {"batch": 12.0}

    train(parts, part, replace(config, accumulation=3), tmp_path / "parts", quiet=True)
    train(whole, bigger, config, tmp_path / "whole", quiet=True)
    for name, value in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name), value, rtol=1e-9, atol=1e-9)
    for figure in ("loss", "grad_norm"):
        got, expected = (logged(tmp_path / name, name=figure) for name in ("parts", "whole"))
        assert got == pytest.approx(expected, rel=1e-9)


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    model = nn.Linear(2, 1, bias=False)
    seen: list[float] = []
    config = replace(CONFIG, steps=2, clip_norm=0.5)

    def objective(_step: int) -> tuple[Tensor, Logs]:
        return 300 * model.weight.sum(), {}

    train(model, objective, config, tmp_path, quiet=True,
          after_step=lambda step: seen.append(float(model.weight.grad.norm())))  # fmt: skip
    assert seen == pytest.approx([0.5, 0.5])
    assert logged(tmp_path, name="grad_norm") == pytest.approx({1: 300 * math.sqrt(2), 2: 300 * math.sqrt(2)})


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_keeps_the_last_state(where: str, tmp_path: Path) -> None:
    model, weights = Net(), {}

    def objective(step: int) -> tuple[Tensor, Logs]:
        loss, logs = objective_of(model)(step)
        if step == 7:
            weights.update({n: p.detach().clone() for n, p in model.named_parameters()})
            bad = model.last.bias.sum()
            zero = (bad - bad.detach()).clamp(min=0)
            loss = loss * math.nan if where == "loss" else loss + zero.sqrt()  # its slope at 0 is infinite
        return loss, logs

    with pytest.raises(FloatingPointError, match=rf"{where} is (nan|inf) at step 7"):
        train(model, objective, CONFIG, tmp_path, quiet=True)
    assert state(tmp_path)["step"] == 5
    assert all(torch.isfinite(p).all() for p in state(tmp_path)["model"].values())
    assert_equal(dict(model.named_parameters()), weights)  # the bad step was not taken
    assert_equal(run(tmp_path, CONFIG).state_dict(), run(tmp_path / "whole", CONFIG).state_dict())


def test_frozen_parameters_are_untouched(tmp_path: Path) -> None:
    model = Net()
    frozen = [model.hidden.weight, model.first.weight]
    for parameter in frozen:
        parameter.requires_grad = False
    before = [p.detach().clone() for p in model.parameters()]
    config = replace(CONFIG, steps=3, optimizer="muon", ema_decay=0.5, weight_decay=0.1)
    train(model, objective_of(model), config, tmp_path, quiet=True)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) == any(parameter is f for f in frozen)
    assert "hidden.weight" not in state(tmp_path)["ema"]["shadow"]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(SettingError, match="frozen"):
        make_optimizers(nn.Linear(2, 2).requires_grad_(False), CONFIG)


# ---- schedule and logs


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, decay_fraction=0.25, final_lr_fraction=0.2)
    factors = [config.lr_factor(step) for step in range(100)]
    assert factors[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert factors[10:76] == [1.0] * 66
    assert factors[75:] == pytest.approx([0.2 + 0.8 * (25 - n) / 25 for n in range(25)])
    assert config.lr_factor(100) == pytest.approx(0.2)


@pytest.mark.parametrize("settings", [{"warmup_steps": 0, "decay_fraction": 0.0}, {"warmup_steps": 50}])
def test_short_schedules_are_legal(settings: dict[str, Any]) -> None:
    config = TrainConfig(steps=3, **settings)
    assert all(0 < config.lr_factor(step) <= 1 for step in range(3))


def test_every_group_follows_the_schedule(tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer="muon", muon_lr=5e-3)
    run(tmp_path, config)
    assert logged(tmp_path, name="lr") == {s + 1: config.lr * config.lr_factor(s) for s in range(12)}
    groups = [g for o in state(tmp_path)["optimizers"] for g in o["param_groups"]]
    assert sorted(g["full_lr"] for g in groups) == [5e-3, 1e-2, 1e-2]
    assert all(g["lr"] == g["full_lr"] * config.lr_factor(11) for g in groups)


def test_log_and_tensorboard_hold_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, replace(CONFIG, steps=5, log_every=2))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    figures = {"loss", "error", "grad_norm", "lr", "seconds_per_step", "memory_bytes"}
    assert lines[0].keys() == {"step", "elapsed"} | figures
    events = EventAccumulator(str(tmp_path)).Reload()
    drawn = {event.step: event.value for event in events.Scalars("loss")}
    assert drawn == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)


def test_evaluation_sees_the_averaged_weights_in_eval_mode(tmp_path: Path) -> None:
    model, seen = Net(), []

    def evaluate(net: nn.Module, step: int) -> Logs:
        assert not net.training and not torch.is_grad_enabled()
        seen.append((step, {n: p.detach().clone() for n, p in net.named_parameters()}))
        torch.rand(3)  # must not disturb what follows
        return {"validation": float(step)}

    config = replace(CONFIG, steps=5, ema_decay=0.9, evaluate_every=2)
    train(model, objective_of(model), config, tmp_path, evaluate=evaluate, quiet=True)
    assert [step for step, _ in seen] == [2, 4, 5]
    assert logged(tmp_path, name="validation") == {2: 2.0, 4: 4.0, 5: 5.0}
    assert_equal(seen[-1][1], state(tmp_path)["ema"]["shadow"])
    assert_equal(dict(model.named_parameters()), seen[-1][1])
    plain = run(tmp_path / "plain", replace(config, evaluate_every=0))
    assert_equal(dict(plain.named_parameters()), seen[-1][1])


# ---- moving average


def test_the_moving_average_follows_its_formula() -> None:
    model, decay = nn.Linear(1, 1, bias=False), 0.7
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    model.weight.data.fill_(values[0])
    ema, expected = EMA(model, decay), values[0]
    for n, value in enumerate(values[1:]):
        model.weight.data.fill_(value)
        ema.update(model)
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
    assert float(ema.shadow["weight"]) == pytest.approx(expected, rel=1e-5)
    with ema.applied(model):
        assert float(model.weight) == pytest.approx(expected, rel=1e-5)
    assert float(model.weight) == pytest.approx(values[-1], rel=1e-6)


def test_the_average_is_undone_after_an_error() -> None:
    model = nn.Linear(2, 2)
    ema, before = EMA(model, 0.5), model.weight.detach().clone()
    ema.shadow["weight"].zero_()
    with pytest.raises(ZeroDivisionError), ema.applied(model):
        assert not model.weight.any()
        raise ZeroDivisionError
    assert torch.equal(model.weight, before)


# ---- Muon


@pytest.mark.parametrize("size", [(16, 16), (16, 64), (64, 16), (32, 33)])
def test_orthogonal_brings_singular_values_near_one(size: tuple[int, int]) -> None:
    draws = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, generator=draws) * 1e-3
    made = orthogonal(matrix)
    assert made.shape == matrix.shape
    values = torch.linalg.svdvals(made)
    assert 0.6 < values.min() and values.max() < 1.25
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(made.flatten(), (left @ right).flatten(), dim=0) > 0.97
    torch.testing.assert_close(orthogonal(matrix * 1000), made, rtol=1e-3, atol=1e-3)


def test_orthogonal_of_zero_is_zero() -> None:
    assert not orthogonal(torch.zeros(4, 8)).any()


@pytest.mark.parametrize("size", [(32, 32), (16, 128), (24, 16, 3, 3), (64, 16, 1, 1), (16, 16, 3, 3, 3)])
def test_the_first_update_of_muon(size: tuple[int, ...]) -> None:
    """Decay first, then a step along the orthogonal matrix whose root mean square is near 0.2 lr."""
    draws = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(size, generator=draws))
    p.grad = torch.randn(size, generator=draws) * 50
    before, lr, decay = p.detach().clone(), 0.1, 0.3
    optimizer = Muon([p], lr=lr, weight_decay=decay)
    optimizer.step()
    step = (before * (1 - lr * decay) - p.detach()).flatten(1)
    assert 0.13 < float(step.square().mean().sqrt()) / lr < 0.25
    expected = orthogonal(p.grad.flatten(1)) * lr * 0.2 * math.sqrt(max(step.shape))
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-4)


def test_muon_remembers_past_gradients() -> None:
    draws = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(16, 16))
    optimizer, momentum = Muon([p], lr=1.0, momentum=0.9), torch.zeros(16, 16)
    for _ in range(3):
        p.grad = torch.randn(16, 16, generator=draws)
        before = p.detach().clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * p.grad
        expected = orthogonal(0.9 * momentum + 0.1 * p.grad) * 0.2 * 4
        torch.testing.assert_close(before - p.detach(), expected, rtol=1e-3, atol=1e-3)


def test_muon_leaves_parameters_without_gradient() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    Muon([p], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(p, torch.ones(4, 4))


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match=r"got parameters of shape \[\(3,\)\]"):
        Muon([nn.Parameter(torch.zeros(3))], lr=1.0)


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model = nn.ModuleDict({"net": Net(), "table": nn.Embedding(32, 32)})
    adamw, muon = make_optimizers(model, replace(CONFIG, optimizer="muon", weight_decay=0.1))
    names = {p: n for n, p in model.named_parameters()}
    assert {names[p] for g in muon.param_groups for p in g["params"]} == {
        "net.hidden.weight",
        "net.kernel.weight",
    }
    decayed, kept = adamw.param_groups
    assert {names[p] for p in decayed["params"]} == {"net.first.weight", "net.last.weight", "table.weight"}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 1 for p in kept["params"])
    every = [p for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert len(every) == len(set(every)) == len(names)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss(optimizer: str, tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, steps=60, optimizer=optimizer, save_every=60))
    losses = list(logged(tmp_path).values())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
