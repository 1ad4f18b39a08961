"""The errors a user can mend. Each message is one sentence: what is wrong and what to do."""


class DFlashError(ValueError):
    """Base of every error that the command line prints without a traceback."""


class CheckpointError(DFlashError):
    """A model directory or hub repository that cannot be read as what it should be."""


class NoDraftKnown(CheckpointError):
    """A target that no draft was published for, as far as its names tell."""


class PairError(DFlashError):
    """A draft that does not fit the target it was given."""


class UnsupportedTarget(DFlashError):
    """A target whose family cannot work with speculative decoding; the message says why."""


class InvalidCache(DFlashError):
    """A prompt cache that an exception left in an unknown state."""


def said(error: BaseException) -> str:
    """All that an error says, in one line, or its name where it says nothing; no full stop.

    Messages of MLX, mlx-lm and transformers have several lines, and the last is often the one that
    matters.
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__
