"""Asking again, not too often and not too fast."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from shared.captioning.errors import CaptionError, StoppedError, TransientError
from shared.errors import SettingError

ResultT = TypeVar("ResultT")
Sleep = Callable[[float], None]


class Stop:
    """A sleep that ends for all threads at once when the run is to end."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def sleep(self, seconds: float) -> None:
        """StoppedError where the run ends before or meanwhile."""
        if self._event.wait(max(seconds, 0)):
            raise StoppedError("the run was stopped")


@dataclass(frozen=True, kw_only=True)
class RetrySettings:
    """`attempts` in all. Waits double from `first_wait` seconds, less up to a half by chance so that callers
    part; a longer one that the other side asks for is kept, but never one over `longest_wait`."""

    attempts: int = 5
    first_wait: float = 1.0
    longest_wait: float = 120.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise SettingError(f"attempts must be at least 1, got {self.attempts}")
        if not 0 <= self.first_wait <= self.longest_wait:
            raise SettingError(
                f"first_wait must be in 0..longest_wait ({self.longest_wait:g}), got {self.first_wait:g}"
            )

    def wait(self, attempt: int, asked: float | None) -> float:
        """Seconds after attempt 0, 1, ..."""
        own = min(self.first_wait * 2**attempt, self.longest_wait) * random.uniform(0.5, 1)
        return max(own, asked or 0.0)


def with_retries(ask: Callable[[], ResultT], settings: RetrySettings, sleep: Sleep) -> ResultT:
    """What `ask` returns, asked again after a TransientError; CaptionError when attempts have run out or the
    other side wants a longer wait than is allowed."""
    for attempt in range(settings.attempts - 1):
        try:
            return ask()
        except TransientError as error:
            wait = settings.wait(attempt, error.wait)
            if wait > settings.longest_wait:
                long = f"it asks to wait {wait:.0f} s, over {settings.longest_wait:g} s"
                raise CaptionError(f"{error}; {long}") from error
        sleep(wait)
    try:
        return ask()
    except TransientError as error:
        if settings.attempts == 1:  # another loop may be around this one
            raise
        raise CaptionError(f"{error} ({settings.attempts} attempts)") from error


class RateLimit:
    """Spreads the starts of calls evenly, over all threads; `per_minute` None: no limit."""

    def __init__(
        self, per_minute: float | None, sleep: Sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if per_minute is not None and not per_minute > 0:
            raise SettingError(f"requests_per_minute must be more than 0, got {per_minute:g}")
        self._interval = 60 / per_minute if per_minute else 0.0
        self._sleep, self._clock = sleep, clock
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        """Return when the caller may start."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + self._interval
        self._sleep(start - now)

    def hold(self, seconds: float) -> None:
        """No call starts before so many seconds are over."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)
