"""What can go wrong between a question and its answer."""

from __future__ import annotations

from shared.errors import BatchError, UserError


class CaptionError(UserError):
    """No usable answer to one question; other questions may still be answered."""

    exit_code = BatchError.exit_code


class TransientError(CaptionError):
    """Asking again may help. `wait` is for how many seconds the other side asked, None where it did not."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class RefusedError(CaptionError):
    """No question will be answered: a wrong key, address or model, or no more credit."""

    exit_code = 2


class StoppedError(CaptionError):
    """The run is ending: nothing more is asked."""
