"""Errors that a program reports as one message without a traceback: exit code 2 for bad input, 1 for a failed run."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can correct. The message names the file, key or value and the remedy."""


class ConfigError(UserError):
    """An invalid config. The message has a line for each mistake."""


class DataError(UserError):
    """Data that cannot be trained on as they are. The message lists the problems."""


class WeightsError(UserError):
    """Weights that are not available, cannot be read, or do not fit the model."""


class RunError(UserError):
    """A run directory that is missing, unfinished, or not suited to the command."""


class TrainingError(Exception):
    """A failure of training that no mistake in the input caused. Programs print the message and exit with code 1."""


def suggest(key: str, valid: Iterable[str]) -> str:
    """Return the end of a message about an unknown key.

    The nearest valid key, else up to 20 valid keys, else nothing.
    """
    valid = list(valid)
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid are {', '.join(valid)}" if 0 < len(valid) <= 20 else ""
