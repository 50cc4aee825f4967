"""What a program tells its user in one message, without a traceback: exit code 2 for bad input, 1 for a run that failed."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right. The message names the file, key or value and the remedy."""


class ConfigError(UserError):
    """The configuration is not usable. The message has a line for each thing that is wrong with it."""


class DataError(UserError):
    """The data cannot be trained on as they are. The message lists what was found."""


class WeightsError(UserError):
    """Weights cannot be had, read, or fitted into the model."""


class RunError(UserError):
    """A run directory is missing, unfinished, or does not fit what is asked of it."""


class TrainingError(Exception):
    """Training cannot go on, through no mistake in its input. Programs print the message and leave with exit code 1."""


def suggest(key: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown key: the nearest valid one, else the valid ones where they are few, else nothing."""
    valid = list(valid)
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid are {', '.join(valid)}" if 0 < len(valid) <= 20 else ""
