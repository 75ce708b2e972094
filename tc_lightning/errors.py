"""The errors that a user is meant to read: one paragraph, saying what was wrong, where, and what to do."""


class TokenCacheError(Exception):
    """Base of every error raised on purpose; the command line prints it without a traceback and exits with 2."""


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
