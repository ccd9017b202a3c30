"""SIGTERM and Ctrl-C, that end a verb alike, and what native code makes of them.

A KeyboardInterrupt that is raised while torch or safetensors call back into Python may come out of them as an
error of their own, without a word of what it was.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came: list[int] = []  # numbers of the signals that have interrupted the verb that runs


@contextmanager
def interrupting_signals() -> Iterator[None]:
    """Both raise KeyboardInterrupt, in the main thread, and are noted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, _interrupt)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell has it ignored
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    _came.clear()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _came.clear()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    raise KeyboardInterrupt


def raise_if_interrupted(error: Exception) -> None:
    """KeyboardInterrupt where `error` stands for one that was lost; not where the error came up while one was
    on its way. Whoever goes on after errors of many kinds asks before."""
    if _came and not any(isinstance(one, KeyboardInterrupt) for one in _before(error)):
        raise KeyboardInterrupt from error


def _before(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while (before := error.__context__) is not None and id(before) not in seen:
        seen.add(id(before))
        yield before
        error = before
