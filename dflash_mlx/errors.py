"""The errors a user can mend. Each message is one sentence: what is wrong and what to do."""


class DFlashError(ValueError):
    """Base of every error that the command line prints without a traceback."""


class CheckpointError(DFlashError):
    """A model directory or hub repository that cannot be read as what it should be."""


class PairError(DFlashError):
    """A draft that does not fit the target it was given."""


class UnsupportedTarget(DFlashError):
    """A target whose family cannot work with speculative decoding; the message says why."""


class InvalidCache(DFlashError):
    """A prompt cache that an exception left in an unknown state."""


def first_line(error: BaseException) -> str:
    """What an error says, or its name where it says nothing; no full stop at the end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
