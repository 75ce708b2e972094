"""The errors that a user is meant to read: one paragraph, saying what was wrong, where, and what to do."""

import re

# PyTorch's data loader hands an error of a worker process on as one of the same class whose message is the worker's traceback.
_IN_A_WORKER = re.compile(r"Caught (\w+) in .*\nOriginal Traceback .*\n[\w.]*\1: (.*)", re.DOTALL)


class TokenCacheError(Exception):
    """Base of every error raised on purpose; the command line prints it without a traceback and exits with 2."""

    def __init__(self, message: str = "") -> None:
        found = _IN_A_WORKER.fullmatch(message)
        super().__init__(found[2].strip() if found else message)


class PlanError(TokenCacheError):
    """A cache plan is inconsistent in itself, or does not fit the model it is used with."""


class TeacherError(TokenCacheError):
    """A teacher checkpoint cannot be used: unreadable, keys that do not match, NaN weights, another digest."""


class TrajectoryError(TokenCacheError):
    """A trajectory set cannot be recorded or used: another teacher or sampler, damaged shards, no space."""


class RunError(TokenCacheError):
    """A run folder is missing, incomplete, or does not belong to the current configuration."""


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough to quote in a paragraph."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
