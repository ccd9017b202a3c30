"""Errors that a user can cause, each with the process exit code that the command line ends with."""

from collections.abc import Sequence

SHOWN = 5  # names listed in a message before "and N more"


def shown(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


class UserError(ValueError):
    """A mistake that the user can mend; printed as one line, never as a traceback."""

    exit_code = 2


class SettingError(UserError):
    """An illegal setting: the message says what was given, what is legal and the nearest legal value."""

    exit_code = 2


class WeightsError(UserError):
    """Weights are missing, unreadable or of another model."""

    exit_code = 3


class OutOfMemoryError(UserError):
    """A stage does not fit, predicted or hit."""

    exit_code = 4


class OutputCheckError(UserError):
    """A finished video failed its self-check (NaN, black, frozen)."""

    exit_code = 5


class OutputPathError(UserError):
    """The output cannot be written there."""

    exit_code = 2


class BatchError(UserError):
    """Some items of a batch failed; the run's index lists them."""

    exit_code = 7
