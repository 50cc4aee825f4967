"""What a program tells its user in one message, without a traceback: exit code 2 for bad input, 1 for a run that failed."""


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
