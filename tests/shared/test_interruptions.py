"""Signals end a verb, whatever native code makes of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.claims import Claims
from benchmarks.work import Desk, Task
from shared.errors import OutputPathError
from shared.interruptions import interrupting_signals, raise_if_interrupted
from shared.verbs import interruptible

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def as_from_a_terminal() -> Iterator[None]:
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background process ignores it
    yield
    signal.signal(signal.SIGINT, before)


def lose(number: int) -> None:
    """What safetensors does with an interruption: an error without a word of it."""
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        pass
    raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_lost_interruption_is_one(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    assert interruptible(lambda _: lose(number), []) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert [signal.getsignal(one) for one in SIGNALS] == before
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda _: 1 // 0, [])


def test_an_error_while_an_interruption_is_on_its_way_stays_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(_: Sequence[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise OutputPathError("no room for run.json")

    assert interruptible(main, []) == 2
    assert capsys.readouterr().err == "error: no room for run.json\n"


def test_nothing_is_made_of_an_error_without_a_signal() -> None:
    with interrupting_signals():
        raise_if_interrupted(ValueError())
        with pytest.raises(ValueError, match="shape"):
            lose(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            raise_if_interrupted(ValueError())
    raise_if_interrupted(ValueError())  # of an earlier verb


def test_a_desk_stops_at_a_lost_interruption(tmp_path: Path) -> None:
    made: list[str] = []
    tasks = [
        Task(name="model/a", done=lambda: False, make=lambda: lose(signal.SIGTERM)),
        Task(name="model/b", done=lambda: bool(made), make=lambda: made.append("b")),
    ]
    with Claims(tmp_path / "claims") as claims, interrupting_signals(), pytest.raises(KeyboardInterrupt):
        Desk(claims=claims, failures=tmp_path / "failures", quiet=True).work_off(tasks)
    assert not made and not [*tmp_path.glob("failures/*")]
